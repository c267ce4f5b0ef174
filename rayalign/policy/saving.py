"""A policy to files: the adapter or the weights, and a value head beside them. `loading` reads them again."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from rayalign.ops.value_head import save_value_head
from rayalign.policy.adapters import STACKED, TRAINED, save_stack
from rayalign.policy.policy import Policy
from rayalign.storage import is_url


def save_policy(policy: Policy, folder: Path, *, safe_serialization: bool = True) -> None:
    """Writes the trained adapter, or the full weights, in safetensors, and a value head in the format of choice."""
    model = policy.model
    if not isinstance(model, PeftModel):
        with _in_type(model, policy.dtype):
            model.save_pretrained(str(folder))
    elif STACKED in model.peft_config:
        save_stack(model, folder)
    else:
        _save_adapter(model, folder)
    if policy.value_head is not None:
        save_value_head(policy.value_head, folder, safe_serialization=safe_serialization)


def _save_adapter(model: PeftModel, folder: Path) -> None:
    """Writes the TRAINED adapter. peft looks its base's config up where the adapter says that it is, and can't do so at a URL:
    it gets the copy's path for as long as it writes."""
    config: Any = model.peft_config[TRAINED]
    named = config.base_model_name_or_path
    if not is_url(str(named)):
        model.save_pretrained(str(folder), selected_adapters=[TRAINED])
        return
    config.base_model_name_or_path = copy = model.get_base_model().name_or_path
    try:
        model.save_pretrained(str(folder), selected_adapters=[TRAINED])
    finally:
        config.base_model_name_or_path = named
    for file in folder.glob("*.*"):
        if file.suffix in (".json", ".md"):
            file.write_text(file.read_text(encoding="utf-8").replace(str(copy), named), encoding="utf-8")


@contextmanager
def _in_type(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Within it, the model's weights have this type; then they are what they were, to the bit."""
    others = [(parameter, parameter.data) for parameter in model.parameters() if parameter.dtype != dtype]
    try:
        for parameter, data in others:
            parameter.data = data.to(dtype)
        yield
    finally:
        for parameter, data in others:
            parameter.data = data
