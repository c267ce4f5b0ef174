"""An adapter's folder put on a model: old names mapped, and nothing of it left out.

`adapters` calls `read_adapter` before it wraps the model and lets the result load itself; what does not fit whole is refused.
"""

import copy
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rayalign.models.parts import find_parts
from rayalign.models.source import read_adapter_config
from rayalign.policy.compat import fuse_lora_linears, is_targeted, pattern_of
from rayalign.policy.weights import count, listed, listed_shapes

logger = logging.getLogger(__name__)

SAFETENSORS, BIN = "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
CONTAINERS = frozenset({"model", "language_model", "vision_model"})
"""The words of modules that only hold others, in whose order and number transformers' versions differ."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter's folder, read for one model: its config and its tensors' shapes under the model's own names.

    `renames`: what names in the file begin with, and what the model's begin with there.
    """

    folder: str
    file: Path
    config: LoraConfig
    shapes: Mapping[str, tuple[int, ...]]
    renames: Mapping[str, str]

    def wrap(self, base: Any, name: str, *, trainable: bool, fused: bool, dropout: float | None = None) -> PeftModel:
        """The model with this adapter on, with another rate of dropout where one is given. Raises ValueError where they do not
        fit each other."""
        modules = {module for module, _ in base.named_modules()}
        strange = {key for key in self.shapes if ".lora_" in key and _module_of(key) not in modules}
        if strange and base.device.type != "meta":
            self._refuse(base, unexpected=strange)
        config = copy.deepcopy(self.config)
        if dropout is not None:
            config.lora_dropout = dropout
        with _peft_errors(self.folder, base), _without_key_warnings():
            model = PeftModel.from_pretrained(
                base,
                self.folder,
                adapter_name=name,
                is_trainable=trainable,
                config=fuse_lora_linears(config) if fused else config,
                key_mapping=self._key_mapping(),
                ignore_mismatched_sizes=True,  # what does not fit is refused below, with all names at once
            )
        self._check(model, name)
        return model

    def add(self, model: PeftModel, name: str) -> None:
        """Puts a frozen copy of the adapter beside those that the model has."""
        config = copy.deepcopy(self.config)
        config.inference_mode = True
        with _peft_errors(self.folder, model.get_base_model()), _without_key_warnings():
            model.add_adapter(name, config)
            model.load_adapter(
                self.folder, name, is_trainable=False, key_mapping=self._key_mapping(), ignore_mismatched_sizes=True
            )
        self._check(model, name)

    def _key_mapping(self) -> dict[str, str]:
        return {_pattern(old): new for old, new in self.renames.items()}

    def _check(self, model: PeftModel, name: str) -> None:
        base: Any = model.get_base_model()
        if base.device.type == "meta":  # the estimate's, which may have fewer layers, and no weights to load
            return
        state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        needed = {key: tuple(value.shape) for key, value in state.items()}
        both = needed.keys() & self.shapes.keys()
        self._refuse(
            base,
            missing=needed.keys() - both,
            unexpected=self.shapes.keys() - both,
            mismatched={key: (self.shapes[key], needed[key]) for key in both if self.shapes[key] != needed[key]},
        )

    def _refuse(
        self,
        base: Any,
        *,
        missing: set[str] | frozenset[str] = frozenset(),
        unexpected: set[str] | frozenset[str] = frozenset(),
        mismatched: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] | None = None,
    ) -> None:
        """Raises ValueError where there is anything to name."""
        faults = []
        if missing:
            faults.append(f"it lacks {count(missing, 'tensor')} that its config asks for: {listed(missing)}")
        if unexpected:
            faults.append(f"it holds {count(unexpected, 'tensor')} that the model has no place for: {listed(unexpected)}")
        if mismatched:
            faults.append(f"{count(mismatched, 'tensor')} of another shape: {listed_shapes(mismatched)}")
        if faults:
            raise ValueError(
                f"{self.file}: does not fit the model {base.name_or_path}; {'; '.join(faults)}. An adapter is loaded whole or "
                "not at all: give the model that it was trained on, or copy the adapter's folder again from where it was made."
            )


def read_adapter(base: Any, folder: str) -> Adapter:
    """Reads an adapter's config and the shapes of its tensors, and maps names of older versions of transformers to those that
    the model has, which is said once in the log.

    Raises ValueError for files that are missing or damaged, and for what is no plain LoRA.
    """
    read_adapter_config(Path(folder))
    try:
        config: Any = PeftConfig.from_pretrained(folder)
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{folder}/adapter_config.json: peft can't read it: {error}. Copy it again.") from None
    file, shapes = _read_shapes(Path(folder))
    copies = _copies(base, file, {key for key in shapes if ".lora_" not in key})
    shapes = {key: shape for key, shape in shapes.items() if key not in copies}
    renames = _renames(base, {_module_of(key) for key in shapes})
    if renames:
        shapes = {PREFIX + _rename(key.removeprefix(PREFIX), renames): shape for key, shape in shapes.items()}
        config = _under_new_names(base, config, renames)
        if not dist.is_initialized() or dist.get_rank() == 0:
            said = ", ".join(f"{old} is now {new}" for old, new in renames.items())
            logger.warning("%s: has module names of an older version of transformers; mapped (%s)", file, said)
    return Adapter(folder, file, config, shapes, renames)


def _read_shapes(folder: Path) -> tuple[Path, dict[str, tuple[int, ...]]]:
    file = next((folder / name for name in (SAFETENSORS, BIN) if (folder / name).is_file()), None)
    if file is None:
        raise ValueError(
            f"{folder}: has neither {SAFETENSORS} nor {BIN}, so there are no matrices to load. Copy the adapter's whole folder "
            "again from where it was made."
        )
    try:
        if file.name == SAFETENSORS:
            with safe_open(file, framework="pt") as tensors:
                return file, {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118  # no dict
        loaded = torch.load(file, weights_only=True, map_location="cpu")
    except SafetensorError as error:
        raise ValueError(_damaged(file, error)) from None
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001  # a pickle of other content may raise anything
        raise ValueError(_damaged(file, error)) from None
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ValueError(_damaged(file, "it holds something else than named tensors"))
    return file, {key: tuple(value.shape) for key, value in loaded.items()}


def _copies(base: Any, file: Path, keys: set[str]) -> set[str]:
    """Those of the keys that are the model's own weights, unchanged: peft saves the embeddings beside an adapter that stands on
    them."""
    if not keys or file.name != SAFETENSORS or base.device.type == "meta":
        return set()
    own = dict(base.named_parameters())
    same = set()
    with safe_open(file, framework="pt") as tensors:
        for key in keys:
            weight = own.get(key.removeprefix(PREFIX).replace(".base_layer.", "."))
            if weight is not None and torch.equal(tensors.get_tensor(key).to(weight), weight):
                same.add(key)
    return same


def _damaged(file: Path, why: object) -> str:
    return f"{file}: is damaged or cut off ({str(why).splitlines()[0]}). Copy it again from where it was made."


def _module_of(key: str) -> str:
    """The module that a tensor of an adapter's file belongs to."""
    return key.removeprefix(PREFIX).split(".lora_", 1)[0]


def _renames(base: Any, wanted: set[str]) -> dict[str, str]:
    """For modules that the model lacks: the prefixes that lead from their names to those of the model's, where each has one
    counterpart alone, that differs in CONTAINERS only. Language models have kept their names."""
    modules = {name for name, _ in base.named_modules()}
    unknown = wanted - modules
    if not unknown or find_parts(base).tower is None:
        return {}
    counterparts: dict[tuple[str, ...], list[str]] = {}
    for name, module in base.named_modules():
        if not any(True for _ in module.children()):
            counterparts.setdefault(_without_containers(name), []).append(name)
    found = {old: counterparts.get(_without_containers(old), []) for old in unknown}
    pairs = {old: new[0] for old, new in found.items() if len(new) == 1}
    if len(set(pairs.values())) < len(pairs) or set(pairs.values()) & wanted:
        return {}
    renames = dict(_prefixes(old, new) for old, new in sorted(pairs.items()))
    return renames if all(_rename(old, renames) == new for old, new in pairs.items()) else {}


def _without_containers(name: str) -> tuple[str, ...]:
    return tuple(word for word in name.split(".") if word not in CONTAINERS)


def _prefixes(old: str, new: str) -> tuple[str, str]:
    """What two names that end alike begin with, up to the first word that they share: `model.layers` and
    `model.language_model.layers`."""
    olds, news = old.split("."), new.split(".")
    pairs = list(zip(reversed(olds), reversed(news), strict=False))
    alike = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    return ".".join(olds[: len(olds) - alike + 1]), ".".join(news[: len(news) - alike + 1])


def _rename(name: str, renames: Mapping[str, str]) -> str:
    for old, new in renames.items():
        changed, times = re.subn(_pattern(old), new, name)
        if times:
            return changed
    return name


def _pattern(prefix: str) -> str:
    """As peft's `key_mapping` takes it."""
    return rf"^{re.escape(prefix)}(?=\.|$)"


def _under_new_names(base: Any, config: Any, renames: Mapping[str, str]) -> Any:
    """The config that names the same layers, with the same ranks and scales, as the given one did under their old names."""
    config = copy.deepcopy(config)
    back = {new: old for old, new in renames.items()}
    leaves = [name for name, module in base.named_modules() if next(module.children(), None) is None]
    old_names = {name: _rename(name, back) for name in leaves}
    targets = {name: old for name, old in old_names.items() if is_targeted(config, old)}
    if config.target_modules == "all-linear":
        targets = old_names
    else:
        config.target_modules = set(targets)
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    for patterns in ("rank_pattern", "alpha_pattern"):
        values = getattr(config, patterns) or {}
        keys = {name: pattern_of(list(values), old) for name, old in targets.items()}
        setattr(config, patterns, {re.escape(name): values[key] for name, key in keys.items() if key in values})
    return config


@contextmanager
def _peft_errors(folder: str, base: Any) -> Iterator[None]:
    """Says whose fault it is where peft can't make the layers that an adapter's config asks for."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{folder}/adapter_config.json: can't be followed on the model {base.name_or_path}: {error} Give the model that "
            "the adapter was trained on, or copy the adapter's folder again from where it was made."
        ) from error


@contextmanager
def _without_key_warnings() -> Iterator[None]:
    """Within it, peft does not warn about what `Adapter._check` refuses."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found missing adapter keys", category=UserWarning)
        warnings.filterwarnings("ignore", message="Some weights of .* were not initialized", category=UserWarning)
        yield
