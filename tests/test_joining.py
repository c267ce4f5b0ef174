"""Which cluster a run joins, and what it says of one that is not there."""

import contextlib
import http.server
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import ray

from rayalign import joining
from rayalign.algorithms import DPO
from rayalign.config.config import Config


@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on .Field. is deprecated")  # Ray's, as it is imported
def test_ray_serves_replicas_still_have_the_names_that_end_replicas_looks_for() -> None:
    from ray.serve._private.common import DeploymentID, ReplicaID
    from ray.serve._private.constants import SERVE_NAMESPACE

    replica = ReplicaID("x7", DeploymentID("model", "rayalign"))
    assert replica.to_full_id_str().startswith(joining.REPLICA_NAME.format("rayalign"))
    assert joining.SERVE_NAMESPACE == SERVE_NAMESPACE


@pytest.fixture
def addressed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """`addressed(address)`: what a run says that finds this RAY_ADDRESS, which nobody answers."""
    monkeypatch.setattr(joining, "ANSWER_SECONDS", 0.1)

    def run(address: str) -> str:
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(ValueError) as caught:
            joining.start_ray(Config(DPO()))
        assert not ray.is_initialized()
        return str(caught.value)

    return run


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "localhost:{}", "ray://127.0.0.1:{}"])
def test_a_head_that_is_gone_is_said_at_once_and_not_after_minutes(addressed: Callable[[str], str], form: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = form.format(free.getsockname()[1])
        assert addressed(address) == (
            f"RAY_ADDRESS={address}: no Ray cluster answers there (connection refused). Start its head again, "
            "give the address of another, or unset it to run on this machine alone."
        )


def test_the_dashboards_port_is_not_taken_for_the_heads(addressed: Callable[[str], str]) -> None:
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.handle_request, daemon=True).start()
    with contextlib.closing(server.socket):
        assert "(a web server answers, as the dashboard does)" in addressed(f"127.0.0.1:{server.server_port}")


@pytest.mark.parametrize("address", ["10.0.0.1", "10.0.0.1:", "head:ray", "10.0.0.1:99999", "s3://bucket/head", "a:b:6379"])
def test_an_address_that_names_no_head_is_refused(addressed: Callable[[str], str], address: str) -> None:
    assert addressed(address) == (
        f"RAY_ADDRESS={address}: must be the head's HOST:PORT, such as 10.0.0.1:6379. Unset it to run on this machine alone."
    )


def test_the_address_of_jobs_is_told_from_that_of_drivers(addressed: Callable[[str], str]) -> None:
    assert "such as 10.0.0.1:6379. An http address is for `ray job submit`." in addressed("http://127.0.0.1:8265")


@pytest.mark.parametrize("error", [ConnectionError("Failed to connect"), ray.exceptions.AuthenticationError("no token")])
def test_a_cluster_that_lets_nobody_in_is_told_with_what_it_may_ask_for(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(**options: object) -> None:
        raise error

    monkeypatch.setattr(ray, "init", refuse)
    with socket.socket() as head:
        head.bind(("127.0.0.1", 0))
        head.listen()
        address = f"127.0.0.1:{head.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        threading.Thread(target=lambda: head.accept()[0].close(), daemon=True).start()
        with pytest.raises(ValueError) as caught:
            joining.start_ray(Config(DPO()))
    assert str(caught.value).startswith(f"RAY_ADDRESS={address}: a cluster answers there, and does not let this process in (")
    assert "export RAY_AUTH_MODE=token" in str(caught.value)


def test_a_cluster_of_ray_start_is_joined_only_where_it_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert not joining._started_here()  # whatever private clusters run on this machine
    with socket.socket() as head:
        head.bind(("127.0.0.1", 0))
        head.listen()
        ray._private.utils.write_ray_address(f"127.0.0.1:{head.getsockname()[1]}")
        assert joining._started_here()
        monkeypatch.setenv("RAY_ADDRESS", "local")
        assert not joining._started_here()
        monkeypatch.delenv("RAY_ADDRESS")
    assert not joining._started_here()
