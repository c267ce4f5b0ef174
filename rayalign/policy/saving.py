"""A policy to files: the adapter or the weights, and a value head beside them. `loading` reads them again."""

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rayalign.ops.value_head import save_value_head
from rayalign.policy.adapters import STACKED, TRAINED, save_stack
from rayalign.policy.policy import Policy
from rayalign.storage import is_url


def save_policy(
    policy: Policy, folder: Path, *, safe_serialization: bool = True, gathered: Mapping[str, Tensor] | None = None
) -> None:
    """Writes the trained adapter, or the full weights, in safetensors, and a value head in the format of choice. Full weights
    that are sharded are `gathered` beforehand."""
    model = policy.model
    if gathered is not None:
        model.save_pretrained(str(folder), state_dict=dict(gathered))
        model.config.dtype = policy.dtype  # not that of the weights under training
        model.config.save_pretrained(str(folder))
    elif not isinstance(model, PeftModel):
        with _in_type(model, policy.dtype):
            model.save_pretrained(str(folder))
    elif STACKED in model.peft_config:
        save_stack(model, folder)
    else:
        _save_adapter(model, folder)
    if policy.value_head is not None:
        save_value_head(policy.value_head, folder, safe_serialization=safe_serialization)


def gather_weights(policy: Policy, *, keep: bool) -> dict[str, Tensor] | None:
    """The weights of a sharded model whose own weights are trained, on the CPU in the policy's type, for one worker to save;
    None where there are none to gather. All workers call it, one or some of them to `keep` the weights; a tensor at a time is
    whole on the device."""
    if policy.sharded is None or isinstance(policy.model, PeftModel):
        return None
    gathered: dict[str, Tensor] = {}
    whole: dict[int, Tensor | None] = {}  # tied weights are one tensor under two names
    parameters = {id(parameter) for parameter in policy.model.parameters()}
    for name, tensor in policy.model.state_dict(keep_vars=True).items():
        if id(tensor) not in whole:
            full = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()
            dtype = policy.dtype if id(tensor) in parameters else tensor.dtype
            whole[id(tensor)] = full.to("cpu", dtype) if keep else None
        kept = whole[id(tensor)]
        if kept is not None:
            gathered[name] = kept
    return gathered


def _save_adapter(model: PeftModel, folder: Path) -> None:
    """Writes the TRAINED adapter. peft looks its base's config up where the adapter says that it is, and can't do so at a URL:
    it gets the copy's path for as long as it writes."""
    config: Any = model.peft_config[TRAINED]
    named = config.base_model_name_or_path
    # Without what an adapter on the embeddings stands on, which isn't trained, and may be sharded.
    save = functools.partial(model.save_pretrained, str(folder), selected_adapters=[TRAINED], save_embedding_layers=False)
    if not is_url(str(named)):
        save()
        return
    config.base_model_name_or_path = copy = model.get_base_model().name_or_path
    try:
        save()
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
