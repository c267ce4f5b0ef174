"""What the benchmarks run on: LLaVA-NeXT models of several sizes with random weights, and pairs with noise or photos.

Speed and memory do not depend on what weights and pixels say, so nothing is downloaded.
"""

import io
import json
from collections.abc import Sequence
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
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<image>")
"""With their ids: 0, 1, 2, 3."""

PHOTO_SIZE = (640, 480)
CHOSEN_SHARE = 0.55
"""Of the words of a record's chosen response that come from one half of the vocabulary; of a rejected one, from the other half.
Were both drawn alike, every loss would stay at log 2, and equal losses would show nothing."""


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

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the largest image."""
        return self.grid[0] * self.tile, self.grid[1] * self.tile


TINY = Shape(64, 2, 4, vocabulary=1_000, vision_hidden=32, vision_layers=2, tile=28, grid=(2, 2))
SHORT = Shape(512, 8, 8, vocabulary=32_000, vision_hidden=256, vision_layers=6, tile=84, grid=(1, 2))
MEDIUM = Shape(512, 8, 8, vocabulary=32_000, vision_hidden=256, vision_layers=6, tile=154, grid=(2, 2))
LONG = Shape(512, 8, 8, vocabulary=32_000, vision_hidden=256, vision_layers=6, tile=280, grid=(2, 2))

TINY_RESPONSES = ((8, 5), (4, 9))
SHORT_RESPONSES = ((80, 60), (60, 85))
RESPONSES = ((150, 60), (105, 195))
"""Words (chosen, rejected) of each pair of a batch."""


@dataclass(frozen=True)
class RecordsCase:
    """A model for whole runs, and the fewest and most words of a record's response."""

    shape: Shape
    words: tuple[int, int]


RECORDS_CASES = {
    "tiny": RecordsCase(TINY, (4, 9)),
    "small": RecordsCase(Shape(192, 4, 6, 8_000, vision_hidden=96, vision_layers=4, tile=112, grid=(2, 2)), (60, 120)),
}


@dataclass(frozen=True)
class RawPair:
    """One preference pair as a user has it; `png` are the bytes of its image."""

    question: str
    png: bytes
    chosen: str
    rejected: str

    @property
    def image(self) -> Image.Image:
        return Image.open(io.BytesIO(self.png))


def make_config(shape: Shape) -> LlavaNextConfig:
    return LlavaNextConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": shape.vision_hidden,
            "intermediate_size": 4 * shape.vision_hidden,
            "num_hidden_layers": shape.vision_layers,
            "num_attention_heads": shape.vision_hidden // 32,
            "image_size": shape.tile,
            "patch_size": 14,
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
            "pad_token_id": SPECIAL_TOKENS.index("<pad>"),
            "bos_token_id": SPECIAL_TOKENS.index("<s>"),
            "eos_token_id": SPECIAL_TOKENS.index("</s>"),
        },
        image_token_index=SPECIAL_TOKENS.index("<image>"),
        image_grid_pinpoints=[list(shape.image_size)],
    )


def save_model(folder: Path, shape: Shape) -> Path:
    """Writes model and processor where AutoModelForImageTextToText and AutoProcessor find them."""
    config = make_config(shape)
    torch.manual_seed(0)
    model: Any = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                # Transformers' initial weights are so small that outputs hardly depend on the input, and a comparison of two
                # implementations would show nothing.
                parameter.mul_(3)
    model.save_pretrained(folder)
    save_processor(folder, config)
    return folder


def save_processor(folder: Path, config: Any) -> None:
    """Writes the processor of a model with this LlavaNextConfig."""
    tile = config.vision_config.image_size
    image_processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": tile},
        crop_size={"height": tile, "width": tile},
        image_grid_pinpoints=config.image_grid_pinpoints,
    )
    LlavaNextProcessor(
        image_processor,
        _tokenizer(),
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)


def draw_pairs(image_size: tuple[int, int], response_words: Sequence[tuple[int, int]], *, seed: int = 0) -> list[RawPair]:
    """Pairs with an image of about this height and width, whose responses have about these many tokens (chosen, rejected)."""
    generator = np.random.default_rng(seed)

    def text(words: int) -> str:
        return " ".join(generator.choice(WORDS, words))

    pairs = []
    for i, (chosen, rejected) in enumerate(response_words):
        # Sizes differ a little from pair to pair, as images do: rows of features are cut away and the prompts' lengths differ.
        pixels = generator.integers(0, 256, (image_size[0] - 3 * (i % 3), image_size[1], 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        pairs.append(RawPair(QUESTION, file.getvalue(), text(chosen), text(rejected)))
    return pairs


def write_pairs(folder: Path, pairs: Sequence[RawPair]) -> None:
    """`pairs.jsonl` with the images beside it, as ms-swift's DPO reads them."""
    lines = []
    for number, pair in enumerate(pairs):
        image = folder / f"{number}.png"
        image.write_bytes(pair.png)
        question = {"role": "user", "content": f"<image>{pair.question}"}
        messages = [question, {"role": "assistant", "content": pair.chosen}]
        lines.append(json.dumps({"messages": messages, "rejected_response": pair.rejected, "images": [str(image)]}))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")


def read_pairs(folder: Path) -> list[RawPair]:
    """The pairs that `write_pairs` has written."""
    pairs = []
    for line in (folder / "pairs.jsonl").read_text().splitlines():
        row = json.loads(line)
        question, chosen = (message["content"].removeprefix("<image>") for message in row["messages"])
        pairs.append(RawPair(question, Path(row["images"][0]).read_bytes(), chosen, row["rejected_response"]))
    return pairs


def write_records(folder: Path, *, pairs: int, words: tuple[int, int], seed: int = 0) -> Path:
    """A JSONL file in TRL's conversational format, which rayalign reads as well, with a photo for each record beside it."""
    generator = np.random.default_rng(seed)
    vocabulary = sorted(set(WORDS))
    halves = vocabulary[::2], vocabulary[1::2]

    def response(own: int) -> list[dict[str, str]]:
        from_own = generator.random(generator.integers(words[0], words[1] + 1)) < CHOSEN_SHARE
        text = " ".join(str(generator.choice(halves[own if is_own else 1 - own])) for is_own in from_own)
        return [{"role": "assistant", "content": text}]

    (folder / "photos").mkdir(parents=True)
    lines = []
    for number in range(pairs):
        photo = f"photos/{number}.jpg"
        _draw_photo(generator).save(folder / photo, quality=85)
        prompt = [{"role": "user", "content": QUESTION}]
        lines.append(json.dumps({"images": [photo], "prompt": prompt, "chosen": response(0), "rejected": response(1)}))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "pairs.jsonl"


def _draw_photo(generator: np.random.Generator) -> Image.Image:
    """Colours that change slowly, shapes of some pixels, and grain: as a JPEG as large as photos of its size are."""
    width, height = PHOTO_SIZE
    colours = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    shapes = Image.fromarray(generator.normal(0, 25, (height // 8, width // 8)).astype(np.float32))
    grain = generator.normal(0, 6, (height, width))
    slow = np.asarray(colours.resize(PHOTO_SIZE, Image.Resampling.BICUBIC), dtype=np.float32)
    fast = np.asarray(shapes.resize(PHOTO_SIZE, Image.Resampling.BILINEAR)) + grain
    return Image.fromarray((slow + fast[..., None]).clip(0, 255).astype(np.uint8))


def _tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([SENTENCE, " " + SENTENCE, QUESTION, "USER: ASSISTANT: "] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
