"""Private and undocumented names of peft, transformers and torch, each behind one small function.

Each says where the name is, in which version it was read, and when the function can go. tests/policy/test_compat.py fails when
one of them changes its meaning.
"""

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AttentionMaskInterface, BitsAndBytesConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.quantizers.auto import AutoHfQuantizer

from rayalign.ops.attention import SHARED_PREFIX, shared_prefix_attention
from rayalign.ops.lora_linear import fused_or_none
from rayalign.ops.rows import RowLengths

# peft


def set_active_adapters(layer: BaseTunerLayer, adapters: Sequence[str]) -> None:
    """Chooses the adapters that a layer adds up; none: the frozen layer alone.

    peft's own switches (`set_adapter`, `disable_adapter`) also change requires_grad, which a step that is under way relies on.
    https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/tuners_utils.py (`BaseTunerLayer._active_adapter`), 0.21.2.
    Can go when a public switch leaves requires_grad alone.
    """
    layer._active_adapter = list(adapters)


def name_in_base(name: str) -> str:
    """The name that a module or parameter of a `PeftModel` has in the model below it.

    https://github.com/huggingface/peft/blob/v0.21.2/src/peft/peft_model.py (`PeftModel.base_model` is a `LoraModel`, whose
    `model` is ours), 0.21.2. Can go when peft tells these names itself.
    """
    return name.removeprefix("base_model.model.")


def fuse_lora_linears(config: LoraConfig) -> LoraConfig:
    """The config, by which peft puts `FusedLoraLinear` on plain linears. Saved configs do not mention it.

    https://huggingface.co/docs/peft/developer_guides/custom_models (`LoraConfig._register_custom_module`, said there to be
    experimental), 0.21.2. It finds layers by isinstance, and bitsandbytes' are linears, too: so it gets a function in place of
    a class, whose None means that peft goes on looking. Can go when peft's own layer is as fast.
    """
    config._register_custom_module({nn.Linear: fused_or_none})  # type: ignore[dict-item]  # a function will do
    return config


def recompute_dora_magnitude(layer: LoraLayer, adapter: str) -> None:
    """Computes the first magnitude of a DoRA adapter from the weights as they are now, in float32.

    https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lora/dora.py (`DoraLinearLayer.update_layer`), 0.21.2: when
    it makes the adapter, it computes the magnitude in the type of the weights, whose rounding would make a new adapter change
    the model. Can go when peft computes it in float32.
    """
    magnitude: Any = layer.lora_magnitude_vector[adapter]
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    magnitude.update_layer(base_layer=layer.get_base_layer(), lora_A=a, lora_B=b, scaling=layer.scaling[adapter])


def is_targeted(config: LoraConfig, name: str) -> bool:
    """Whether a config asks for an adapter on a module of this name.

    https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/tuners_utils.py (`check_target_module_exists`), 0.21.2. Can
    go when adapters with names of before transformers 4.52 are no more, or peft maps their names itself.
    """
    return bool(check_target_module_exists(config, name))


def pattern_of(patterns: Sequence[str], name: str) -> str:
    """The one of a config's patterns that is for a module of this name; the name itself where there is none.

    https://github.com/huggingface/peft/blob/v0.21.2/src/peft/utils/other.py (`get_pattern_key`), 0.21.2. Can go with
    `is_targeted`.
    """
    return get_pattern_key(patterns, name)


@contextmanager
def without_peft_warnings() -> Iterator[None]:
    """Within it, peft's warnings about what is meant are left out.

    That it asks transformers for `is_gradient_checkpointing`, a name on its way out:
    https://github.com/huggingface/peft/blob/v0.21.2/src/peft/peft_model.py, 0.21.2. Can go when it asks for
    `is_activation_checkpointing`. That an adapter's weights are not copied to the meta device, where only their shapes are
    wanted: torch 2.13 (`Module.load_state_dict`). Can go when peft makes an adapter from its config alone.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter", category=UserWarning)
        yield


# transformers


def attention_kernel(decoder: Any) -> str:
    """The name of a language model's attention kernel.

    https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/configuration_utils.py
    (`PreTrainedConfig._attn_implementation`), 5.23.0: `set_attn_implementation` sets it, and no public name reads it. Can go
    when one does.
    """
    name: str = decoder.config._attn_implementation
    return name


def register_shared_prefix() -> None:
    """Makes transformers know `shared_prefix_attention` by the name SHARED_PREFIX. To do it again changes nothing.

    https://huggingface.co/docs/transformers/attention_interface (both registers are public; `sdpa_mask` and
    `sdpa_attention_forward` are not documented), 5.23.0. What a model makes of a plain row by itself stays what it is with
    transformers' own. Can go when a public function calls the kernel of a given name.
    """
    AttentionInterface.register(SHARED_PREFIX, shared_prefix_kernel)
    AttentionMaskInterface.register(SHARED_PREFIX, sdpa_mask)


def shared_prefix_kernel(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    row_lengths: RowLengths | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """`shared_prefix_attention` as transformers calls a kernel; without `row_lengths` it is transformers' own `sdpa`."""
    if row_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    assert attention_mask is not None

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return sdpa_attention_forward(module, query, key, value, mask, is_causal=True, **options)[0]

    return shared_prefix_attention(attend, query, key, value, attention_mask, row_lengths), None


def image_arguments(base: Any) -> set[str]:
    """The names of the image inputs that a model's `get_image_features` takes.

    The outer model's method hands some of what the inner one takes on without naming it, so the inner one is asked.
    https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/models/qwen2_vl/modeling_qwen2_vl.py, 5.23.0. Can
    go when the outer methods name their arguments, or take and leave any.
    """
    return set(inspect.signature(base.model.get_image_features).parameters)


def quantise_skeleton(model: Any, quantisation: BitsAndBytesConfig) -> None:
    """Gives a model on the meta device the layers, and the marks, that transformers gives one that it loads in fewer bits.

    https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/quantizers/base.py (`HfQuantizer`) and what
    `from_pretrained` does with it in modeling_utils.py, 5.23.0. Can go when `from_config` takes a quantization_config.
    """
    quantiser: Any = AutoHfQuantizer.from_config(quantisation, pre_quantized=False)
    quantiser.preprocess_model(model=model, device_map={"": "meta"})
    model.hf_quantizer = quantiser
    quantiser.postprocess_model(model)


def keep_weight_names(model: Any, loaded: Any) -> None:
    """Lets a model made of a loaded model's parts be saved under the names that the loaded one's weights had on disk.

    https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/core_model_loading.py
    (`PreTrainedModel._weight_conversions`), 5.23.0: what transformers renamed on loading it names back on saving; without this
    it would only know its newest names. Can go when `save_pretrained` needs no such record.
    """
    model._weight_conversions = loaded._weight_conversions


# torch


def fake_tensors() -> AbstractContextManager[Any]:
    """Within it, new tensors have a shape, a type and a device, and no memory.

    https://docs.pytorch.org/docs/stable/torch.compiler_fake_tensor.html (`FakeTensorMode`, of a private module), 2.13.0. Can go
    when it has a public one.
    """
    return FakeTensorMode()


def storage_key(tensor: Tensor) -> int:
    """The same number for tensors of one storage, also of a fake one, as long as the storage lives.

    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/storage.py (`UntypedStorage._cdata`), 2.13.0; `data_ptr` is 0 for fake
    tensors. Can go when storages can be compared.
    """
    key: int = tensor.untyped_storage()._cdata
    return key
