"""Runs whose disk fills up or turns read-only, and runs that meet in a folder: each ends right, or with a sentence and goes on.

    python -m tests.soak.disks --folder build/soak       # a part of `make soak`

The disks are mounted in a namespace of this program's own (`unshare -rm`), in which the cluster runs, too; so this needs no
rights. Cases are kept in `disks.jsonl` of the folder: the same command goes on with those that are not there.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.soak.processes import Nodes
from tests.soak.runs import VARIANTS, inputs_in
from tests.soak.storm import LONGEST_WAIT, Run, emptied, last_line, undisturbed
from tests.soak.verdict import differences

OWN_NAMESPACE = "RAYALIGN_SOAK_NAMESPACE"
VARIANT = "lora"
ROOM = 64 * 2**20


@dataclass(frozen=True)
class Case:
    """One run of its own `place`, beside one that was left `calm`; `findings` of it are in words."""

    nodes: Nodes
    inputs: tuple[Path, Path]
    calm: Path
    place: Path

    def run(self, name: str = ".") -> Run:
        """A run in the place, or in a folder of it."""
        (self.place / name).mkdir(exist_ok=True)
        return Run(self.nodes, VARIANTS[VARIANT].command(self.inputs, self.place / name), self.place / name)

    def with_cache(self) -> "Case":
        """The same, with the records prepared."""
        shutil.copytree(self.calm / "cache", self.place / "cache")
        return self

    def end_of(self, run: Run) -> int:
        return run.process.wait(timeout=LONGEST_WAIT)

    def goes_on(self, run: Run, *, from_checkpoint: bool) -> list[str]:
        """Starts the same command again; it must end as the one that was left alone."""
        run.start()
        code = self.end_of(run)
        found = [f"the same command ended with {code}: {last_line(run.log)}"] if code else []
        starts_anew = "Training DPO from step 0 " in run.log.read_text()
        found += ["the same command did not go on from a checkpoint"] if from_checkpoint and starts_anew else []
        return found or differences(self.calm / "run", run.folder / "run")

    def fails(self, run: Run, *words: str) -> list[str]:
        """The run must end, with these words in its last line and no traceback."""
        code, text = self.end_of(run), run.log.read_text(errors="replace")
        said = last_line(run.log)
        found = ["it ended well"] if not code else []
        found += [f"its last line lacks {missing!r}: {said}" for missing in words if missing not in said]
        return found + ["it shows a traceback"] * ("Traceback" in text)


def mount(*words: object) -> None:
    subprocess.run(["mount", *map(str, words)], check=True)


def disk(folder: Path, size: int) -> Path:
    """A file system of its own, of so many bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    mount("-t", "tmpfs", "-o", f"size={size}", "none", folder)
    return folder


def leave(folder: Path, free: int) -> None:
    """Makes a disk as large as what it holds, and so many bytes."""
    for _ in range(20):  # a run may write in between, and the kernel refuses a size that is too small
        state = os.statvfs(folder)
        with contextlib.suppress(subprocess.CalledProcessError):
            mount("-o", f"remount,size={(state.f_blocks - state.f_bfree) * state.f_frsize + free}", folder)
            return
    raise SystemExit(f"{folder} could not be made smaller.")


def make_read_only(folder: Path) -> None:
    """By a mount upon the folder: one that has a file open for writing can't be made so itself."""
    mount("--bind", folder, folder)
    mount("-o", "remount,ro,bind", folder)


def wait_for_checkpoints(run: Run, count: int) -> None:
    def are_there(text: str) -> bool:
        return len(list((run.folder / "run" / "checkpoints").glob("step_*/manifest.json"))) >= count

    if not run.wait_for(are_there):
        raise SystemExit(f"The run ended before its checkpoints: {last_line(run.log)}")


FULL = ("its storage: a disk is full", "Free some space.")
READ_ONLY = ("its storage: a file system is read-only",)


def full_in_preparation(case: Case) -> list[str]:
    cache, run = disk(case.place / "cache", 64 * 2**10), case.run()
    run.start()
    found = case.fails(run, *FULL, "before the first step")
    found += ["records are taken for prepared"] * bool(list(cache.rglob("manifest.json")))
    leave(cache, ROOM)
    return found + case.goes_on(run, from_checkpoint=False)


def full_at_a_checkpoint(case: Case) -> list[str]:
    folder, run = disk(case.place / "run", ROOM), case.with_cache().run()
    run.start()
    wait_for_checkpoints(run, 3)
    leave(folder, 0)
    found = case.fails(run, *FULL, "is kept, the same command goes on from it.")
    leave(folder, ROOM)
    return found + case.goes_on(run, from_checkpoint=True)


def full_at_the_export(case: Case) -> list[str]:
    folder, run = disk(case.place / "run" / "model", 16 * 2**10), case.with_cache().run()
    run.start()
    found = case.fails(run, *FULL, "is kept, the same command goes on from it.")
    found += ["a part of the weights is there"] * (folder / "adapter_model.safetensors").exists()
    leave(folder, ROOM)
    return found + case.goes_on(run, from_checkpoint=True)


def read_only_folder(case: Case) -> list[str]:
    found = []
    for name in ("run", "cache"):
        folder, run = case.place / name / name, case.run(name)
        folder.mkdir()
        make_read_only(folder)
        run.start()
        found += [f"{name}: {finding}" for finding in case.fails(run, "ead-only file system")]
        found += [f"{name}: it began to train"] * ("train worker" in run.log.read_text())
    return found


def read_only_from_a_checkpoint_on(case: Case) -> list[str]:
    folder, run = disk(case.place / "run", ROOM), case.with_cache().run()
    run.start()
    wait_for_checkpoints(run, 3)
    make_read_only(folder)
    found = case.fails(run, *READ_ONLY, "is kept, the same command goes on from it.")
    subprocess.run(["umount", "--lazy", folder], check=True)
    return found + case.goes_on(run, from_checkpoint=True)


def two_runs_on_one_folder(case: Case) -> list[str]:
    first, second = case.with_cache().run(), case.run()
    first.start()
    first.wait_for(lambda text: "Looking at the run's paths" in text)
    second.starts = 10  # a log of its own
    second.start()
    found = case.fails(second, "is in use by another run (process")
    code = case.end_of(first)
    return found + ([f"the first ended with {code}"] if code else differences(case.calm / "run", case.place / "run"))


def two_runs_on_one_cache(case: Case) -> list[str]:
    runs = [case.run(name) for name in ("one", "other")]
    (case.place / "cache").mkdir()
    for run in runs:
        (run.folder / "cache").symlink_to(case.place / "cache")
        run.start()
    found = []
    for run in runs:
        code = case.end_of(run)
        words = [f"ended with {code}: {last_line(run.log)}"] if code else differences(case.calm / "run", run.folder / "run")
        found += [f"{run.folder.name}: {word}" for word in words]
    return found


CASES: tuple[Callable[[Case], list[str]], ...] = (
    *(full_in_preparation, full_at_a_checkpoint, full_at_the_export, read_only_folder, read_only_from_a_checkpoint_on),
    *(two_runs_on_one_folder, two_runs_on_one_cache),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/soak"), help="where runs and disks.jsonl are kept")
    parser.add_argument("--cases", nargs="+", choices=[case.__name__ for case in CASES])
    arguments = parser.parse_args()
    if OWN_NAMESPACE not in os.environ:
        words = ("unshare", "-rm", sys.executable, "-m", "tests.soak.disks", *sys.argv[1:])
        return subprocess.run(words, env={**os.environ, OWN_NAMESPACE: "1"}, check=False).returncode
    folder = arguments.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / "disks.jsonl"
    told = {line["case"]: line for line in map(json.loads, results.read_text().splitlines())} if results.exists() else {}
    names = arguments.cases or [case.__name__ for case in CASES]
    with Nodes({"RAYALIGN_LOG_COLORS": "0"}) as nodes:
        for case in CASES:
            if case.__name__ in told or case.__name__ not in names:
                continue
            calm = undisturbed(nodes, folder, VARIANT)
            place = emptied(folder / case.__name__)
            began = time.monotonic()
            findings = case(Case(nodes, inputs_in(folder), calm, place))
            told[case.__name__] = {"case": case.__name__, "findings": findings, "seconds": round(time.monotonic() - began)}
            print(json.dumps(told[case.__name__]), flush=True)
            with results.open("a") as lines:
                lines.write(json.dumps(told[case.__name__]) + "\n")
    return int(any(line["findings"] for line in told.values()))


if __name__ == "__main__":
    sys.exit(main())
