"""The report's warnings held against what became of the models, on the quickstart's task, whose answers are right or wrong.

The limits of the warnings were chosen on seed 0; RAYALIGN_TEST_SEED=3 makes another task.
"""

import os
import re
import sys
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "quickstart"))

import compare
import stages
from task import write_labelled

USUAL = {name: compare.RUNS[name] for name in ("sft", "dpo", "mdpo", "mpo", "cpo", "orpo", "simpo", "kto", "rm")}
USUAL["dpo_rpo"] = compare.Run("DPO with the whole NLL term", "dpo", ("--beta", 0.1, "--rpo_alpha", 1))
HOT = {
    "dpo_hot": compare.Run("DPO at five times the rate", "dpo", ("--rpo_alpha", 0, "--learning_rate", 5 * stages.RATE)),
    "kto_hot": compare.Run(
        "KTO on labelled responses, five times the rate", "kto", ("--learning_rate", 5 * stages.RATE), "labelled.jsonl"
    ),
}
ENDS = re.compile(r'<section class="warnings".*?</section>', re.DOTALL)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Iterator[stages.Task]:
    with stages.cluster():
        made = stages.prepare(tmp_path_factory.mktemp("task"), int(os.environ.get("RAYALIGN_TEST_SEED", "0")))
        write_labelled(made.folder / "labelled.jsonl", made.training, made.training_pairs, 30)
        yield made


def warnings_of(report: Path) -> list[str]:
    section = ENDS.search(report.read_text())
    return [unescape(words) for words in re.findall(r"<li>(.*?)</li>", section.group())] if section else []


def trained(task: stages.Task, name: str, run: Any) -> tuple[list[str], dict[str, float]]:
    """The report's warnings, and the figures of the model on held-out handwriting."""
    folder = f"run_{name}"
    stages.align(task, run.pipeline, folder, *stages.ONE_WORKER, "--eval_steps", 20, *run.flags, records=run.records)
    return warnings_of(task.folder / folder / "report.html"), compare.judged(task, folder)


@pytest.mark.parametrize("name", [*USUAL, *HOT])
def test_the_report_warns_of_those_models_that_got_worse(task: stages.Task, name: str) -> None:
    """A reward model, which answers nothing, is none if it ranks as a coin does."""
    found, figures = trained(task, name, {**USUAL, **HOT}[name])
    if "digits" in figures:
        got_worse = figures["digits"] < compare.judged(task, "sft")["digits"]
    else:
        got_worse = figures["preference"] < 0.5 + 1 / len(task.held_out_pairs.picture) ** 0.5
    assert bool(found) == got_worse, (figures, found)
