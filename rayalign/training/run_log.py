"""What a worker tells of its run: lines of the log, metrics.jsonl and where metrics are sent, warnings, and the page."""

import functools
import logging
from collections.abc import Callable, Mapping

import torch

from rayalign.config.config import Config
from rayalign.data.prepare import RunData
from rayalign.policy.policy import Policy
from rayalign.progress import StepProgress
from rayalign.storage import Store
from rayalign.training.benchmark_results import BenchmarkResults
from rayalign.training.gauges import Gauges
from rayalign.training.held_out import HeldOut
from rayalign.training.metric_names import BY_REWARD_MODEL, BY_SUM, BY_TOKEN, SHUFFLED
from rayalign.training.metrics import MetricsLog
from rayalign.training.mfu import flops_per_token, peak_tflops
from rayalign.training.run_report import Background, Scores, write_report
from rayalign.training.run_times import note_workers
from rayalign.training.sent_lines import key_of
from rayalign.training.sinks import Reporting, reporting_of

logger = logging.getLogger(__name__)

SHOWN_STEP = ("loss", "rewards/accuracies", "rewards/margins", "grad_norm")

SHOWN_EVALUATION = tuple(
    f"eval_{name}"
    for name in (
        *("loss", BY_SUM, BY_TOKEN, BY_REWARD_MODEL, "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected"),
        *("conditional/accuracies", "exact_match"),
    )
)
"""What the log's line of an evaluation shows; all are in metrics.jsonl."""


def teller(rank: int) -> Callable[..., None]:
    """What logs a line of the run; of all workers the first one does."""
    return logger.info if rank == 0 else lambda message, *values: None


class RunLog:
    """What a worker of a run from and to some `steps` tells. The first one tells all; the others know their newest metrics.

    `latest`: the newest value of every metric. `progress`: how fast the steps are.
    """

    def __init__(
        self,
        config: Config,
        data: RunData,
        policy: Policy,
        gauges: Gauges,
        *,
        rank: int,
        num_workers: int,
        steps: tuple[int, int],
    ) -> None:
        self._config, self._data = config, data
        self._folder = Store.at(str(config.run.output_dir))
        self._say = teller(rank)
        self._num_steps = steps[1]
        self._peak_flops = _peak_flops(policy, gpus=num_workers * (config.cluster.gpus_per_worker or 0))
        self._flops_per_token = flops_per_token(policy)
        self._on_gpu = policy.device.type == "cuda"
        self._warned: set[str] = set()
        self._page = Background()
        self.progress = StepProgress(*steps, every={"evaluation": config.run.eval_steps, "saving": config.run.save_steps})
        self.latest: dict[str, float] = {}
        self._metrics: MetricsLog | None = None
        self._reporting: Reporting | None = None
        if rank == 0:
            self._metrics = MetricsLog(self._folder / "metrics.jsonl", start_step=steps[0])
            lines, sent = self._metrics.lines, self._metrics.sent
            for line in lines:
                self.latest |= line
            others = {"Prometheus": gauges}
            flags = config.to_dict()
            self._reporting = reporting_of(config.run.report_to, self._folder, flags, lines=lines, sent=sent, others=others)

    def step(self, metrics: Mapping[str, float]) -> None:
        """Tells the metrics of the newest steps."""
        if self._peak_flops:
            metrics = {**metrics, "mfu": metrics["tokens_per_second"] * self._flops_per_token / self._peak_flops}
        self._keep(metrics)
        figures = [f"{name} {metrics[name]:.4g}" for name in SHOWN_STEP if name in metrics]
        if self._on_gpu:
            figures += [f"{metrics['tokens_per_second']:.0f} tokens/s"]
            figures += [f"MFU {metrics['mfu']:.1%}"] if "mfu" in metrics else []
        figures += [self.progress.words] if self.progress.words else []
        self._say("Step %d/%d  %s", int(metrics["step"]), self._num_steps, "  ".join(figures))

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Tells the metrics of the held-out records."""
        if metrics:
            self._keep({"step": step, **metrics})
        shown = "  ".join(f"{name} {metrics[name]:.4g}" for name in SHOWN_EVALUATION if name in metrics)
        self._say("Evaluation at step %d  %s", step, shown)

    def shuffled(self, step: int, metrics: Mapping[str, float]) -> None:
        """Tells the metrics of the held-out records on other pictures, if there are some."""
        if metrics:
            self._keep({"step": step, **metrics})
            shown = [f"{name} {value:.4g}" for name, value in metrics.items() if name.endswith((SHUFFLED, "image_reliance"))]
            self._say("With pictures of other records  %s", "  ".join(shown))

    def benchmarks(self, results: BenchmarkResults, *, up_to: int) -> None:
        """Writes what benchmarks have said by now of checkpoints up to a step, each at its own step."""
        if self._metrics is None or self._reporting is None:
            return
        told = {key_of(line) for line in self._metrics.lines}
        for line in results.lines():
            if line["step"] <= up_to and key_of(line) not in told and self._metrics.append(line):
                self._reporting.log(line)

    def keep(self) -> None:
        """Before a checkpoint of these steps is written."""
        if self._metrics is not None:
            self._metrics.keep()

    def warn(self, held_out: HeldOut, *, step: int, is_finished: bool) -> None:
        """Says what looks wrong in the run up to the step whose weights were evaluated last; each thing once."""
        if self._metrics is None:
            return
        for kind, words in held_out.problems(self._metrics.lines, step=step, is_finished=is_finished).items():
            if kind not in self._warned:
                logger.warning("Warning: %s", words)
            self._warned.add(kind)

    def report(self, scores: Scores, seconds: Mapping[str, float]) -> None:
        """Brings the run's page up to date, beside the training: with the held-out pairs' own values, and the seconds of this
        worker's stages."""
        if self._metrics is not None:
            self._page.run(functools.partial(self._write_page, list(self._metrics.lines), scores, seconds))

    def end(self, scores: Scores, seconds: Mapping[str, float]) -> None:
        """As a run ends that can't go on: its page tells of the last lines, too."""
        self._page.wait()
        self.report(scores, seconds)
        self.close()

    def close(self) -> None:
        """Writes and sends what is still to be written and sent."""
        if self._metrics is not None and self._reporting is not None:
            self._metrics.flush()
            self._reporting.close()
            self._page.wait()

    def _keep(self, line: Mapping[str, float]) -> None:
        """Writes a line of metrics, and sends it on where it is a new one."""
        self.latest |= line
        if self._metrics is not None and self._reporting is not None and self._metrics.append(line):
            self._reporting.log(line)

    def _write_page(self, metrics: list[dict[str, float]], scores: Scores, seconds: Mapping[str, float]) -> None:
        times = note_workers(self._folder, seconds)
        write_report(self._folder, self._config, self._data, scores, metrics=metrics, num_steps=self._num_steps, times=times)


def _peak_flops(policy: Policy, *, gpus: float) -> float | None:
    """Operations a second of all GPUs at their best; None where that is not known or the arithmetic is not the table's."""
    peak = peak_tflops(torch.cuda.get_device_name(policy.device)) if policy.device.type == "cuda" else None
    if peak is None or not gpus or policy.dtype not in (torch.bfloat16, torch.float16):
        return None
    return peak * 1e12 * gpus
