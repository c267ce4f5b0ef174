"""What flags need of the adapter that training starts from and of the machine, checked before anything is loaded.

`config` refuses flags that contradict each other; `driver` calls these on the driver, `loading` again in each worker.
"""

import importlib
import importlib.util
from pathlib import Path

from rayalign.config.sections import ModelConfig, OptimizerConfig, TunerConfig
from rayalign.downloads import model_folder
from rayalign.models.source import ModelSource, read_adapter_config


def check_tuner(tuner: TunerConfig, source: ModelSource, *, on_gpu: bool) -> None:
    """Raises ValueError for a tuner that can't work with this source, or on workers with or without GPUs."""
    if tuner.stack_adapter:
        _check_stack(source)
    if tuner.quant_bits is not None:
        _check_bitsandbytes("--quant_bits 4", on_gpu=on_gpu)


def check_optimizer(optimizer: OptimizerConfig, *, on_gpu: bool) -> None:
    """Raises ValueError for an optimizer that workers with or without GPUs lack the library for."""
    if optimizer.optim == "adamw_8bit":
        _check_bitsandbytes("--optim adamw_8bit", on_gpu=on_gpu)


def check_attention(model: ModelConfig, *, on_gpu: bool) -> None:
    """Raises ValueError for attention kernels that workers with or without GPUs can't train with."""
    if model.attn_implementation == "flex_attention" and not on_gpu:
        raise ValueError(
            "--attn_implementation flex_attention on workers without a GPU: there it has no backward pass. Use sdpa, or give "
            "each worker a GPU."
        )


def _check_stack(source: ModelSource) -> None:
    if source.adapter is None:
        raise ValueError(
            "--stack_adapter true: there is no adapter to stand on. Pass its folder with --adapter, or leave the flag out."
        )
    config = read_adapter_config(Path(model_folder(source.adapter, weights=False)), source.adapter)
    for extra in ("use_dora", "lora_bias"):
        if config.get(extra):
            raise ValueError(
                f"--stack_adapter true: {source.adapter} has {extra}, which can't be saved as one with another adapter. "
                "Continue from it (leave the flag out), or merge it into its model first."
            )


def _check_bitsandbytes(asked: str, *, on_gpu: bool) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f'{asked} needs bitsandbytes, which is not installed: pip install "rayalign[qlora]".')
    if on_gpu:
        return
    bitsandbytes = importlib.import_module("bitsandbytes")
    if "cpu" not in getattr(bitsandbytes, "supported_torch_devices", ()):
        raise ValueError(
            f"{asked} on workers without a GPU: the installed bitsandbytes {bitsandbytes.__version__} works on GPUs only. "
            f'Update it (pip install --upgrade "rayalign[qlora]"), give each worker a GPU, or leave {asked.split()[0]} out.'
        )
