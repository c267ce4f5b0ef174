"""What benchmarks say of a run's checkpoints (--eval_benchmarks): a file of the run's folder for each.

`benchmarks` writes them on the driver, beside the training. By these files a checkpoint is judged once, whatever ends the run
in between, and is kept until it was; the first worker reads them for its lines of metrics.
"""

import hashlib
import json
from collections.abc import Mapping

from rayalign.config.config import Config
from rayalign.config.sections import RunConfig
from rayalign.storage import Store
from rayalign.training.best import Best
from rayalign.training.checkpoint_folder import Checkpoint, whole_checkpoints

RESULTS = "benchmarks"
"""The folder of a run's folder with a file for each checkpoint that was judged."""


class BenchmarkResults:
    """The results in a run's folder to the questions that its flags ask now; of none where they name no benchmark."""

    def __init__(self, config: Config) -> None:
        self.folder = Store.at(str(config.run.output_dir))
        self._is_asked = bool(config.run.eval_benchmarks)
        asked = json.dumps([sorted(config.run.eval_benchmarks), config.run.max_eval_questions, config.data.data_seed])
        self._suffix = f"_{hashlib.sha256(asked.encode()).hexdigest()[:8]}.json"
        self._known: dict[int, dict[str, float]] = {}
        self._passed_over: set[str] = set()
        """Checkpoints that could not be judged; the run may come to the same step again, with a sound one."""

    def read(self) -> Mapping[int, Mapping[str, float]]:
        """The metrics by step, by their names in metrics.jsonl, in the order of the steps."""
        for file in (self.folder / RESULTS).list() if self._is_asked else ():
            number = file.name.removeprefix("step_").removesuffix(self._suffix)
            if number.isdecimal() and int(number) not in self._known:
                content = file.read_json_object()
                if content["problem"] is None:
                    self._known[int(number)] = content["metrics"]
                else:
                    self._passed_over.add(content["checkpoint"])
        return dict(sorted(self._known.items()))

    def write(self, checkpoint: Checkpoint, metrics: Mapping[str, float], *, problem: str | None = None) -> None:
        """Keeps the metrics of a checkpoint, or why it has none."""
        file = self.folder / RESULTS / f"step_{checkpoint.step:08d}{self._suffix}"
        file.write_json({"step": checkpoint.step, "checkpoint": checkpoint.store.name, "metrics": metrics, "problem": problem})

    def lines(self) -> list[dict[str, float]]:
        """The metrics as lines of metrics.jsonl."""
        return [{"step": step, **metrics} for step, metrics in self.read().items() if metrics]

    def waits(self, checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint is still to be judged, so that it must not be deleted."""
        return self._is_asked and checkpoint.step not in self.read() and checkpoint.store.name not in self._passed_over

    def waiting(self) -> list[Checkpoint]:
        """The whole checkpoints that are still to be judged, the oldest first."""
        return [found for found in reversed(whole_checkpoints(self.folder / "checkpoints")) if self.waits(found)]


def best_of(results: Mapping[int, Mapping[str, float]], run: RunConfig) -> Best:
    """The best checkpoint by its benchmarks, whatever the order in which they were judged; one that could answer no question of
    the benchmark that decides is no candidate."""
    best = Best()
    for step, metrics in sorted(results.items()):
        if not {run.metric_for_best_model, f"eval_{run.metric_for_best_model}"}.isdisjoint(metrics):
            best = best.after(step, metrics, run)
    return best
