"""Where a model's weights come from: what --model and --model_type mean."""

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rayalign.config import ModelConfig


@dataclass(frozen=True)
class ModelSource:
    """Where weights come from: `base` is a folder or hub id, `adapter` the folder of an adapter to continue from."""

    base: str
    adapter: str | None = None


def resolve_model(config: ModelConfig, registered: Mapping[str, str]) -> ModelSource:
    """Finds out what --model or --model_type means; an adapter's folder brings its base model along.

    `registered` maps the names of --model_type to hub ids. Raises ValueError where there is no such model.
    """
    if config.model and config.model_type:
        raise ValueError(f"--model {config.model} and --model_type {config.model_type} both name the model: give one of them.")
    if config.model_type:
        return ModelSource(_hub_id_of(config.model_type, registered))
    if not config.model:
        raise ValueError("No model given: pass --model FOLDER_OR_HUB_ID, or --model_type with a registered name.")
    folder = Path(config.model).expanduser()
    if not folder.is_dir():
        if config.model.startswith((".", "/", "~")):
            raise ValueError(f"--model {config.model}: there is no such folder.")
        return ModelSource(config.model)
    folder = folder.resolve()
    if (folder / "adapter_config.json").exists():
        base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        return ModelSource(base, adapter=str(folder))
    if not (folder / "config.json").exists():
        raise ValueError(
            f"--model {config.model}: the folder has neither config.json (a model) nor adapter_config.json (an adapter)."
        )
    return ModelSource(str(folder))


def _hub_id_of(name: str, registered: Mapping[str, str]) -> str:
    if name not in registered:
        near = difflib.get_close_matches(name, registered, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Registered: {', '.join(sorted(registered))}."
        raise ValueError(f"--model_type {name}: no registered model has this name. {hint}")
    return registered[name]
