"""An engine from a model's files, and from those of the adapters beside it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rayalign.config.sections import ModelConfig
from rayalign.data.encode import Encoder
from rayalign.data.encoder_spec import EncoderSpec
from rayalign.downloads import model_folder
from rayalign.models.registry import FAMILIES, find_family, load_config
from rayalign.models.source import ModelSource
from rayalign.ops.value_head import find_value_head
from rayalign.policy.adapter_files import read_adapter
from rayalign.policy.compat import without_peft_warnings
from rayalign.policy.forward_check import check_forward
from rayalign.policy.policy import Policy
from rayalign.policy.prepare import attention_kernels
from rayalign.policy.weights import load_weights
from rayalign.serving.engine import Engine


def load_engine(
    source: ModelSource,
    name: str,
    adapters: Mapping[str, str],
    *,
    dtype: torch.dtype,
    device: torch.device,
    max_length: int,
    max_pixels: int | None,
    max_batch_size: int,
) -> Engine:
    """Loads the model of `source` (with its adapter, where it has one) as `name`, and beside it the adapters by their names.

    Raises ValueError for weights and adapters that are not whole, or do not fit, and for models that the forward of training
    gets wrong.
    """
    source = source.here()
    family = find_family(load_config(source.base).model_type)
    kernels = attention_kernels(family, ModelConfig())
    base = load_weights(family.auto_class, source.base, needs_output_head=True, dtype=dtype, attn_implementation=kernels)
    folders = {name: source.adapter, **adapters}
    # peft takes no dots in its names of adapters, and ours may have any.
    internal = {name: None if folder is None else f"adapter{i}" for i, (name, folder) in enumerate(folders.items())}
    model = _with_adapters(
        base.to(device), {own: folder for name, folder in folders.items() if folder and (own := internal[name])}
    )
    policy = Policy(model, family)
    policy.model.eval()
    spec = EncoderSpec(source.base, "chosen", max_length=max_length, max_pixels=max_pixels)
    if family.model_type not in FAMILIES:
        check_forward(policy, spec)
    return Engine(policy, Encoder(spec), internal, max_batch_size=max_batch_size)


def _with_adapters(base: Any, folders: Mapping[str, str]) -> Any:
    """The model with adapters beside each other, by peft's names. All of them are read before the first one is put on, which
    gives the model's layers other names."""
    here = {name: model_folder(folder, weights=True) for name, folder in folders.items()}
    for name, folder in here.items():
        if find_value_head(Path(folder)) is not None:
            raise ValueError(f"{folders[name]}: is a reward model, which writes no responses.")
    found = {name: read_adapter(base, folder) for name, folder in here.items()}
    model = base
    with without_peft_warnings():
        for number, (name, adapter) in enumerate(found.items()):
            if number == 0:
                model = adapter.wrap(base, name, trainable=False, fused=False)
            else:
                adapter.add(model, name)
    return model
