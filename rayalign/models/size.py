"""How large a model is, told from its files' sizes, or from its config where they are not at hand; nothing is loaded."""

from pathlib import Path

import torch

from rayalign.downloads import model_files, model_folder
from rayalign.models.compat import config_settings
from rayalign.models.missing import WEIGHTS
from rayalign.models.registry import find_family, load_config
from rayalign.storage import is_url

MOST_ON_CPUS = 1e9
"""Parameters from which on a step on CPUs takes minutes: such a model is trained there only by those who ask for it."""

WEIGHT_SUFFIXES = tuple(pattern.removeprefix("*") for pattern in WEIGHTS if not pattern.endswith(".json"))


def reason_for_gpus(model: str, *, trust_remote_code: bool) -> str | None:
    """Why a model (a folder, URL or hub id) needs GPUs, as a sentence's beginning; None where CPUs will do."""
    number = _num_parameters(model, trust_remote_code=trust_remote_code)
    return f"{model} has about {number / 1e9:.1f} billion parameters" if number >= MOST_ON_CPUS else None


def _num_parameters(model: str, *, trust_remote_code: bool) -> float:
    sizes = _file_sizes(model)
    if sizes is None:
        config = load_config(model, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            skeleton = find_family(config.model_type).auto_class.from_config(config, trust_remote_code=trust_remote_code)
        return float(sum(parameter.numel() for parameter in skeleton.parameters()))
    if sum(sizes) < MOST_ON_CPUS:  # no parameter is smaller than a byte
        return 0
    settings = config_settings(model_folder(model, weights=False))
    return sum(sizes) / (4 if "float32" in str(settings.get("dtype") or settings.get("torch_dtype")) else 2)


def _file_sizes(model: str) -> list[int] | None:
    """Bytes of a folder's files of weights; None for a hub id."""
    if is_url(model):
        return [size for name, (size, _) in model_files(model).items() if name.endswith(WEIGHT_SUFFIXES)]
    if not Path(model).is_dir():
        return None
    files = [file for file in Path(model).iterdir() if file.name.endswith(WEIGHT_SUFFIXES)]
    safe = [file for file in files if file.suffix == ".safetensors"]
    return [file.stat().st_size for file in safe or files]
