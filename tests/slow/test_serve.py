"""A server on the cluster, as its user starts it: OpenAI's client, replicas, one of which is killed while it responds."""

import base64
import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import openai
import psutil
import pytest

from tests.cluster import Cluster, free_ports
from tests.tiny_models import noise_image

REPLICA = "ray::ServeReplica:rayalign:model"
SECONDS = 120
TOKEN = "0123456789abcdef"
PICTURE = "data:image/png;base64," + base64.b64encode(noise_image(40, 30)).decode()
TURNS: Any = [
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": PICTURE}}, {"type": "text", "text": "Which?"}]}
]


def replicas(cluster: Cluster) -> list[psutil.Process]:
    """The replicas' processes."""
    found = []
    for process in psutil.Process(cluster.pid).children(recursive=True):
        try:
            if process.cmdline() and process.cmdline()[0].startswith(REPLICA):
                found.append(process)
        except psutil.Error:
            continue
    return found


@dataclass
class Server:
    """A server with two replicas, which asks for a token; `clients` talk to it."""

    url: str
    process: subprocess.Popen[str]
    log: Path

    def client(self, token: str = TOKEN, *, max_retries: int = 0) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=token, max_retries=max_retries)

    def wait_for(self, words: str) -> None:
        deadline = time.monotonic() + SECONDS
        while words not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)


def _ask_on(client: openai.OpenAI) -> None:
    while True:
        client.models.list()


@pytest.fixture
def server(cluster_of_four_cpus: Cluster, model: Path, tmp_path: Path) -> Iterator[Server]:
    with serving(cluster_of_four_cpus, model, tmp_path, "--min_replicas", 2) as server:
        yield server


@contextlib.contextmanager
def serving(cluster: Cluster, model: Path, folder: Path, *flags: object) -> Iterator[Server]:
    """A server, which is ended at the end."""
    (folder / "token").write_text(TOKEN)
    (port,) = free_ports(1)
    process = cluster.start(
        *("pipelines/serve.py", "--model", model, "--served_model_name", "base", "--engine", "transformers"),
        *("--cpus_per_replica", 0.5, "--port", port, "--token_file", folder / "token"),
        *("--max_length", 20_000, "--max_new_tokens", 10_000, *flags),
        log=folder / "log",
    )
    server = Server(f"http://127.0.0.1:{port}/v1", process, folder / "log")
    try:
        server.wait_for("Serving base")
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def test_a_second_replica_comes_when_requests_are_more_than_one_takes(
    cluster_of_four_cpus: Cluster, model: Path, tmp_path: Path
) -> None:
    """That it goes again takes Ray Serve ten minutes without requests, which nobody waits for here."""
    enough = threading.Event()
    flags = ("--min_replicas", 1, "--max_replicas", 2, "--max_batch_size", 2)
    with serving(cluster_of_four_cpus, model, tmp_path, *flags) as server, server.client(max_retries=8) as client:

        def ask(_: int) -> set[str | None]:
            said = set()
            while not said or not enough.is_set():
                response = client.chat.completions.create(model="base", messages=TURNS, temperature=0, max_tokens=100)
                said.add(response.choices[0].message.content)
            return said

        assert len(replicas(cluster_of_four_cpus)) == 1
        with ThreadPoolExecutor(8) as pool:
            answers = pool.map(ask, range(8))
            deadline = time.monotonic() + SECONDS
            while len(replicas(cluster_of_four_cpus)) < 2 and time.monotonic() < deadline:
                time.sleep(0.5)
            time.sleep(10)  # in which the second one answers, too
            enough.set()
            (answer,) = set().union(*answers)
        assert answer
        assert len(replicas(cluster_of_four_cpus)) == 2


def test_a_replica_that_is_killed_costs_no_client_its_response(server: Server, cluster_of_four_cpus: Cluster) -> None:
    client = server.client(max_retries=8)

    def ask(_: int, max_tokens: int = 200) -> str | None:
        response = client.chat.completions.create(model="base", messages=TURNS, temperature=0, max_tokens=max_tokens)
        return response.choices[0].message.content

    with server.client("wrong") as stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    expected = ask(0)
    stream = client.chat.completions.create(model="base", messages=TURNS, temperature=0, max_tokens=200, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices) == expected
    before = replicas(cluster_of_four_cpus)
    assert len(before) == 2
    killer = threading.Timer(0.3, os.kill, [before[0].pid, signal.SIGKILL])
    killer.start()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(24))) == [expected] * 24
    killer.join()
    assert not before[0].is_running()
    assert ask(0) == expected
    client.close()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_server_that_is_interrupted_refuses_new_requests_and_lets_those_under_way_end(
    server: Server, number: signal.Signals, code: int
) -> None:
    with server.client() as client:
        stream = client.chat.completions.create(model="base", messages=TURNS, temperature=0, max_tokens=300, stream=True)
        next(stream)
        server.process.send_signal(number)
        server.wait_for("Ending: new requests are refused")
        with pytest.raises(openai.NotFoundError):
            _ask_on(client)
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
    assert server.process.wait(60) == code


def test_a_second_interruption_ends_a_server_at_once(server: Server) -> None:
    with server.client() as client:
        stream = client.chat.completions.create(model="base", messages=TURNS, temperature=0, max_tokens=10_000, stream=True)
        next(stream)
        server.process.send_signal(signal.SIGINT)
        server.wait_for("Ending: new requests are refused")
        server.process.send_signal(signal.SIGINT)
        with contextlib.suppress(openai.APIError, httpx2.HTTPError):
            assert all(chunk.choices[0].finish_reason is None for chunk in stream)
    assert server.process.wait(60) == 130
