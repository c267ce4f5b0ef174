"""Where a model's weights come from: what --model, --model_type and --adapter mean."""

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayalign.config.sections import ModelConfig
from rayalign.downloads import local_where_it_is, model_files, model_folder
from rayalign.models.missing import no_folder, require_config, require_weights, without, without_remote
from rayalign.storage import Store, is_url

ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class ModelSource:
    """Where weights come from: `base` is a folder, URL or hub id, `adapter` the folder or URL of one to continue from."""

    base: str
    adapter: str | None = None

    def here(self) -> "ModelSource":
        """The same on this machine: folders of URLs are copied to it, once for all of its processes and runs."""
        adapter = None if self.adapter is None else model_folder(self.adapter, weights=True)
        return ModelSource(model_folder(self.base, weights=True), adapter)


def resolve_model(config: ModelConfig, registered: Mapping[str, str]) -> ModelSource:
    """Finds out what --model, --model_type and --adapter mean; an adapter's folder brings its base model along.

    `registered` maps the names of --model_type to hub ids. Raises ValueError where there is no such model or adapter, for an
    adapter of another model, and for one that is more than LoRA.
    """
    if config.model and config.model_type:
        raise ValueError(f"--model {config.model} and --model_type {config.model_type} both name the model: give one of them.")
    if config.model_type:
        source = ModelSource(_hub_id_of(config.model_type, registered))
    elif config.model:
        source = _source_of(config.model)
    elif config.adapter:
        return _adapter_source(config.adapter)
    else:
        raise ValueError("The model is named by an empty text: give a folder or a hub id.")
    if config.adapter is None:
        return source
    if source.adapter:
        raise ValueError(
            f"--model {config.model} is an adapter, too, and --adapter {config.adapter} another: give one of them."
        )
    of_adapter = _adapter_source(config.adapter)
    if _whole_path(of_adapter.base) != _whole_path(source.base):
        raise ValueError(
            f"--adapter {config.adapter}: was made for the model {of_adapter.base}, not for {source.base}. Give that model, "
            f"or, where both hold the same weights, correct base_model_name_or_path in its {ADAPTER_CONFIG}."
        )
    return ModelSource(source.base, of_adapter.adapter)


def require_model(config: ModelConfig, registered: Mapping[str, str]) -> ModelSource:
    """`resolve_model`, with the base model's files looked for: in its folder, in the hub's cache, on the hub.

    Raises ValueError with a sentence that says what was tried and what helps. A run calls it before it takes any resource.
    """
    source = require_description(config, registered)
    require_weights(source.base, _named(config, source))
    return source


def require_description(config: ModelConfig, registered: Mapping[str, str]) -> ModelSource:
    """`require_model` where the weights are not needed: only the base model's config.json must be there."""
    source = resolve_model(config, registered)
    require_config(source.base, _named(config, source), registered.values())
    return source


def _named(config: ModelConfig, source: ModelSource) -> str:
    """How a sentence about the base model begins: with the flag that names it."""
    if config.model_type:
        return f"--model_type {config.model_type} ({source.base})"
    if config.model and not (source.adapter and not config.adapter):
        return f"--model {config.model}"
    return f"{source.adapter} is an adapter of the model {source.base}"


def _source_of(model: str) -> ModelSource:
    place = local_where_it_is(model)
    if is_url(place):
        return _remote_source("--model", place)
    folder = Path(place).expanduser()
    if not folder.is_dir():
        if folder.exists() or place.startswith((".", "/", "~")) or place.count("/") > 1:
            raise ValueError(f"--model {model}: {no_folder(place)}")
        return ModelSource(model)
    folder = folder.resolve()
    if (folder / ADAPTER_CONFIG).exists():
        return ModelSource(_base_of(folder, str(folder)), adapter=str(folder))
    if not (folder / "config.json").exists():
        raise ValueError(f"--model {model}: {without(folder, 'config.json')}")
    return ModelSource(str(folder))


def _remote_source(flag: str, url: str, *, wanted: str = "config.json") -> ModelSource:
    """What the folder behind a URL is: an adapter with its base, or, where a model is wanted, that."""
    try:
        files = model_files(url)
    except ValueError as error:
        raise ValueError(f"{flag} {error}") from None
    url = Store.at(url).location
    if ADAPTER_CONFIG in files:
        return ModelSource(_base_of(Path(model_folder(url, weights=False)), url), adapter=url)
    if wanted not in files:
        raise ValueError(f"{flag} {url}: {without_remote(url, wanted)}")
    return ModelSource(url)


def _adapter_source(adapter: str) -> ModelSource:
    place = local_where_it_is(adapter)
    if is_url(place):
        return _remote_source("--adapter", place, wanted=ADAPTER_CONFIG)
    folder = Path(place).expanduser()
    if not folder.is_dir():
        raise ValueError(f"--adapter {adapter}: {no_folder(place)}")
    if not (folder / ADAPTER_CONFIG).exists():
        raise ValueError(f"--adapter {adapter}: {without(folder, ADAPTER_CONFIG)}")
    return ModelSource(_base_of(folder, str(folder)), adapter=str(folder.resolve()))


def read_adapter_config(folder: Path, named: str | None = None) -> dict[str, Any]:
    """The config of a LoRA adapter, which errors call as it was `named`. Raises ValueError for one that is damaged, and for
    what is more than LoRA or none."""
    named = named or str(folder)
    file = f"{named}/{ADAPTER_CONFIG}"
    try:
        config: dict[str, Any] = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: is damaged or cut off ({error}). Copy it again from where the adapter was made.") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file}: holds no settings of an adapter. Copy it again from where the adapter was made.")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(
            f"{named}: is an adapter of the type {kind}, and only LoRA is supported. Merge it into its model first."
        )
    # Whatever an adapter brings beside its matrices stays on when the adapter is turned off, and would change the reference.
    extras = [name for name in ("modules_to_save", "trainable_token_indices") if config.get(name)]
    extras += ["bias"] if config.get("bias", "none") != "none" else []
    if extras:
        raise ValueError(
            f"{named}: is an adapter with {' and '.join(extras)} beside LoRA's matrices, which can't be turned off for the "
            "reference. Merge it into its model first."
        )
    return config


def _base_of(folder: Path, named: str) -> str:
    """The base model that a LoRA adapter names."""
    base = read_adapter_config(folder, named).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"{named}/{ADAPTER_CONFIG}: names no base model. Write the model's folder or hub id there, as "
            "base_model_name_or_path."
        )
    return Store.at(base).location if is_url(base) else base


def _whole_path(model: str) -> str:
    folder = Path(local_where_it_is(model)).expanduser()
    return str(folder.resolve()) if folder.is_dir() else model


def _hub_id_of(name: str, registered: Mapping[str, str]) -> str:
    if name not in registered:
        near = difflib.get_close_matches(name, registered, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Registered: {', '.join(sorted(registered))}."
        raise ValueError(f"--model_type {name}: no registered model has this name. {hint}")
    return registered[name]
