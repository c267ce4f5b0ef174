"""The quickstart's model: a transformers LLaVA of 0.3 M parameters, built and trained on captions from nothing, in half a
minute."""

import math
import random
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from task import ANSWER_START, CAPTION_REQUEST, CAPTION_STARTS, PICTURE_SIDE, QUESTION, SLOTS, Digits, words

PATCH = 8
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% "
    "endfor %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<image>", "<|system|>", "<|user|>", "<|assistant|>"]


def build_processor() -> Any:
    """A byte-level BPE learnt from sentences of the task, and CLIP's image processing at the pictures' size."""
    draw = random.Random(0)
    sentences = [QUESTION, CAPTION_REQUEST] * 50
    for start in (ANSWER_START, *CAPTION_STARTS):
        sentences += [words(start, [draw.randrange(10) for _ in range(SLOTS)]) for _ in range(500)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(sentences, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
    side = PICTURE_SIDE
    images = CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_mean=[0.2] * 3, image_std=[0.35] * 3
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(processor: Any, seed: int) -> Any:
    """A LLaVA with random weights: CLIP tower of 2 layers x 64, Llama of 2 layers x 96, 16 image tokens."""
    tokenizer = processor.tokenizer
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=PICTURE_SIDE,
        patch_size=PATCH,
        projection_dim=64,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(PICTURE_SIDE // PATCH) ** 2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    return LlavaForConditionalGeneration(config)


def prompt_ids(processor: Any, question: str) -> Tensor:
    """Token ids [length] of a question about one picture, up to where the model responds."""
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    blank = np.zeros((PICTURE_SIDE, PICTURE_SIDE, 3), np.uint8)
    ids: Tensor = processor(text=[text], images=[blank], add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    return ids


def response_ids(processor: Any, texts: list[str]) -> Tensor:
    """Token ids [n, length] of answers or captions with their end; all have the same length."""
    rows = processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
    return torch.tensor([[*row, processor.tokenizer.eos_token_id] for row in rows])


def next_token_logps(model: Any, prompt: Tensor, pixels: Tensor, responses: Tensor) -> Tensor:
    """Log-probabilities [n, length, vocabulary] of what comes at each place of a response to the same prompt about different
    pictures."""
    ids = torch.cat([prompt.expand(len(responses), -1), responses], 1)
    keep = responses.shape[1] + 1
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, logits_to_keep=keep)
    logps: Tensor = output.logits[:, :-1].float().log_softmax(-1)
    return logps


def token_logps(model: Any, prompt: Tensor, pixels: Tensor, responses: Tensor) -> Tensor:
    """Log-probability of each response token [n, length]."""
    return next_token_logps(model, prompt, pixels, responses).gather(2, responses[..., None])[..., 0]


@torch.no_grad()
def read_captions(model: Any, processor: Any, pixels: Tensor, digits: Digits) -> float:
    """Share of the digits in true captions that the model finds the most probable at their place."""
    captions = response_ids(processor, [words(CAPTION_STARTS[0], row) for row in digits])
    told = next_token_logps(model, prompt_ids(processor, CAPTION_REQUEST), pixels, captions).argmax(2)
    is_digit = (captions != captions[0]).any(0)
    return float((told == captions)[:, is_digit].float().mean())


def train_on_captions(
    processor: Any, pixels: Tensor, digits: Digits, *, seed: int, steps: int = 350, batch: int = 32, peak: float = 2e-3
) -> Any:
    """Trains all weights from nothing on true captions in two styles; the answers' style is left to SFT."""
    model, draw = build_model(processor, seed).train(), np.random.default_rng(seed)
    prompt = prompt_ids(processor, CAPTION_REQUEST)
    captions = torch.stack([response_ids(processor, [words(start, row) for row in digits]) for start in CAPTION_STARTS])
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.01)
    warmup = steps // 10
    for step in range(steps):
        rise, fall = (step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
        optimizer.param_groups[0]["lr"] = peak * (rise if step < warmup else fall)
        rows, style = draw.integers(0, len(digits), batch), draw.integers(0, len(CAPTION_STARTS), batch)
        loss = -token_logps(model, prompt, pixels[rows], captions[style, rows]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()
