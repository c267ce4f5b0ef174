"""What a replica of `serve` loads: the model on its device, and the application around it."""

from collections.abc import Mapping
from typing import Any

import torch

from rayalign.config.sections import ModelConfig
from rayalign.config.serving import ServeConfig
from rayalign.models.source import ModelSource
from rayalign.serving.app import build_app
from rayalign.serving.chat_api import Limits
from rayalign.serving.engine import Engine
from rayalign.serving.loading import load_engine
from rayalign.serving.scorer import Scorer, is_reward_model, load_scorer


def load_app(config: ServeConfig, source: ModelSource, adapters: Mapping[str, str], *, token_digest: str | None) -> Any:
    """The application of a model with its adapters by name, or of a reward model; on the process's GPU, where it has one.

    Raises ValueError for weights and adapters that are not whole or do not fit, and for a reward model with adapters.
    """
    limits = Limits(
        max_new_tokens=config.max_new_tokens,
        max_images=config.max_images,
        max_image_bytes=int(config.max_image_mb * 2**20),
        max_body_bytes=int(config.max_body_mb * 2**20),
        allow_image_urls=config.allow_image_urls,
    )
    backend = _load(config, source.here(), adapters)
    return build_app(backend, limits, token_digest=token_digest, max_concurrency=config.max_concurrency)


def _load(config: ServeConfig, source: ModelSource, adapters: Mapping[str, str]) -> Engine | Scorer:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    limits: dict[str, Any] = {
        "max_length": config.max_length,
        "max_pixels": config.max_pixels,
        "max_batch_size": config.max_batch_size,
    }
    if is_reward_model(source):
        if adapters:
            raise ValueError(f"--adapter {' '.join(adapters)}: {config.model} is a reward model, which is served by itself.")
        return load_scorer(source, config.name, dtype=config.dtype, device=device, **limits)
    dtype: torch.dtype = getattr(torch, ModelConfig(dtype=config.dtype).dtype_on(device.type))
    return load_engine(source, config.name, adapters, dtype=dtype, device=device, **limits)
