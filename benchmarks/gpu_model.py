"""What gpu.py takes its steps of: a LLaVA-NeXT of random weights on the device, pairs of random tokens and pictures, and each
side's way to compute a step of them."""

import functools
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from peft.tuners import lora
from PIL import Image
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import LlavaNextConfig, LlavaNextImageProcessorPil, LlavaNextProcessor, PreTrainedTokenizerFast

import rayalign.models
from rayalign.algorithms import DPO
from rayalign.config.sections import ModelConfig, TunerConfig
from rayalign.data.batch import assemble
from rayalign.data.sampler import StepCounts
from rayalign.data.store import EncodedPair
from rayalign.images.fetch import image_hash, open_image
from rayalign.models.family import ImageInputs, RowLayout
from rayalign.models.processors import describe_images
from rayalign.models.registry import find_family, load_config
from rayalign.models.source import ModelSource
from rayalign.policy.adapters import add_adapters
from rayalign.policy.policy import Policy
from rayalign.policy.prepare import attention_kernels

CONFIG = Path(rayalign.models.__file__).parent / "configs" / "llava1_6-mistral-7b-instruct"
BETA = 0.1
TUNER = TunerConfig(lora_target_modules=("ALL",), lora_rank=8, lora_alpha=16, lora_dropout=0.0)
ALGORITHM = DPO(beta=BETA, rpo_alpha=0.0)
PAD_ID, QUESTION_TOKENS = 0, 30


@dataclass(frozen=True)
class Shape:
    """What a model changes of the 7B one's config, and the least and most tokens of a response."""

    text: Mapping[str, int] = field(default_factory=dict)
    vision: Mapping[str, int] = field(default_factory=dict)
    response_tokens: tuple[int, int] = (60, 200)


SHAPES = {
    "7b": Shape(),
    "tiny": Shape(
        text={
            "vocab_size": 1_000,
            "hidden_size": 64,
            "intermediate_size": 176,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
        },
        vision={
            "hidden_size": 32,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 56,
        },
        response_tokens=(6, 20),
    ),
}

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


def make_config(shape: Shape, layers: int | None) -> Any:
    """The shipped config of llava1_6-mistral-7b-instruct, with a shape's sizes."""
    settings = load_config(str(CONFIG)).to_dict()
    depth = {} if layers is None else {"num_hidden_layers": layers}
    tile = shape.vision.get("image_size", settings["vision_config"]["image_size"])
    vocabulary = shape.text.get("vocab_size", settings["text_config"]["vocab_size"])
    pinpoints = [[side * tile // 336 for side in grid] for grid in settings["image_grid_pinpoints"]]
    return LlavaNextConfig.from_dict(
        settings
        | {
            "text_config": settings["text_config"] | shape.text | depth,
            "vision_config": settings["vision_config"] | shape.vision,
            "image_grid_pinpoints": pinpoints,
            "image_token_index": min(settings["image_token_index"], vocabulary - 1),
        }
    )


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
    with torch.no_grad():
        for name, parameter in adapter_of(model).items():
            parameter.normal_(0, 0.02 if ".lora_B." in name else parameter.shape[1] ** -0.5, generator=generator)
    return model


def adapter_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def make_image_processor(config: Any) -> LlavaNextImageProcessorPil:
    tile = config.vision_config.image_size
    return LlavaNextImageProcessorPil(
        size={"shortest_edge": tile},
        crop_size={"height": tile, "width": tile},
        image_grid_pinpoints=config.image_grid_pinpoints,
    )


def image_processing(config: Any) -> Callable[[Sequence[bytes], Sequence[bool]], ImageInputs]:
    """What `assemble` makes of pictures' bytes."""
    processor, family = make_image_processor(config), find_family(config.model_type)

    def process(contents: Sequence[bytes], alone: Sequence[bool]) -> ImageInputs:
        tensors = processor([open_image(content) for content in contents], return_tensors="pt")
        return describe_images(family, config, dict(tensors))

    return process


def draw_pairs(config: Any, image: tuple[float, float], responses: tuple[int, int], *, pairs: int) -> list[EncodedPair]:
    """Pairs of random token ids, each with a picture of its own; heights differ a little, as pictures' do."""
    generator = np.random.default_rng(0)
    process = image_processing(config)
    tile, patch = config.vision_config.image_size, config.vision_config.patch_size

    def text(tokens: int) -> list[int]:
        ids: list[int] = generator.integers(3, config.image_token_id, tokens).tolist()
        return ids

    drawn = []
    for i in range(pairs):
        height, width = (round(tile * side) for side in image)
        pixels = generator.integers(0, 256, (height - patch * (i % 2), width, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        content = file.getvalue()
        (features,) = process([content], [True]).lengths
        prompt = [1, *text(QUESTION_TOKENS // 3), *[config.image_token_id] * features, *text(QUESTION_TOKENS)]
        chosen, rejected = (text(int(generator.integers(responses[0], responses[1] + 1))) for _ in range(2))
        drawn.append(EncodedPair(str(i), prompt, chosen, rejected, [content], [image_hash(content)]))
    return drawn


# The two sides


class Bench:
    """A model on a device, and the ways to compute the step of some pairs with it. Only one way can be entered at a time."""

    def __init__(self, model: Any, config: Any, dtype: torch.dtype, device: torch.device, folder: Path) -> None:
        self.model, self.config, self.dtype, self.device = model, config, dtype, device
        self.base = model.get_base_model()
        self.family = find_family(config.model_type)
        self._folder = folder
        self._adapted = [(module, type(module)) for module in model.modules() if isinstance(module, lora.Linear)]

    def take(self, pairs: Sequence[EncodedPair]) -> None:
        """Puts a batch of these pairs on the device, for both sides, and the reference's log-probabilities of it."""
        self.pairs = pairs
        tokens = (sum(len(ids) for ids in side) for side in ([p.chosen_ids for p in pairs], [p.rejected_ids for p in pairs]))
        self.counts = StepCounts(len(pairs), 2 * len(pairs), *tokens)
        layout = RowLayout(pad_token_id=PAD_ID, image_token_id=self.config.image_token_id)
        self.on_host = assemble(pairs, layout=layout, process_images=image_processing(self.config))
        self.trl_batch = {name: value.to(self.device) for name, value in trl_batch(pairs, self.on_host.image_inputs).items()}
        batch = self.on_host.to(self.device)
        self.enter(Way("rayalign", ModelConfig().attn_implementation, checkpointing=False))
        with torch.no_grad(), self.policy.reference_weights():
            logps = self.policy.token_logps(batch, self.policy.image_features(batch))
        self.batches = {"computed": batch, "stored": replace(batch, reference_logps=logps)}

    def enter(self, way: Way) -> None:
        """Brings the model into the state that a way trains it in."""
        self.way = way
        self.let_peft_compute(way.side == "trl")
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
                loss = ALGORITHM.loss(self.policy, self.batches[self.way.reference], self.counts).loss
        loss.backward()
        return loss.detach()

    @functools.cached_property
    def trainer(self) -> Any:
        """TRL's trainer of this very model."""
        from datasets import Dataset  # type: ignore[import-untyped]
        from trl.trainer.dpo_config import DPOConfig
        from trl.trainer.dpo_trainer import DPOTrainer

        settings = DPOConfig(
            output_dir=str(self._folder),
            beta=BETA,
            max_length=None,
            gradient_checkpointing=False,  # `enter` turns it on and off
            bf16=False,  # `step` enters autocast, which Trainer would wrap the model in for good
            use_cpu=self.device.type == "cpu",
            report_to=[],
            save_strategy="no",
        )
        turn = {"prompt": [{"role": "user", "content": "a"}]}
        turn |= {side: [{"role": "assistant", "content": "a"}] for side in ("chosen", "rejected")}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel({"<pad>": PAD_ID, "a": 1})), pad_token="<pad>"
        )
        trainer = DPOTrainer(
            model=self.model,
            args=settings,
            # It wants data and a processor, which are not used: batches come ready made.
            train_dataset=Dataset.from_list([{"images": [Image.new("RGB", (8, 8))], **turn}]),
            processing_class=LlavaNextProcessor(make_image_processor(self.config), tokenizer),
        )
        # It takes the adapter for one to continue from and makes a copy of it the reference; ours is new, and its reference the
        # model without it.
        self.model.delete_adapter("ref")
        return trainer


def trl_batch(pairs: Sequence[EncodedPair], images: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """TRL's rows, by its collator for token ids; pictures stand twice, as its collator for pictures has them."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    examples = [{"prompt_ids": p.prompt_ids, "chosen_ids": p.chosen_ids, "rejected_ids": p.rejected_ids} for p in pairs]
    twice = {name: value.repeat(2, *[1] * (value.ndim - 1)) for name, value in images.items()}
    batch: dict[str, Tensor] = DataCollatorForPreference(pad_token_id=PAD_ID)(examples) | twice
    return batch
