"""What gpu.py takes its steps of: a LLaVA-NeXT of random weights on the device, and the ways to compute a step with it."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft.tuners import lora
from sides import BETA, LORA_ALPHA, LORA_RANK, Encoded, Job, collate, dpo_trainer, draw_adapter, with_reference
from synthetic import RESPONSES, SPECIAL_TOKENS, TINY, TINY_RESPONSES, RawPair, save_processor, write_pairs
from synthetic import make_config as make_small_config
from torch import Tensor
from transformers import LlavaNextConfig

import rayalign.models
from rayalign.algorithms import DPO
from rayalign.config.sections import ModelConfig, TunerConfig
from rayalign.models.registry import find_family, load_config
from rayalign.models.source import ModelSource
from rayalign.policy.adapters import add_adapters
from rayalign.policy.fused_norms import fuse_norms
from rayalign.policy.policy import Policy
from rayalign.policy.prepare import attention_kernels

CONFIG = Path(rayalign.models.__file__).parent / "configs" / "llava1_6-mistral-7b-instruct"
TUNER = TunerConfig(lora_target_modules=("ALL",), lora_rank=LORA_RANK, lora_alpha=LORA_ALPHA, lora_dropout=0.0)
ALGORITHM = DPO(beta=BETA, rpo_alpha=0.0)

RESPONSES_OF = {"7b": RESPONSES, "tiny": TINY_RESPONSES}
"""Of each shape of the model."""

IMAGES = {"small": (1.0, 1.0), "photo": (480 / 336, 640 / 336), "square": (2.0, 2.0)}
"""Height and width of a case's pictures, in tiles of the vision tower: about 1,200, 2,300 and 2,900 image tokens in the 7B
model."""


@dataclass(frozen=True)
class Way:
    """One way to compute the step. `reference`: run in the step, or its log-probabilities come with the batch. `autocast`: step
    under bfloat16 autocast, which is TRL's default, and in which peft's adapters compute in bfloat16 instead of float32."""

    side: Literal["rayalign", "trl"]
    attention: str
    checkpointing: bool
    reference: Literal["computed", "stored"] = "computed"
    autocast: bool = False

    @property
    def name(self) -> str:
        words = ["TRL" if self.side == "trl" else "rayalign"]
        words += [f"reference {self.reference}", *(["autocast"] if self.autocast else [])]
        return ", ".join(words)


def make_config(shape: str, layers: int | None) -> Any:
    """The shipped config of llava1_6-mistral-7b-instruct with the synthetic tokenizer's image token, or a tiny model's sizes in
    it."""
    settings = load_config(str(CONFIG)).to_dict() | {"image_token_index": SPECIAL_TOKENS.index("<image>")}
    if shape == "tiny":
        small = make_small_config(replace(TINY, tile=56)).to_dict()
        settings |= {name: small[name] for name in ("text_config", "vision_config")}
        settings["image_grid_pinpoints"] = [[side * 56 // 336 for side in grid] for grid in settings["image_grid_pinpoints"]]
    if layers is not None:
        settings["text_config"] = settings["text_config"] | {"num_hidden_layers": layers}
    return LlavaNextConfig.from_dict(settings)


def make_model(config: Any, *, device: torch.device, dtype: torch.dtype) -> Any:
    """A model with random weights on the device, in peft's wrapper with rayalign's adapters, which make the policy another one
    than the reference."""
    family = find_family(config.model_type)
    with torch.device(device):
        base = family.auto_class.from_config(config, dtype=dtype, attn_implementation=attention_kernels(family, ModelConfig()))
    base.requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        # Outputs of the size of the inputs at any width, so that everything counts: transformers' own start values make a small
        # model blind to what it reads.
        for parameter in base.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
        base.get_input_embeddings().weight.normal_(0, 1, generator=generator)
    model = add_adapters(base, ModelSource(""), TUNER, family, needs_reference=True)
    draw_adapter(model)
    return model


class Bench:
    """A model on a device, and the ways to compute the step of some pairs with it. Only one way can be entered at a time."""

    def __init__(self, model: Any, config: Any, folder: Path) -> None:
        self.model, self.config, self.folder = model, config, folder
        self.base = model.get_base_model()
        self.dtype, self.device = self.base.dtype, self.base.device
        self.family = find_family(config.model_type)
        self._adapted = [(module, type(module)) for module in model.modules() if isinstance(module, lora.Linear)]
        # As `load_policy` does on a GPU; here on each device, so that a rehearsal runs them.
        self._norms = [(module, type(module)) for module in fuse_norms(self.base)]
        config.save_pretrained(folder / "model")
        save_processor(folder / "model", config)

    def take(self, pairs: Sequence[RawPair]) -> None:
        """Puts a batch of these pairs on the device, by both sides' encoders, and the reference's log-probabilities of it."""
        write_pairs(self.folder, pairs)
        self.job = Job(str(self.folder), device=self.device.type)
        self.encoded = Encoded(self.job.model, pairs)
        self.trl_batch = collate(self.job)
        batch = self.encoded.batch.to(self.device)
        self.enter(Way("rayalign", ModelConfig().attn_implementation, checkpointing=False))
        self.batches = {"computed": batch, "stored": with_reference(self.policy, batch)}

    def enter(self, way: Way) -> None:
        """Brings the model into the state that a way trains it in."""
        self.way = way
        self.let_peft_compute(way.side == "trl")
        for module, kind in self._norms:
            module.__class__ = kind.__bases__[0] if way.side == "trl" else kind
        torch.backends.cuda.enable_cudnn_sdp(way.side == "trl")  # as `load_policy` does
        self.base.disable_input_require_grads()
        self.base.activation_checkpointing_disable()
        if way.side == "trl":
            self.base.set_attn_implementation({"text_config": way.attention})
            if way.checkpointing:
                # What DPOTrainer does to an adapted model, and what Trainer does when training starts.
                self.base.enable_input_require_grads()
                self.base.activation_checkpointing_enable()
            self.trainer.model.train()
            return
        config: Any = ModelConfig(attn_implementation=way.attention)  # type: ignore[arg-type]  # argparse has checked it
        self.base.set_attn_implementation(attention_kernels(self.family, config))
        if way.checkpointing:
            self.base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        self.policy = Policy(self.model, self.family, dtype=self.dtype)

    def let_peft_compute(self, wanted: bool) -> None:
        """Gives adapted layers peft's own arithmetic, which TRL has, or the one that rayalign put in its place."""
        for module, kind in self._adapted:
            module.__class__ = lora.Linear if wanted else kind

    def step(self) -> Tensor:
        """The loss [] by the way that was entered; gradients are added to the adapters'."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.way.autocast):
            if self.way.side == "trl":
                loss: Tensor = self.trainer.compute_loss(self.model, dict(self.trl_batch))
            else:
                loss = ALGORITHM.loss(self.policy, self.batches[self.way.reference], self.encoded.counts).loss
        loss.backward()
        return loss.detach()

    @functools.cached_property
    def trainer(self) -> Any:
        """TRL's trainer of this very model; `enter` turns checkpointing on and off, `step` enters autocast."""
        trainer = dpo_trainer(self.job, self.model)
        # It takes the adapter for one to continue from and makes a copy of it the reference; ours is new, and its reference the
        # model without it.
        self.model.delete_adapter("ref")
        return trainer
