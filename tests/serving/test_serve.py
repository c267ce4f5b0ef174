"""What `serve` decides before Ray is started: the token, what is served, how many replicas."""

import contextlib
import dataclasses
import importlib.util
import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch

from rayalign.algorithms import Needs
from rayalign.config.serving import ServeConfig
from rayalign.models.source import ModelSource
from rayalign.policy.saving import save_policy
from rayalign.serving import serve
from rayalign.serving.loading import load_engine
from rayalign.serving.serve import (
    _token_of,
    for_vllm,
    replicas_of,
    require_free_port,
    resolve_served,
    run,
    why_it_failed,
)
from rayalign.serving.vllm_config import is_loopback
from tests.tiny_models import make_policy


def test_only_this_machine_is_served_without_a_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [is_loopback(host) for host in ("localhost", "127.0.0.1", "127.1.2.3", "::1")] == [True] * 4
    assert [is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "node7", "")] == [False] * 5
    assert _token_of(ServeConfig(model="m")) is None
    token = _token_of(ServeConfig(model="m", host="0.0.0.0"))
    assert token is not None
    assert len(token) > 40
    assert token in capsys.readouterr().err
    (tmp_path / "token").write_text("0123456789abcdef\n")
    assert _token_of(ServeConfig(model="m", token_file=str(tmp_path / "token"))) == "0123456789abcdef"
    assert capsys.readouterr().err == ""
    (tmp_path / "token").write_text("short")
    with pytest.raises(ValueError, match=r"must hold one token of 16 or more letters"):
        _token_of(ServeConfig(model="m", token_file=str(tmp_path / "token")))


def test_replicas_are_a_number_or_a_range() -> None:
    assert replicas_of(ServeConfig(min_replicas=2)) == {"num_replicas": 2}
    assert replicas_of(ServeConfig(min_replicas=1, max_replicas=3, max_batch_size=8)) == {
        "autoscaling_config": {"min_replicas": 1, "max_replicas": 3, "target_ongoing_requests": 8}
    }


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"min_replicas": 2, "max_replicas": 1}, "--max_replicas 1 is less than --min_replicas 2: give at least as many."),
        ({"max_length": 100, "max_new_tokens": 100}, "--max_new_tokens 100: --max_length 100 leaves no room for a prompt."),
        ({"adapter": ("runs/dpo/model",)}, "--adapter runs/dpo/model: must be NAME=PATH, such as dpo=runs/dpo/model."),
        ({"adapter": ("a=x", "a=y")}, "--adapter: a names two models. Give each a name of its own."),
        ({"model": "a", "adapter": ("a=x",)}, "--adapter: a names two models. Give each a name of its own."),
    ],
)
def test_flags_that_don_t_fit_each_other_are_refused(flags: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as caught:
        ServeConfig(**flags)
    assert str(caught.value).startswith(words)


def test_what_is_not_there_is_told_before_ray_is_started(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^Pass --model with what is to be served"):
        run(ServeConfig())
    with pytest.raises(ValueError, match=r"^--model ./none: there is no such folder"):
        run(ServeConfig(model="./none"))
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"^--engine vllm: vLLM is not installed here\."):
        run(ServeConfig(model=str(tmp_path), engine="vllm"))


@pytest.fixture
def with_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM is found, as if it were installed."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "vllm" else found(name))


@pytest.mark.usefixtures("with_vllm")
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({}, None),
        ({"gpus_per_replica": 1}, None),
        ({"model": "{run}"}, "--engine vllm: {run} is an adapter. Merge it into its model"),
        ({"model": "{rm}"}, "--engine vllm: {rm} is "),
        ({"adapter": ("dpo={run}",)}, "--engine vllm with --adapter dpo={run}: Ray Serve takes vLLM's adapters from"),
        ({"max_new_tokens": 16}, "--engine vllm with --max_new_tokens 16: "),
        ({"host": "0.0.0.0"}, "--engine vllm with --host 0.0.0.0: "),
    ],
)
def test_auto_takes_vllm_for_what_it_serves_as_asked_and_says_why_not_otherwise(
    model_folder: Callable[..., Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    flags: dict[str, Any],
    words: str | None,
) -> None:
    base, places = model_folder("llava"), {"run": f"{tmp_path}/run", "rm": f"{tmp_path}/rm"}
    save_policy(make_policy(base), Path(places["run"]))
    save_policy(make_policy(base, needs=Needs(head="value")), Path(places["rm"]))
    values: dict[str, Any] = {
        name: tuple(word.format(**places) for word in value) if name == "adapter" else value for name, value in flags.items()
    }
    values["model"] = str(flags.get("model", base)).format(**places)
    config = ServeConfig(**values)
    caplog.set_level("INFO")
    found = for_vllm(config, *resolve_served(config))
    said = [line for line in caplog.messages if line.startswith("--engine auto")]
    if words is None:
        assert found is not None
        assert found["llm_configs"][0]["model_loading_config"]["model_source"] == str(base)
        assert said == []
        return
    assert found is None
    assert len(said) == 1
    assert said[0].startswith(f"--engine auto takes transformers, since vLLM would refuse this: {words.format(**places)}")
    with pytest.raises(ValueError, match=f"^{re.escape(words.format(**places))}"):
        for_vllm(dataclasses.replace(config, engine="vllm"), *resolve_served(config))


@pytest.mark.usefixtures("with_vllm")
@pytest.mark.parametrize(
    ("flags", "in_cluster", "engine", "gpus"),
    [
        ({}, 0, "transformers", 0),
        ({}, 8, "vllm", None),
        ({"engine": "vllm"}, 0, "vllm", None),
        ({"engine": "transformers"}, 8, "transformers", 1),
        ({"gpus_per_replica": 0}, 8, "transformers", 0),
        ({"gpus_per_replica": 0.5}, 8, "transformers", 0.5),
        ({"gpus_per_replica": 1}, 0, "vllm", None),  # they come with the nodes that are asked for
    ],
)
def test_auto_takes_vllm_where_replicas_have_gpus(
    model_folder: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    flags: dict[str, Any],
    in_cluster: int,
    engine: str,
    gpus: float | None,
) -> None:
    """In a cluster that is not started, with so many GPUs."""
    served: list[Any] = []
    monkeypatch.setattr(serve, "ray_as_found", contextlib.nullcontext)
    monkeypatch.setattr(serve, "start_ray", lambda config: None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4, "GPU": in_cluster} if in_cluster else {"CPU": 4})
    monkeypatch.setattr(serve, "_application", lambda *words: ("transformers", words[-1]))
    monkeypatch.setitem(sys.modules, "ray.serve.llm", SimpleNamespace(build_openai_app=lambda arguments: ("vllm", None)))
    monkeypatch.setattr(serve, "_serve", lambda application, config: served.append(application))
    run(ServeConfig(model=str(model_folder("llava")), **flags))
    assert served == [(engine, gpus)]


def test_a_configuration_is_written_for_vllm_only(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    base = str(model_folder("llava"))
    with pytest.raises(ValueError, match=r"^--write_config writes vLLM's configuration: pass --engine vllm, too\."):
        run(ServeConfig(model=base, write_config=str(tmp_path / "serve.yaml")))
    run(ServeConfig(model=base, engine="vllm", write_config=str(tmp_path / "serve.yaml")))  # vLLM need not be here
    assert (tmp_path / "serve.yaml").exists()


def test_a_reward_model_is_no_adapter_that_responds_and_has_none(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    base, rm, policy = str(model_folder("llava")), str(tmp_path / "rm"), str(tmp_path / "dpo")
    save_policy(make_policy(Path(base), needs=Needs(head="value")), Path(rm))
    save_policy(make_policy(Path(base)), Path(policy))
    for flags, words in (
        ({"model": base, "adapter": (f"rm={rm}",)}, f"--adapter rm={rm}: is a reward model, which writes no responses."),
        ({"model": rm, "adapter": (f"dpo={policy}",)}, f"--adapter dpo: {rm} is a reward model, which is served by itself."),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(words)}"):
            resolve_served(ServeConfig(**flags))
    settings: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu"), "max_length": 64, "max_pixels": None}
    with pytest.raises(ValueError, match="is a reward model, which writes no responses"):
        load_engine(ModelSource(base), "base", {"rm": rm}, max_batch_size=1, **settings)


def test_a_port_that_another_server_has_is_refused() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        other.listen()
        with pytest.raises(ValueError) as caught:
            require_free_port("127.0.0.1", port)
    words = "can't be listened on (address already in use). Give another one, or end what listens there."
    assert str(caught.value) == f"--host 127.0.0.1 --port {port}: {words}"
    require_free_port("127.0.0.1", port)


def test_of_a_replica_that_does_not_start_the_reason_is_told() -> None:
    message = (
        "Deploying application rayalign failed: The deployment failed to start 3 times in a row.\n"
        "ray::ServeReplica:rayalign:model.initialize_and_get_metadata() (pid=1)\nTraceback (most recent call last):\n"
        "  File ...\nKeyError: 'a'\n\nDuring handling:\nValueError: adapter_model.safetensors: does not fit the model m.\n"
    )
    assert why_it_failed(message) == "The model can't be served: adapter_model.safetensors: does not fit the model m."
    assert why_it_failed("a.b.OutOfMemoryError: full") == "The model can't be served: OutOfMemoryError: full"
    assert why_it_failed("no  node") == "The model can't be served: no node"
