"""The configuration of `ray.serve.llm`, by which vLLM serves what `serve` is asked for; and what vLLM can't do as asked.

https://docs.ray.io/en/latest/serve/llm. vLLM adds LoRA to language models only, loads adapters from object stores only here,
and its server knows neither a token nor which URLs are safe: what that would change is refused in words.
"""

import dataclasses
import ipaddress
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from rayalign.config.serving import ServeConfig
from rayalign.downloads import model_folder
from rayalign.models.parts import PART_NAMES, find_parts
from rayalign.models.registry import find_family, load_config
from rayalign.models.source import ModelSource, read_adapter_config
from rayalign.policy.adapter_files import read_adapter
from rayalign.serving.scorer import is_reward_model
from rayalign.storage import Store

NO_HOST = "none.invalid"
"""The only host of which vLLM fetches images, where it is to fetch none."""

MERGE = "Merge it into its model (rayalign export), and take that."


NOT_FOLLOWED = {
    "max_new_tokens": "there a response is as long as its request asks for",
    "max_image_mb": "its server takes images of any size",
    "max_body_mb": "its server takes requests of any size",
    "cpus_per_replica": "Ray Serve chooses the CPUs of its replicas",
    "gpus_per_replica": "a replica of it has one GPU",
}
"""Flags that vLLM's application has no setting for, and why."""


def serve_arguments(config: ServeConfig, source: ModelSource, adapters: Mapping[str, ModelSource]) -> dict[str, Any]:
    """The arguments of `ray.serve.llm.build_openai_app`. Raises ValueError for what vLLM can't serve as asked."""
    _check(config, source)
    engine: dict[str, Any] = {
        "max_model_len": config.max_length,
        "max_num_seqs": config.max_batch_size,
        "limit_mm_per_prompt": {"image": config.max_images},
        "allowed_media_domains": [NO_HOST],
        "dtype": config.dtype,
    }
    replicas = config.max_replicas or config.min_replicas
    llm: dict[str, Any] = {
        "model_loading_config": {"model_id": config.name, "model_source": source.base},
        "engine_kwargs": engine,
        "deployment_config": {
            "autoscaling_config": {"min_replicas": config.min_replicas, "max_replicas": replicas},
            "max_ongoing_requests": config.max_concurrency,
        },
    }
    if adapters:
        folder, rank = _adapters_for_vllm(source, adapters)
        engine |= {"enable_lora": True, "max_lora_rank": rank, "max_loras": len(adapters)}
        llm["lora_config"] = {"dynamic_lora_loading_path": folder, "max_num_adapters_per_replica": len(adapters)}
    return {"llm_configs": [llm]}


def write_serve_file(config: ServeConfig, source: ModelSource, adapters: Mapping[str, ModelSource], path: Path) -> None:
    """Writes what `serve run FILE` and `serve deploy FILE` read."""
    application = {
        "name": "rayalign",
        "route_prefix": "/",
        "import_path": "ray.serve.llm:build_openai_app",
        "args": serve_arguments(config, source, adapters),
    }
    file = {"http_options": {"host": config.host, "port": config.port}, "applications": [application]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(file, sort_keys=False), encoding="utf-8")


def _check(config: ServeConfig, source: ModelSource) -> None:
    if not is_loopback(config.host) or config.token_file is not None:
        raise ValueError(
            f"--engine vllm with {'--token_file' if config.token_file else f'--host {config.host}'}: Ray Serve's server for "
            "vLLM asks nobody for a token. Let it listen on 127.0.0.1, behind a proxy that does, or pass --engine transformers."
        )
    if config.allow_image_urls:
        raise ValueError(
            "--engine vllm with --allow_image_urls true: vLLM would fetch addresses of this network, too. Send images as data: "
            "URIs, or pass --engine transformers."
        )
    if config.max_pixels is not None:
        raise ValueError(
            "--engine vllm with --max_pixels: vLLM scales no images down. Leave it out, or pass --engine transformers."
        )
    defaults: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(ServeConfig)}
    for name, why in NOT_FOLLOWED.items():
        value = getattr(config, name)
        if value != defaults[name] and not (name == "gpus_per_replica" and value == 1):
            raise ValueError(f"--engine vllm with --{name} {value:g}: {why}. Leave it out, or pass --engine transformers.")
    if source.adapter is not None:
        raise ValueError(f"--engine vllm: {config.model} is an adapter. {MERGE}")
    if is_reward_model(ModelSource(model_folder(source.base, weights=False))):
        raise ValueError(
            f"--engine vllm: {config.model} is a reward model. Export it with --layout vllm and run `vllm serve FOLDER "
            "--runner pooling`, or pass --engine transformers."
        )


def _adapters_for_vllm(source: ModelSource, adapters: Mapping[str, ModelSource]) -> tuple[str, int]:
    """The folder of an object store that all adapters lie in, and the largest of their ranks."""
    parents, rank = set(), 1
    for name, adapter in adapters.items():
        assert adapter.adapter is not None
        store = Store.at(adapter.adapter)
        if store.local_path is not None or store.name != name:
            raise ValueError(
                f"--engine vllm with --adapter {name}={store.location}: Ray Serve takes vLLM's adapters from a folder of an "
                f"object store, each from the folder of its name: s3://bucket/adapters/{name}. Put it there, or: {MERGE}"
            )
        parents.add(store.parent.location)
        rank = max(rank, require_for_vllm(source, adapter.adapter, f"--engine vllm with --adapter {name}"))
    if len(parents) > 1:
        raise ValueError(f"--engine vllm: all adapters must lie in one folder, and not in {', '.join(sorted(parents))}.")
    return parents.pop(), rank


def require_for_vllm(source: ModelSource, adapter: str, asked: str) -> int:
    """The rank of an adapter. Raises ValueError for one that vLLM would load in part, or not at all; it begins with what was
    `asked`."""
    folder = model_folder(adapter, weights=True)
    if read_adapter_config(Path(folder), adapter).get("use_dora"):
        raise ValueError(f"{asked}: vLLM knows no DoRA. {MERGE}")
    family = find_family(load_config(source.base).model_type)
    with torch.device("meta"):
        skeleton = family.auto_class.from_config(load_config(source.base))
    found, parts = read_adapter(skeleton, folder), find_parts(skeleton)
    outside = {part for key in found.shapes if (part := parts.of(key.removeprefix("base_model.model."))) != "llm"}
    if outside:
        where = " and ".join(sorted(PART_NAMES[part] for part in outside))
        raise ValueError(f"{asked}: it has matrices in the {where}, and vLLM adds LoRA to language models only. {MERGE}")
    return max(shape[0] for key, shape in found.shapes.items() if ".lora_A" in key)


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
