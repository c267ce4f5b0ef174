"""A server on the cluster, as its user starts it: OpenAI's client, replicas, one of which is killed while it responds."""

import base64
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from tests.cluster import Cluster, free_ports
from tests.tiny_models import noise_image

REPLICA = "ray::ServeReplica:rayalign:model"
SECONDS = 120
PICTURE = "data:image/png;base64," + base64.b64encode(noise_image(40, 30)).decode()


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


@pytest.fixture(scope="module")
def server(cluster_of_four_cpus: Cluster, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base URL of a server with two replicas; it asks for a token."""
    folder = tmp_path_factory.mktemp("serve")
    (folder / "token").write_text("0123456789abcdef")
    (port,) = free_ports(1)
    log = folder / "log"
    process = cluster_of_four_cpus.start(
        *("pipelines/serve.py", "--model", model, "--served_model_name", "base", "--engine", "transformers"),
        *("--min_replicas", 2, "--cpus_per_replica", 0.5, "--port", port, "--token_file", folder / "token"),
        log=log,
    )
    try:
        deadline = time.monotonic() + SECONDS
        while "Serving base" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    assert process.returncode == 130, log.read_text()
    assert replicas(cluster_of_four_cpus) == []
    assert "Traceback" not in log.read_text(), log.read_text()


def test_a_replica_that_is_killed_costs_no_client_its_response(server: str, cluster_of_four_cpus: Cluster) -> None:
    turns: Any = [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": PICTURE}}, {"type": "text", "text": "Which?"}]}
    ]
    client = openai.OpenAI(base_url=server, api_key="0123456789abcdef", max_retries=8)

    def ask(_: int, max_tokens: int = 200) -> str | None:
        response = client.chat.completions.create(model="base", messages=turns, temperature=0, max_tokens=max_tokens)
        return response.choices[0].message.content

    with openai.OpenAI(base_url=server, api_key="wrong", max_retries=0) as stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    expected = ask(0)
    stream = client.chat.completions.create(model="base", messages=turns, temperature=0, max_tokens=200, stream=True)
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
