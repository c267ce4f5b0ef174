"""`rayalign serve`: the application of `app` on Ray Serve, in replicas that each hold the model and come and go with requests.

What listens is Ray Serve's proxy, on the cluster's head. With `--engine vllm` Ray Serve's own application for vLLM runs in its
place (`vllm_config`). Everything else of serving/ knows nothing of Ray.
"""

import importlib.util
import logging
import re
import secrets
import socket
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray

from rayalign.algorithms import SFT
from rayalign.cluster import owns_cluster
from rayalign.config.config import Config
from rayalign.config.sections import ClusterConfig, ModelConfig
from rayalign.config.serving import ServeConfig
from rayalign.joining import end_replicas, ray_as_found, start_ray
from rayalign.models.registry import REGISTERED_MODELS
from rayalign.models.source import ModelSource, require_model
from rayalign.ray_lines import quiet_logging
from rayalign.serving.scorer import is_reward_model
from rayalign.serving.vllm_config import is_loopback, serve_arguments, write_serve_file
from rayalign.storage import Store

logger = logging.getLogger(__name__)

APPLICATION = "rayalign"

ENDING_SECONDS = 15
"""How long requests that are under way may go on when the server is to end. A second Ctrl-C cuts it short."""

QUEUED = 64
"""Requests that a replica takes beyond --max_concurrency, to answer them with 429; past them, Ray Serve itself answers 503."""


def run(config: ServeConfig) -> None:
    """Serves until it is interrupted. Raises ValueError for what can't be served, before any weights are loaded."""
    if not config.model:
        raise ValueError("Pass --model with what is to be served: a model's folder or hub id, or the model/ folder of a run.")
    require_serve()
    source, adapters = resolve_served(config)
    if config.write_config is not None:
        if config.engine != "vllm":
            raise ValueError("--write_config writes vLLM's configuration: pass --engine vllm, too.")
        write_serve_file(config, source, adapters, Path(config.write_config))
        logger.info("Written: start it with `serve run %s`, where vLLM is installed", config.write_config)
        return
    vllm = for_vllm(config, source, adapters)
    token = _token_of(config) if vllm is None else None
    with ray_as_found():
        # A cluster of its own has room for all replicas, and for Ray Serve's controller and proxy.
        replicas = config.max_replicas or config.min_replicas
        start_ray(Config(SFT(), cluster=ClusterConfig(num_workers=replicas, cpus_per_worker=config.cpus_per_replica)))
        gpus = gpus_of(config, ray.cluster_resources().get("GPU", 0))
        if vllm is not None and (gpus or config.engine == "vllm"):
            from ray.serve.llm import build_openai_app

            application = build_openai_app(vllm)
        else:
            application = _application(config, source, adapters, token, gpus)
        _serve(application, config)


def require_serve() -> None:
    """Raises ValueError where Ray Serve is not installed."""
    if importlib.util.find_spec("starlette") is None:
        raise ValueError("Ray Serve is not installed: pip install 'rayalign[serve]'.")


def resolve_served(config: ServeConfig) -> tuple[ModelSource, dict[str, ModelSource]]:
    """Where the model's weights come from, and those of each adapter, by name. Raises ValueError for what is not there, for an
    adapter of another model, and for reward models on this machine where they can't be served."""
    source = require_model(ModelConfig(model=config.model), REGISTERED_MODELS)
    adapters = {}
    for name, folder in config.adapters.items():
        try:
            adapters[name] = require_model(ModelConfig(model=source.base, adapter=folder), REGISTERED_MODELS)
        except ValueError as error:
            raise ValueError(f"--adapter {name}={folder}: {str(error).removeprefix(f'--adapter {folder}: ')}") from None
        if is_reward_model(adapters[name]):
            raise ValueError(
                f"--adapter {name}={folder}: is a reward model, which writes no responses. Serve it by itself (--model)."
            )
    if adapters and is_reward_model(source):
        raise ValueError(f"--adapter {' '.join(adapters)}: {config.model} is a reward model, which is served by itself.")
    return source, adapters


def for_vllm(config: ServeConfig, source: ModelSource, adapters: Mapping[str, ModelSource]) -> dict[str, Any] | None:
    """The arguments of vLLM's application; None where --engine auto leaves it out, and says why if vLLM is there. Raises
    ValueError for an --engine vllm that can't be."""
    has_vllm = importlib.util.find_spec("vllm") is not None
    if config.engine == "vllm" and not has_vllm:
        raise ValueError(
            "--engine vllm: vLLM is not installed here. Install it (pip install vllm), or pass --write_config FILE to write "
            "the configuration for a cluster that has it."
        )
    if config.engine == "vllm":
        return serve_arguments(config, source, adapters)
    if config.engine == "transformers" or not has_vllm or config.gpus_per_replica == 0:
        return None
    try:
        return serve_arguments(config, source, adapters)
    except ValueError as error:
        logger.info("--engine auto takes transformers, since vLLM would refuse this: %s", error)
        return None


def gpus_of(config: ServeConfig, in_cluster: float) -> float:
    """GPUs of a replica, on a cluster with so many."""
    if config.gpus_per_replica is not None:
        return config.gpus_per_replica
    return 1 if in_cluster else 0


def _token_of(config: ServeConfig) -> str | None:
    """The token that requests must bring; a new one is printed once. None where only this machine can ask."""
    if config.token_file is not None:
        try:
            token = Store.at(config.token_file).read_bytes().decode().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--token_file {config.token_file}: can't be read ({error}).") from None
        if len(token) < 16 or not token.isascii() or not token.isprintable() or " " in token:
            raise ValueError(f"--token_file {config.token_file}: must hold one token of 16 or more letters, digits and signs.")
        return token
    if is_loopback(config.host):
        return None
    token = secrets.token_urlsafe(32)
    sys.stderr.write(f"Requests must bring this token, which is not shown again (Authorization: Bearer ...):\n{token}\n")
    return token


def _application(
    config: ServeConfig, source: ModelSource, adapters: dict[str, ModelSource], token: str | None, gpus: float
) -> Any:
    from ray import serve

    from rayalign.serving.app import digest_of

    digest = None if token is None else digest_of(token)
    folders = {name: adapter.adapter or "" for name, adapter in adapters.items()}

    def build() -> Any:
        from rayalign.serving.replica import load_app  # in the replica

        quiet_logging()
        return load_app(config, source, folders, token_digest=digest)

    deployment: Any = serve.deployment(
        serve.ingress(build)(),
        name="model",
        ray_actor_options={"num_cpus": config.cpus_per_replica, "num_gpus": gpus},
        max_ongoing_requests=config.max_concurrency + QUEUED,
        graceful_shutdown_timeout_s=ENDING_SECONDS,
        graceful_shutdown_wait_loop_s=0.2,
        **replicas_of(config),
    )
    return deployment.bind()


def replicas_of(config: ServeConfig) -> dict[str, Any]:
    """How many replicas Ray Serve runs: so many that each has about one batch of requests at a time."""
    if config.max_replicas in (None, config.min_replicas):
        return {"num_replicas": config.min_replicas}
    return {
        "autoscaling_config": {
            "min_replicas": config.min_replicas,
            "max_replicas": config.max_replicas,
            "target_ongoing_requests": config.max_batch_size,
        }
    }


def _serve(application: Any, config: ServeConfig) -> None:
    """Runs an application until the program is interrupted."""
    from ray import serve

    if serve.status().proxies:
        raise ValueError(
            "Ray Serve runs on this cluster already, and its address and port can't be changed: `serve shutdown` ends it and "
            "all that it serves. Or use another cluster (RAY_ADDRESS=local: one on this machine alone)."
        )
    if owns_cluster():
        require_free_port(config.host, config.port)
    try:
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": config.host, "port": config.port},
            logging_config={"log_level": "WARNING", "enable_access_log": False},
        )
        logger.info("Loading %s: the first replica may take minutes", config.model)
        try:
            serve.run(application, name=APPLICATION, route_prefix="/", logging_config={"log_level": "WARNING"})
        except RuntimeError as error:
            raise ValueError(why_it_failed(str(error))) from None
        names = ", ".join([config.name, *config.adapters])
        logger.info("Serving %s at http://%s:%d/v1 (Ctrl-C ends it)", names, config.host, config.port)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            logger.info(
                "Ending: new requests are refused, and those under way have %d seconds (Ctrl-C again ends them at once)",
                ENDING_SECONDS,
            )
            serve.delete(APPLICATION)
            raise
    except KeyboardInterrupt as stop:
        end_replicas(APPLICATION)  # those that are left: while they load, or after a second Ctrl-C
        raise type(stop)("The server has ended.") from None
    finally:
        serve.shutdown()


def require_free_port(host: str, port: int) -> None:
    """Raises ValueError where a server can't listen on an address of this machine, since another one does or it has no such
    address."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: what has ended is not in the way
            listener.bind(address)
    except OSError as error:
        raise ValueError(
            f"--host {host} --port {port}: can't be listened on ({(error.strerror or str(error)).lower()}). Give another one, "
            "or end what listens there."
        ) from None


def why_it_failed(message: str) -> str:
    """Of what Ray Serve says when no replica starts, the last error that a replica raised."""
    errors = re.findall(r"^(?:[\w.]+\.)?(\w+(?:Error|Exception)): (.+)$", message, re.MULTILINE)
    if not errors:
        return f"The model can't be served: {' '.join(message.split())[-500:]}"
    kind, words = errors[-1]
    return f"The model can't be served: {words if kind == 'ValueError' else f'{kind}: {words}'}"
