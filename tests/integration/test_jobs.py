"""The main job, submitted to a running cluster with Ray's own command."""

import subprocess
import sys
from pathlib import Path

from tests.cluster import ROOT, RUN_SECONDS, Cluster


def test_a_submitted_job_trains_on_the_cluster(
    cluster_of_four_cpus: Cluster, model: Path, records: Path, tmp_path: Path
) -> None:
    words = (
        *("pipelines/dpo.py", "--model", model, "--dataset", records, "--output_dir", tmp_path / "run", "--max_steps", 2),
        *("--num_workers", 2, "--gradient_accumulation_steps", 2, "--dataset_test_ratio", 0.1),
    )
    submit = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", cluster_of_four_cpus.dashboard]
    job = subprocess.run(
        [*submit, "--working-dir", str(ROOT), "--", sys.executable, *map(str, words)],
        env=cluster_of_four_cpus.env,
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
        check=False,
    )
    assert job.returncode == 0, job.stdout[-5000:] + job.stderr[-2000:]
    assert (tmp_path / "run" / "summary.json").exists()
    assert "Step 2/2" in job.stdout  # the workers' progress can be read in the job's log
