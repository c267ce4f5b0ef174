"""LoRA adapters on a model: where they go, which of them are trainable, which are on, how a stack of two is saved as one.

`prepare` puts them on; `policy` runs them; `saving` writes the result. A model holds up to two: the one under training
(TRAINED) and a frozen one, from which the trained one started (REFERENCE) or to which it adds (STACKED).
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from rayalign.config.sections import TunerConfig
from rayalign.models.family import Family
from rayalign.models.parts import PART_NAMES, Part, find_parts
from rayalign.models.source import ModelSource
from rayalign.policy.adapter_files import read_adapter
from rayalign.policy.compat import fuse_lora_linears, name_in_base, recompute_dora_magnitude, set_active_adapters

TRAINED, REFERENCE, STACKED = "default", "reference", "stacked"

TOWER_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "qkv", "query", "key", "value")
"""What attention calls its q, k and v, or the one that is all three, in transformers' vision towers."""


def trainable_parts(tuner: TunerConfig) -> tuple[Part, ...]:
    """The parts of the model that are not frozen."""
    frozen: dict[Part, bool] = {"vit": tuner.freeze_vit, "aligner": tuner.freeze_aligner, "llm": tuner.freeze_llm}
    return tuple(part for part, is_frozen in frozen.items() if not is_frozen)


def add_adapters(base: Any, source: ModelSource, tuner: TunerConfig, family: Family, *, needs_reference: bool) -> PeftModel:
    """Wraps the model with the adapter to train, and with a frozen one: STACKED, or REFERENCE where it is needed.

    Raises ValueError for targets that match nothing, for an adapter to continue from that does not fit the model whole, and for
    flags that it does not fit.
    """
    start = source.adapter
    is_new = start is None or tuner.stack_adapter
    targets = _targets(base, tuner, family) if is_new or tuner.lora_target_modules != ("DEFAULT",) else None
    lora = LoraConfig(
        r=tuner.lora_rank,
        lora_alpha=tuner.lora_alpha,  # type: ignore[arg-type]  # peft annotates int, its arithmetic takes fractions
        lora_dropout=tuner.lora_dropout,
        use_rslora=tuner.use_rslora,
        use_dora=tuner.use_dora,
        target_modules=targets,
    )
    if start is None:
        new = get_peft_model(base, fuse_lora_linears(lora), adapter_name=TRAINED)
        _recompute_magnitudes(new)
        return new
    found = read_adapter(base, start)
    name = STACKED if tuner.stack_adapter else TRAINED
    goes_on = not tuner.stack_adapter
    model = found.wrap(base, name, trainable=goes_on, fused=True, dropout=tuner.lora_dropout if goes_on else None)
    if isinstance(base.get_output_embeddings(), BaseTunerLayer):
        raise ValueError(
            f"{start}: the adapter stands on the output head, too, whose weight is read apart from its layer here, so it would "
            f"be left out. Merge it into its model first (rayalign export --model {start}), and go on from that."
        )
    if tuner.stack_adapter:
        _check_stack(model, start)
        model.add_adapter(TRAINED, fuse_lora_linears(lora))
    else:
        _check_continuation(model, start, tuner, targets)
        if needs_reference:
            found.add(model, REFERENCE)
    _set_trainable(model, tuner)
    return model


def merge_adapter(base: Any, adapter: str) -> Any:
    """The model with an adapter worked into its weights, which are rounded once. Raises ValueError for one that does not fit
    the model whole, or whose numbers are not finite."""
    model = read_adapter(base, adapter).wrap(base, TRAINED, trainable=False, fused=False)
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            _merge(layer, f"{adapter}: {name_in_base(name)}", is_dry=base.device.type == "meta")
    return model.unload()


def _merge(layer: Any, named: str, *, is_dry: bool) -> None:
    """Adds a layer's update to its weight in float32: peft would round the update, and then the sum."""
    weight = layer.get_base_layer().weight
    dtype = weight.dtype
    weight.data = weight.data.float()
    try:
        layer.merge(safe_merge=not is_dry)
    except ValueError:
        raise ValueError(f"{named} has numbers that are not finite. Export another checkpoint of its run.") from None
    weight = layer.get_base_layer().weight
    weight.data = weight.data.to(dtype)


class AdapterSwitch:
    """Which of a model's adapters are on: those of the policy under training, or, for a while, those of its reference.
    `layers` are the adapted layers, none where all weights are trained."""

    def __init__(self, model: nn.Module) -> None:
        adapters = model.peft_config if isinstance(model, PeftModel) else {}
        self.layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        self._reference = [name for name in (REFERENCE, STACKED) if name in adapters]
        self._policy = [*(name for name in (STACKED,) if name in adapters), TRAINED]
        self._activate(self._policy)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Within it, the model is the reference."""
        self._activate(self._reference)
        try:
            yield
        finally:
            self._activate(self._policy)

    def leave_out(self) -> None:
        """From now on the model is the reference."""
        self._policy = self._reference
        self._activate(self._policy)

    def _activate(self, adapters: list[str]) -> None:
        for layer in self.layers:
            set_active_adapters(layer, adapters)


def save_stack(model: PeftModel, folder: Path) -> None:
    """Writes the STACKED and the TRAINED adapter as one, whose rank is the sum of theirs: their updates add up,
    B1 A1 + B2 A2 = [B1 B2] [A1; A2]."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    pairs = {name: [_matrices(layer, a) for a in (STACKED, TRAINED) if a in layer.lora_A] for name, layer in layers.items()}
    rank = max(sum(len(a) for a, _ in pair) for pair in pairs.values())
    weights = {}
    for name, pair in pairs.items():
        a, b = torch.cat([a for a, _ in pair]), torch.cat([b for _, b in pair], dim=1)
        missing = rank - len(a)
        weights[f"{name}.lora_A.weight"] = nn.functional.pad(a, (0, 0, 0, missing)).contiguous()
        weights[f"{name}.lora_B.weight"] = nn.functional.pad(b, (0, missing)).contiguous()
    targets = [name_in_base(name) for name in layers]
    below = model.peft_config[STACKED]
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=targets,
        base_model_name_or_path=below.base_model_name_or_path,
        task_type=below.task_type,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _recompute_magnitudes(model: nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and TRAINED in layer.lora_magnitude_vector:
            recompute_dora_magnitude(layer, TRAINED)


def _matrices(layer: LoraLayer, adapter: str) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] of an adapter; B holds its scale."""
    a: Any = layer.lora_A[adapter].weight
    b: Any = layer.lora_B[adapter].weight
    return a.detach().cpu(), b.detach().mul(layer.scaling[adapter]).cpu()


def _targets(base: Any, tuner: TunerConfig, family: Family) -> list[str]:
    """The full names of the linears that get an adapter, in all trainable parts."""
    parts, modules = find_parts(base), tuner.lora_target_modules
    linears = {part: parts.linears(base, part) for part in trainable_parts(tuner)}
    empty = [PART_NAMES[part] for part, names in linears.items() if not names]
    if empty:
        raise ValueError(
            f"The model has no linear layers in its {' and '.join(empty)}, so that no adapter can go there: leave that part "
            "frozen, or use --sft_type full."
        )
    if modules != ("DEFAULT",):
        where = " and ".join(f"the {PART_NAMES[part]}" for part in linears)
        return _choose([name for names in linears.values() for name in names], modules, (), where)
    chosen = []
    for part, names in linears.items():
        # An aligner is a few linears with names of its own.
        projections = {"llm": family.attention_projections, "vit": TOWER_PROJECTIONS, "aligner": _last_words(names)}[part]
        chosen += _choose(names, modules, projections, f"the {PART_NAMES[part]}")
    return chosen


def _choose(linears: list[str], modules: tuple[str, ...], default: tuple[str, ...], where: str) -> list[str]:
    if modules == ("ALL",):
        return linears
    wanted = default if modules == ("DEFAULT",) else modules
    chosen = [name for name in linears if name.rsplit(".", 1)[-1] in wanted]
    if not chosen and len(modules) == 1:
        try:
            chosen = [name for name in linears if re.fullmatch(modules[0], name)]
        except re.error as error:
            raise ValueError(f"--lora_target_modules {modules[0]!r} is no valid regular expression: {error}.") from None
    names = _last_words(linears)
    unmatched = [module for module in modules if module not in names] if len(modules) > 1 or not chosen else []
    if unmatched:
        raise ValueError(
            f"--lora_target_modules {' '.join(unmatched)} matches no linear of {where}. Its linears: {', '.join(names)}."
        )
    return chosen


def _last_words(names: list[str]) -> tuple[str, ...]:
    return tuple(sorted({name.rsplit(".", 1)[-1] for name in names}))


def _check_stack(model: PeftModel, adapter: str) -> None:
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and not isinstance(layer.get_base_layer(), nn.Linear):
            raise ValueError(
                f"--stack_adapter true: {adapter} adapts {name.removeprefix('base_model.model.')}, which is no linear layer, "
                "and can't be saved as one with another adapter. Continue from it (leave the flag out), or merge it into its "
                "model first."
            )


def _check_continuation(model: PeftModel, adapter: str, tuner: TunerConfig, targets: list[str] | None) -> None:
    """An adapter that training continues from keeps its shape; flags that ask for another one can't be followed."""
    config: Any = model.peft_config[TRAINED]
    asked = {
        "lora_rank": config.r,
        "lora_alpha": config.lora_alpha,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
    }
    default = TunerConfig()
    for name, has in asked.items():
        wants = getattr(tuner, name)
        if wants not in (has, getattr(default, name)):
            raise ValueError(
                f"--{name} {_word(wants)}: training continues from the adapter {adapter}, which has {_word(has)}. "
                "Leave the flag out, or train a new adapter on top of it (--stack_adapter true)."
            )
    parts = find_parts(model.get_base_model())
    adapted = {name_in_base(name) for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    # The language model is trained by default, so nobody need have asked for it.
    wanted = [part for part in trainable_parts(tuner) if part != "llm"]
    missing = [part for part in wanted if not any(parts.of(name) == part for name in adapted)]
    if missing:
        flags = ", ".join(f"--freeze_{part}" for part in missing)
        raise ValueError(
            f"{flags} false: training continues from the adapter {adapter}, which has no matrices there. Turn the flag on, or "
            "train a new adapter on top of it (--stack_adapter true)."
        )
    trainable = {name for name in adapted if parts.of(name) in trainable_parts(tuner)}
    if targets is not None and set(targets) != trainable:
        raise ValueError(
            f"--lora_target_modules {' '.join(tuner.lora_target_modules)}: training continues from the adapter {adapter}, "
            "which stands on other layers. Leave the flag out, or train a new adapter on top of it (--stack_adapter true)."
        )


def _word(value: Any) -> str:
    return str(value).lower()


def _set_trainable(model: PeftModel, tuner: TunerConfig) -> None:
    """Makes the TRAINED adapter trainable in the parts that are, and nothing else; a frozen adapter has no dropout."""
    parts = find_parts(model.get_base_model())
    for name, parameter in model.named_parameters():
        trained = re.search(rf"\.lora_\w+\.{TRAINED}\b", name) is not None
        parameter.requires_grad_(trained and parts.of(name_in_base(name)) in trainable_parts(tuner))
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and STACKED in layer.lora_dropout:
            layer.lora_dropout[STACKED] = nn.Identity()
