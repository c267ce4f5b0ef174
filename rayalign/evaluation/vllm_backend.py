"""The responses of `generate` by vLLM, on GPUs: in the actors of the same pool, with the same rows, results and resuming.

vLLM's own engine reads a prompt once for all of its responses, and runs those of a group side by side. (Ray Data's processor
for vLLM keeps the first response of a request only, and knows nothing of what was done before.) Prompts are written by our
encoder, so that both backends see the same ids; draws are vLLM's.
"""

import functools
import hashlib
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from rayalign.config.config import Config
from rayalign.data.encode import Encoder
from rayalign.data.encoder_spec import EncoderSpec
from rayalign.data.rows import Sources
from rayalign.evaluation.generate import line
from rayalign.evaluation.prompts import prompt_columns, prompt_of
from rayalign.evaluation.work import Result, Work
from rayalign.formats.records import RecordError, record_errors
from rayalign.images.fetch import fetch_images, open_image
from rayalign.models.registry import REGISTERED_MODELS
from rayalign.models.source import require_model
from rayalign.policy.generation import Response, Sampling
from rayalign.serving.vllm_config import require_for_vllm
from rayalign.storage import Store

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values of vLLM's max_lora_rank."""


def make_vllm_work(config: Config, sources: Sources, sampling: Sampling) -> Work:
    """What an actor does with records: vLLM responds to their prompts. Raises ValueError where vLLM can't be used."""
    try:
        vllm, lora_request = importlib.import_module("vllm"), importlib.import_module("vllm.lora.request")
    except ImportError as error:
        raise ValueError(
            f"--backend vllm: vLLM is not installed on the workers ({error}). Install it, or leave the flag out."
        ) from None
    if not config.cluster.gpus_per_worker:
        raise ValueError("--backend vllm: the workers have no GPU. Pass --gpus_per_worker 1, or leave the flag out.")
    source = require_model(config.model, REGISTERED_MODELS).here()
    lora: dict[str, Any] = {}
    if source.adapter is not None:
        rank = require_for_vllm(source, source.adapter, f"--backend vllm with the adapter {source.adapter}")
        lora = {"enable_lora": True, "max_lora_rank": next((r for r in LORA_RANKS if r >= rank), rank)}
    spec = EncoderSpec(
        source.base,
        "chosen",
        max_length=config.data.max_length,
        max_pixels=config.data.max_pixels,
        trust_remote_code=config.model.trust_remote_code,
    )
    engine = vllm.LLM(
        model=source.base,
        dtype=config.model.dtype_on("cuda"),
        max_model_len=config.data.max_length,  # at which it ends responses
        tensor_parallel_size=max(1, int(config.cluster.gpus_per_worker)),
        trust_remote_code=config.model.trust_remote_code,
        enable_prefix_caching=True,
        **lora,
    )
    adapter = lora_request.LoRARequest("adapter", 1, source.adapter) if source.adapter is not None else None
    return functools.partial(_respond, engine, vllm.SamplingParams, adapter, Encoder(spec), sources, sampling)


def _respond(
    engine: Any,
    make_params: Any,
    adapter: Any,
    encoder: Encoder,
    sources: Sources,
    sampling: Sampling,
    rows: Sequence[Mapping[str, Any]],
) -> list[Result]:
    results: dict[int, Result] = {}
    records: dict[int, Any] = {}
    requests: dict[int, Any] = {}
    for i, row in enumerate(rows):
        try:
            records[i] = prompt_of(row, sources, text_only=encoder.spec.family.text_only)
            requests[i] = request_of(records[i], row["folder"], encoder, sources)
        except RecordError as error:
            results[i] = error
    params = [params_of(records[i].id, make_params, sampling, encoder) for i in requests]
    outputs = engine.generate(list(requests.values()), params, lora_request=adapter, use_tqdm=False)
    for i, output in zip(requests, outputs, strict=True):
        columns = prompt_columns(records[i], rows[i], sources)
        results[i] = [columns | line(k, _response(made, encoder), encoder.tokenizer) for k, made in enumerate(output.outputs)]
    return [results[i] for i in range(len(rows))]


def request_of(record: Any, folder: str, encoder: Encoder, sources: Sources) -> dict[str, Any]:
    """A prompt as vLLM takes it: ids with an image token for each image, and the pictures as our processor sees them."""
    root = Store.at(sources.image_root) if sources.image_root else None
    with record_errors(passing=(OSError,)):
        images = fetch_images(record.images, folder=Store(folder), image_root=root, allow_urls=sources.allow_image_urls)
        opened = [open_image(image, max_pixels=encoder.spec.max_pixels) for image in images]
    request: dict[str, Any] = {"prompt_token_ids": encoder.prompt_with_marks(record)}
    return {**request, "multi_modal_data": {"image": opened}} if opened else request


def params_of(key: str, make_params: Any, sampling: Sampling, encoder: Encoder) -> Any:
    """vLLM's settings of one prompt's draws, with a seed of the prompt's own."""
    seed = int.from_bytes(hashlib.sha256(f"{sampling.seed} {key}".encode()).digest()[:4], "big")
    return make_params(
        n=sampling.n,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_tokens=sampling.max_new_tokens,
        seed=seed,
        stop_token_ids=[encoder.tokenizer.eos_token_id],
    )


def _response(made: Any, encoder: Encoder) -> Response:
    ids = list(made.token_ids)
    is_ended = made.finish_reason == "stop"
    return Response(ids[:-1] if is_ended and ids[-1:] == [encoder.tokenizer.eos_token_id] else ids, is_ended)
