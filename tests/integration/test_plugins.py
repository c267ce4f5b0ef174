"""A loss and a record format of one's own, trained with two workers in jobs that Ray's own command submits: from Python, and
by the command line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.cluster import ROOT, RUN_SECONDS, Cluster

TEMPLATE = ROOT / "examples" / "template" / "my_loss.py"
SMALL = {
    "max_steps": 2,
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_workers": 2,
    "dataset_test_ratio": 0.2,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "margin": 2,
}

FORMAT = """
from rayalign.formats.parse import Format
from rayalign.formats.records import Message, build_record

def parse(row, *, id):
    asked = Message(role="user", content=row["ask"])
    return build_record(id=id, messages=[asked], images=row.get("pictures", []), chosen=row["good"], rejected=row["bad"])

FORMATS = (Format("mine", "ask, good, bad", {"ask", "good", "bad"}.issubset, parse),)
"""

SCRIPT = """
import json
import ray, rayalign

flags = json.load(open("flags.json"))
ray.init()
result = rayalign.train("squared_hinge", plugin=["my_loss.py", "my_format.py"], **flags)
assert ray.is_initialized()
ray.shutdown()
try:
    rayalign.train("squared_hinge", plugin=["my_loss.py", "my_format.py"], **flags)
except ValueError as error:
    print("REFUSED", error)
assert not ray.is_initialized()
row = {"query": "Which colour?", "response": "It is red.", "rejected_response": "It is blue."}
logps = rayalign.load_policy(result.model_dir).logps([row])
told = {"model": result.model_dir, "report": result.report, "folder": result.output_dir, "metrics": dict(result.metrics)}
print("RESULT", json.dumps({**told, "steps": result.summary["steps"], "logp": logps.chosen.total.item()}))
"""


@pytest.fixture(scope="module")
def own_rows(good_records: Path) -> Path:
    """The good records without their histories, in the plugin's format."""
    lines = []
    for text in good_records.read_text().splitlines():
        row = json.loads(text)
        own = {"ask": row["query"], "good": row["response"], "bad": row["rejected_response"]}
        lines.append(json.dumps(own | ({"pictures": row["images"]} if "images" in row else {})) + "\n")
    path = good_records.with_name("own.jsonl")
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def job_output(cluster_of_four_cpus: Cluster, model: Path, own_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What a job prints that trains twice from Python, with plugins that lie in its own folder."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "train.py").write_text(SCRIPT)
    (folder / "my_format.py").write_text(FORMAT)
    shutil.copy(TEMPLATE, folder)
    flags = {**SMALL, "model": str(model), "dataset": [str(own_rows)], "output_dir": str(folder / "run")}
    (folder / "flags.json").write_text(json.dumps(flags))
    return submit(cluster_of_four_cpus, folder, "train.py")


def submit(cluster: Cluster, folder: Path, *words: object) -> str:
    """What a job prints that runs a Python program of this folder."""
    command = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", cluster.dashboard]
    job = subprocess.run(
        [*command, "--working-dir", str(folder), "--", sys.executable, *map(str, words)],
        env=cluster.env,
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
        check=False,
    )
    assert job.returncode == 0, job.stdout[-5000:] + job.stderr[-2000:]
    return job.stdout


def test_the_template_trains_from_python_in_a_job_on_rows_of_an_own_format(job_output: str) -> None:
    (line,) = (line for line in job_output.splitlines() if line.startswith("RESULT "))
    told = json.loads(line.removeprefix("RESULT "))
    folder = Path(told["folder"])
    assert (told["model"], told["report"]) == (str(folder / "model"), str(folder / "report.html"))
    assert told["steps"] == 2
    assert told["logp"] < 0
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["algorithm"] == "squared_hinge"
    assert summary["training_records"] + summary["held_out_records"] == 60
    assert {name: summary[name] for name in told["metrics"]} == told["metrics"]
    assert {"eval_loss", "eval_rewards/accuracies", "grad_norm"} <= told["metrics"].keys()
    start = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert start["eval_loss"] == pytest.approx(4)  # margin 2, and rewards of 0 at the start
    assert all(weight.any() for weight in load_file(folder / "model" / "adapter_model.safetensors").values())
    assert (folder / "plugins" / "my_loss.py").read_text() == TEMPLATE.read_text()
    assert (folder / "plugins" / "my_format.py").read_text() == FORMAT


def test_a_finished_run_is_refused_from_python_as_on_the_command_line(job_output: str) -> None:
    assert "holds a finished run. Pass --overwrite true to delete it, or another --output_dir." in job_output
    assert "REFUSED --output_dir" in job_output


def test_a_job_of_the_command_line_trains_it_as_a_module_to_the_same_weights(
    cluster_of_four_cpus: Cluster, job_output: str, tmp_path: Path
) -> None:
    (line,) = (line for line in job_output.splitlines() if line.startswith("RESULT "))
    folder = Path(json.loads(line.removeprefix("RESULT "))["folder"])
    words = ("--config", folder / "config.yaml", "--output_dir", tmp_path / "run")
    plugins = ("--plugin", "examples.template.my_loss", folder / "plugins" / "my_format.py")
    said = submit(cluster_of_four_cpus, ROOT, "pipelines/rlhf.py", *words, *plugins)
    assert "Step 2/2" in said  # the workers' progress can be read in the job's log
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert written["plugin"] == ["examples.template.my_loss", str(folder / "plugins" / "my_format.py")]
    one, two = (load_file(run / "model" / "adapter_model.safetensors") for run in (folder, tmp_path / "run"))
    assert all(torch.equal(one[name], two[name]) for name in one)
