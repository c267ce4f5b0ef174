"""The flags of the verb evaluate, beside those of `inference`."""

from dataclasses import dataclass
from typing import Literal

from rayalign.config.flags import check_bounds, flag, same_flag
from rayalign.config.inference_verbs import ScoreConfig

ALL_CHECKS: tuple[Literal["shuffled", "ablated"], ...] = ("shuffled", "ablated")


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation"""

    ref_model: str = flag(
        "auto",
        "Model or adapter that implicit rewards and drift are measured from. auto: what the model's run started from, else an "
        "adapter's base model; none: no reference.",
    )
    beta: float | None = flag(
        None,
        "Implicit rewards are beta (log p - log p of the reference). Default: 0.1; of a scorer that of its run.",
        above=0,
    )
    sample_kl: bool = flag(
        False,
        "Draw a response to each prompt from the model (at most 128 tokens) and report the KL divergence from the reference on "
        "these; else only the drift on the chosen responses is told.",
    )
    compare: str | None = flag(None, "A second model or adapter, evaluated on the same records, with paired tests.")
    image_checks: tuple[Literal["shuffled", "ablated", "none"], ...] = flag(
        ALL_CHECKS,
        "Pairs are scored once more with the pictures of another record (shuffled) and with damaged ones (ablated), each of "
        "which takes as long again; none: neither.",
    )
    benchmarks: tuple[str, ...] = flag(
        (),
        "NAME:FOLDER ...: benchmarks with the folders of their own files: pope, mmstar, hallusion_bench, vl_rewardbench, "
        "multimodal_rewardbench, mm_rlhf_rewardbench, chair, amber, mmhal_bench.",
    )
    max_questions: int | None = flag(
        None, "Of a benchmark with more questions, so many are drawn with --data_seed. Default: all.", at_least=1
    )
    judge_url: str | None = flag(
        None,
        "An OpenAI-compatible API that judges answers, such as http://localhost:8000/v1. Its key is read from OPENAI_API_KEY.",
    )
    judge_model: str | None = flag(None, "The name that --judge_url, or the server of --scorer judge=URL, knows the judge by.")
    scorer: tuple[str, ...] = flag(
        (),
        "Instead of a model: what scores the two responses of each pair, as in `rayalign score`, one or several: "
        "reward_model=FOLDER, implicit_reward=FOLDER, likelihood=FOLDER, per_token=FOLDER, python=MODULE:FUNCTION or "
        "python=FILE.py:FUNCTION, judge=URL. Of preference data and of benchmarks of pairs.",
    )
    ensemble: Literal["mean", "min"] = same_flag(ScoreConfig, "ensemble")
    judge_prompt: str | None = same_flag(ScoreConfig, "judge_prompt")
    judge_pattern: str = same_flag(ScoreConfig, "judge_pattern")

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.scorer:
            self._check_beside_scorers()
            return
        of_scorers = ("ensemble", "judge_prompt", "judge_pattern")
        unused = next((name for name in of_scorers if getattr(self, name) != getattr(ScoreConfig(), name)), None)
        if unused is not None:
            raise ValueError(f"--{unused}: belongs to --scorer, which is not given. Leave it out.")
        if "none" in self.image_checks and len(self.image_checks) > 1:
            raise ValueError(f"--image_checks {' '.join(self.image_checks)}: none stands alone.")
        if bool(self.judge_url) != bool(self.judge_model):
            raise ValueError("--judge_url and --judge_model belong together: give both.")

    def _check_beside_scorers(self) -> None:
        """Raises ValueError for flags of a model's evaluation."""
        words = f"--scorer {' '.join(self.scorer)}"
        of_models = {"compare": self.compare, "sample_kl": self.sample_kl, "judge_url": self.judge_url}
        of_models["image_checks"] = self.image_checks not in (ALL_CHECKS, ("none",))
        unused = next((name for name, value in of_models.items() if value), None)
        if unused == "judge_url":
            raise ValueError(f"--judge_url rates what a model writes, and {words} scores pairs. Write --scorer judge=URL.")
        if unused is not None:
            raise ValueError(f"--{unused} is of a model, and {words} stands in the place of one. Leave one of them out.")
        if self.ref_model == "none":
            raise ValueError(f"--ref_model none beside {words}: an implicit reward needs its reference. Leave it out.")

    def score_config(self) -> ScoreConfig:
        """The flags of --scorer as those of the verb score."""
        reference = None if self.ref_model == "auto" else self.ref_model
        return ScoreConfig(
            self.scorer, self.ensemble, self.beta, reference, self.judge_model, self.judge_prompt, self.judge_pattern
        )
