"""The batch script for Slurm: a sound shell script, whose command Ray's own parsers and rayalign's take."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from ray.scripts.symmetric_run import curate_and_validate_ray_start_args

from tests.deploy.files import DEPLOY, check_ray_start, config_of

SCRIPT = DEPLOY / "slurm.sh"
OPTIONS = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", SCRIPT.read_text(), re.MULTILINE))


def test_the_script_is_sound_shell() -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    shellcheck = shutil.which("shellcheck", path=places)
    assert shellcheck is not None
    found = subprocess.run([shellcheck, SCRIPT], capture_output=True, text=True, check=False)
    assert (found.stdout, found.returncode) == ("", 0)


def run_script(
    tmp_path: Path, *, starts: bool = True, code: int = 0
) -> tuple[list[list[str]], subprocess.CompletedProcess[str]]:
    """Runs the script where `srun` writes down its words and what it was given of the cluster's token, and, where Ray `starts`,
    runs the command, which ends with a `code`, and ends well in any case. Returns the words of each call."""
    programs = tmp_path / "bin"
    programs.mkdir()
    then = 'while [[ $1 != -- ]]; do shift; done; shift; "$@" || true' if starts else ":"
    for name, lines in {
        "srun": f'printf "%s\\n" "$RAY_AUTH_MODE" "${{#RAY_AUTH_TOKEN}}" "$@" END >> "{tmp_path}/calls"\n{then}',
        "rayalign": f"exit {code}",
        "hostname": 'echo "10.0.0.7 172.17.0.1 "',
    }.items():
        (programs / name).write_text(f"#!/bin/bash\n{lines}\n")
        (programs / name).chmod(0o755)
    activate = tmp_path / ".venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.touch()
    script = tmp_path / "job.sh"
    script.write_text(SCRIPT.read_text().replace("output_dir=/shared/runs/first", "output_dir=s3://bucket/run"))
    given = {
        "PATH": os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "SLURM_JOB_NAME": OPTIONS["job-name"],
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": OPTIONS["nodes"],
        "SLURM_CPUS_PER_TASK": OPTIONS["cpus-per-task"],
        "SLURM_GPUS_ON_NODE": OPTIONS["gpus-per-node"],
    }
    ended = subprocess.run(["bash", script], cwd=tmp_path, env=given, capture_output=True, text=True, check=False)
    calls = (tmp_path / "calls").read_text().split("END\n")[:-1]
    return [call.splitlines() for call in calls], ended


def test_ray_starts_once_on_each_node_and_the_command_on_the_head(tmp_path: Path) -> None:
    (call,), ended = run_script(tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    mode, length_of_token, *words = call
    assert (mode, length_of_token) == ("token", "64")
    program = words.index("ray")
    assert words[:program] == ["--kill-on-bad-exit=1", f"--cpus-per-task={OPTIONS['cpus-per-task']}"]
    assert words[program + 1] == "symmetric-run"
    cut = words.index("--")
    asked, command = words[program + 2 : cut], words[cut + 1 :]
    assert asked[:4] == ["--address", "10.0.0.7:6379", "--min-nodes", OPTIONS["nodes"]]
    started = check_ray_start(curate_and_validate_ray_start_args(asked))
    assert (started["num_cpus"], started["num_gpus"]) == (int(OPTIONS["cpus-per-task"]), int(OPTIONS["gpus-per-node"]))
    assert command[:4] == ["env", "RAY_ADDRESS=10.0.0.7:6379", "bash", "-c"]
    assert command[5:8] == ["run", f"{tmp_path}/rayalign-7.done", "rayalign"]
    assert not (tmp_path / "rayalign-7.done").exists()
    assert OPTIONS["ntasks-per-node"] == "1"
    assert "exclusive" in OPTIONS


def test_the_workers_fit_the_nodes(tmp_path: Path) -> None:
    (call,), _ = run_script(tmp_path)
    cluster = config_of(call[call.index("rayalign") + 1 :]).cluster
    nodes, cpus, gpus = (int(OPTIONS[name]) for name in ("nodes", "cpus-per-task", "gpus-per-node"))
    assert cluster.num_workers * (cluster.gpus_per_worker or 0) == nodes * gpus
    assert cluster.num_workers * cluster.cpus_per_worker + 1 <= nodes * cpus  # and something is left for encoding


@pytest.mark.parametrize("how", [{"starts": False}, {"code": 1}], ids=str)
def test_a_job_whose_run_did_not_finish_has_failed(tmp_path: Path, how: dict[str, Any]) -> None:
    _, ended = run_script(tmp_path, **how)
    assert ended.returncode == 1
    assert ended.stderr == "The run has not finished: s3://bucket/run\n"


def test_an_option_that_ray_start_has_not_would_be_noticed() -> None:
    with pytest.raises(click.NoSuchOption, match=r"No such option.*--num-gpu"):
        check_ray_start(["--num-gpu=4"])
