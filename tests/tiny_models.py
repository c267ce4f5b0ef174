"""Real model families at toy size, built from their config classes, with working processors; nothing is downloaded."""

import dataclasses
import functools
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

from rayalign.algorithms import Needs
from rayalign.config.sections import ModelConfig, TunerConfig
from rayalign.data.batch import PairBatch, assemble
from rayalign.data.companions import with_companion
from rayalign.data.encode import Encoder
from rayalign.data.encoder_spec import EncoderSpec, image_processing
from rayalign.data.sampler import StepCounts
from rayalign.data.store import EncodedPair, TokenCounts
from rayalign.formats.records import IMAGE_MARK, Message, PreferenceRecord
from rayalign.models.registry import find_family
from rayalign.models.source import ModelSource
from rayalign.policy.adapters import TRAINED
from rayalign.policy.loading import load_policy
from rayalign.policy.policy import Policy
from tests.tiny_families import TINY_FAMILIES, TINY_TEXT_MODELS, TinyFamily

FAMILIES = ("llava", "llava_next")
BOTH = Needs()
REFERRED = Needs(reference=True)


TINY = {**TINY_FAMILIES, **TINY_TEXT_MODELS}


def make_processor(family: str) -> Any:
    return TINY[family].processor()


def make_model(family: str, *, text: dict[str, Any] | None = None, seed: int = 0) -> Any:
    """A family's model with random weights."""
    tiny = TINY[family]
    return _random_model(tiny.config(tiny.processor(), text or {}), seed)


def save_tiny_model(folder: Path, family: str = "llava", *, text: dict[str, Any] | None = None, seed: int = 0) -> Path:
    """Writes a family's model and processor where transformers' Auto classes find them."""
    return save_model(folder, TINY[family], text=text, seed=seed)


def save_model(folder: Path, tiny: TinyFamily, *, text: dict[str, Any] | None = None, seed: int = 0) -> Path:
    """The same for a family that is not among those above."""
    processor = tiny.processor()
    _random_model(tiny.config(processor, text or {}), seed).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _random_model(config: Any, seed: int) -> Any:
    """Weights are scaled up so that outputs depend on every input (equality would say nothing otherwise)."""
    torch.manual_seed(seed)
    model = find_family(config.model_type).auto_class.from_config(config)
    with torch.no_grad():
        for parameter in _matrices(model):
            parameter.mul_(5)
        for name, parameter in model.named_parameters():
            if name.endswith("mm_input_projection_weight"):  # Gemma 3 starts with zeros here, blind to images
                parameter.normal_(0, 0.1)
    return model


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
    layout, process = spec.layout, image_processing(spec)
    batch = assemble(pairs, layout=layout, process_images=process)
    partners = partners or [*pairs[1:], pairs[0]]
    return with_companion(batch, needs.companion, pairs, partners, layout=layout, process_images=process)


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
                exact = torch.nn.RMSNorm(len(norm.weight), eps=norm.eps if hasattr(norm, "eps") else norm.variance_epsilon)
                exact.weight = norm.weight
                if type(norm).__name__.startswith("Gemma"):  # whose norms scale by 1 + weight
                    exact.weight = torch.nn.Parameter(1 + norm.weight.detach(), requires_grad=norm.weight.requires_grad)
                setattr(parent, name, exact)
    return policy


@functools.cache
def _encoder(folder: Path) -> Encoder:
    return Encoder(EncoderSpec(str(folder), responses="both"))


def counts_of(pairs: Sequence[EncodedPair]) -> StepCounts:
    """The counts of a step of these pairs."""
    return StepCounts.of(TokenCounts.of(pairs))


def peft_adapter(model: Path, folder: Path, targets: list[str]) -> Path:
    """An adapter such as other tools make."""
    base = make_policy(model, tuner=TunerConfig(sft_type="full")).model
    get_peft_model(base, LoraConfig(r=4, target_modules=targets)).save_pretrained(str(folder), save_embedding_layers=False)
    return folder
