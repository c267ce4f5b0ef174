"""What the benchmarks run on: LLaVA-NeXT models of several sizes with random weights, and pairs with noise for images.

Speed and memory do not depend on what weights and pixels say, so nothing is downloaded.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForImageTextToText,
    LlavaNextConfig,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
)

SENTENCE = "a cat sits on the mat and two dogs look at it from far away while it rains in this old picture"
WORDS = SENTENCE.split()
QUESTION = "describe the picture from far away and look at the two dogs"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<s>' if loop.first else '' }}{{ message['role'] | upper }}: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}"
    "{{ '</s>' if message['role'] == 'assistant' else '\n' }}{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
PATCH = 14


@dataclass(frozen=True)
class Shape:
    """A model and its images. `tile` is the side of the vision tower's input, `grid` the largest image in tiles (rows,
    columns); both decide on the number of image tokens."""

    hidden: int
    layers: int
    heads: int
    vocabulary: int
    vision_hidden: int
    vision_layers: int
    tile: int
    grid: tuple[int, int]


@dataclass(frozen=True)
class RawPair:
    """One preference pair as a user has it."""

    question: str
    image: Image.Image
    chosen: str
    rejected: str

    def image_bytes(self) -> bytes:
        file = io.BytesIO()
        self.image.save(file, "PNG")
        return file.getvalue()


def save_model(folder: Path, shape: Shape) -> Path:
    """Writes model and processor where AutoModelForImageTextToText and AutoProcessor find them."""
    tokenizer = _tokenizer()
    image_token: Any = tokenizer.convert_tokens_to_ids("<image>")
    largest = [shape.grid[0] * shape.tile, shape.grid[1] * shape.tile]
    config = LlavaNextConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": shape.vision_hidden,
            "intermediate_size": 4 * shape.vision_hidden,
            "num_hidden_layers": shape.vision_layers,
            "num_attention_heads": shape.vision_hidden // 32,
            "image_size": shape.tile,
            "patch_size": PATCH,
        },
        text_config={
            "model_type": "mistral",
            "vocab_size": shape.vocabulary,
            "hidden_size": shape.hidden,
            "intermediate_size": 11 * shape.hidden // 4,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.heads // 2,
            "head_dim": shape.hidden // shape.heads,
            "sliding_window": None,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        image_token_index=image_token,
        image_grid_pinpoints=[largest],
    )
    torch.manual_seed(0)
    model: Any = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                # Transformers' initial weights are so small that outputs hardly depend on the input, and a comparison of two
                # implementations would show nothing.
                parameter.mul_(3)
    model.save_pretrained(folder)
    image_processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": shape.tile},
        crop_size={"height": shape.tile, "width": shape.tile},
        image_grid_pinpoints=[largest],
    )
    LlavaNextProcessor(
        image_processor,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return folder


def draw_pairs(shape: Shape, response_words: list[tuple[int, int]], *, seed: int = 0) -> list[RawPair]:
    """Pairs whose responses have about these many tokens (chosen, rejected); images fill the model's largest grid, nearly."""
    generator = np.random.default_rng(seed)

    def text(words: int) -> str:
        return " ".join(generator.choice(WORDS, words))

    pairs = []
    for i, (chosen, rejected) in enumerate(response_words):
        # Sizes differ a little from pair to pair, as images do: rows of features are cut away and the prompts' lengths differ.
        height, width = shape.grid[0] * shape.tile - 3 * (i % 3), shape.grid[1] * shape.tile
        image = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        pairs.append(RawPair(QUESTION, image, text(chosen), text(rejected)))
    return pairs


def _tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<pad>", "<s>", "</s>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([SENTENCE, " " + SENTENCE, QUESTION, "USER: ASSISTANT: "] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
