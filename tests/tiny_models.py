"""Real model families at toy size, built from their config classes, with working processors; nothing is downloaded."""

import dataclasses
import functools
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from rayalign.algorithms import Needs
from rayalign.batch import PairBatch, assemble, with_damaged, with_mismatched
from rayalign.config import ModelConfig, TunerConfig
from rayalign.encode import Encoder, EncoderSpec, damaged_image_processing, image_processing
from rayalign.loading import load_policy
from rayalign.models import ModelSource
from rayalign.plan import StepTotals
from rayalign.policy import TRAINED, Policy
from rayalign.prepared import EncodedPair
from rayalign.records import IMAGE_MARK, Message, PreferenceRecord

FAMILIES = ("llava", "llava_next")
BOTH = Needs()
REFERRED = Needs(reference=True)

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<s>' if loop.first else '' }}{{ message['role'] | upper }}: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{{ '</s>' if message['role'] == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)

VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
    "projection_dim": 32,
}
TEXT = {
    "model_type": "mistral",
    "vocab_size": 600,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": None,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 4096,
}
PINPOINTS = [[28, 56], [56, 28], [56, 56]]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on a few sentences."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    sentences = ["Which digit is it? The digit is two.", "USER ASSISTANT SYSTEM: describe the image. A cat sits on the mat."]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<pad>", "<s>", "</s>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(sentences, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def make_processor(family: str) -> Any:
    tokenizer = make_tokenizer()
    common = {
        "patch_size": VISION["patch_size"],
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "chat_template": CHAT_TEMPLATE,
    }
    sizes = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    if family == "llava":
        return LlavaProcessor(CLIPImageProcessorPil(**sizes), tokenizer, **common)
    return LlavaNextProcessor(LlavaNextImageProcessorPil(**sizes, image_grid_pinpoints=PINPOINTS), tokenizer, **common)


def make_model(family: str, *, text: dict[str, Any] | None = None, seed: int = 0) -> Any:
    """The model with random weights, scaled up so that outputs depend on every input (equality would say nothing otherwise)."""
    image_token = make_tokenizer().convert_tokens_to_ids("<image>")
    common = {"vision_config": VISION, "text_config": {**TEXT, **(text or {})}, "image_token_index": image_token}
    config = LlavaConfig(**common) if family == "llava" else LlavaNextConfig(**common, image_grid_pinpoints=PINPOINTS)
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in _matrices(model):
            parameter.mul_(5)
    return model


def save_tiny_model(folder: Path, family: str = "llava", *, text: dict[str, Any] | None = None, seed: int = 0) -> Path:
    """Writes model and processor where AutoModelForImageTextToText and AutoProcessor find them."""
    make_model(family, text=text, seed=seed).save_pretrained(folder)
    make_processor(family).save_pretrained(folder)
    return folder


def _matrices(model: torch.nn.Module) -> Iterator[torch.nn.Parameter]:
    return (p for p in model.parameters() if p.ndim >= 2)


def noise_image(width: int, height: int, *, seed: int = 0) -> bytes:
    """A PNG of noise: no two seeds give the same features."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def encode_pair(
    folder: Path, pair_id: str, question: str, chosen: str, rejected: str, *, images: Sequence[bytes] = ()
) -> EncodedPair:
    """A pair as the encoder of a tiny model makes it; the images stand before the question."""
    message = Message(role="user", content=IMAGE_MARK * len(images) + question)
    record = PreferenceRecord(id=pair_id, messages=(message,), images=tuple(images), chosen=chosen, rejected=rejected)
    return _encoder(folder).encode(record, images)


def make_batch(
    folder: Path, pairs: Sequence[EncodedPair], *, needs: Needs = BOTH, partners: Sequence[EncodedPair] = ()
) -> PairBatch:
    """The batch of some pairs as an algorithm needs it, images processed by the tiny model's own processor. `partners`: the
    pairs whose responses are put to these pairs' prompts, where a companion is made of them; by default each pair's next
    one."""
    spec = _encoder(folder).spec
    if needs.responses == "chosen":
        pairs = [dataclasses.replace(pair, rejected_ids=[]) for pair in pairs]
    batch = assemble(pairs, pad_token_id=0, process_images=image_processing(spec))
    match needs.companion:
        case "none":
            return batch
        case "mismatched":
            return with_mismatched(batch, pairs, partners or [*pairs[1:], pairs[0]], pad_token_id=0)
        case "damaged":
            return with_damaged(batch, pairs, pad_token_id=0, process_damaged=damaged_image_processing(spec))


def make_policy(
    source: Path | ModelSource,
    *,
    model: ModelConfig | None = None,
    tuner: TunerConfig | None = None,
    needs: Needs = BOTH,
    seed: int = 42,
) -> Policy:
    """The policy of a tiny model on the CPU, in float32 and without gradient checkpointing unless told otherwise."""
    return load_policy(
        source if isinstance(source, ModelSource) else ModelSource(str(source)),
        model=model or ModelConfig(gradient_checkpointing=False),
        tuner=tuner or TunerConfig(),
        device=torch.device("cpu"),
        needs=needs,
        seed=seed,
    )


def wake_adapters(policy: Policy, *, scale: float = 0.1, seed: int = 0) -> Policy:
    """Gives the trained adapters and the value head weights that change the outputs; new ones are zero, and so are half of
    their gradients."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.trainable.items():
            if name.endswith((f"lora_B.{TRAINED}.weight", "v_head.summary.weight")):
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return policy


def in_float64(policy: Policy) -> Policy:
    """Casts the policy's weights, and swaps the norms, which transformers computes in float32 always, for torch's own."""
    policy.model.double()
    if policy.value_head is not None:
        policy.value_head.double()
    for parent in list(policy.model.modules()):
        for name, norm in list(parent.named_children()):
            if type(norm).__name__.endswith("RMSNorm") and not isinstance(norm, torch.nn.RMSNorm):
                exact = torch.nn.RMSNorm(len(norm.weight), eps=norm.variance_epsilon)
                exact.weight = norm.weight
                setattr(parent, name, exact)
    return policy


@functools.cache
def _encoder(folder: Path) -> Encoder:
    return Encoder(EncoderSpec(str(folder), responses="both"))


def totals_of(pairs: Sequence[EncodedPair]) -> StepTotals:
    """The counts of a step of these pairs."""
    sides = [len(ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    return StepTotals(len(pairs), sum(n > 0 for n in sides), sum(sides[::2]), sum(sides[1::2]))
