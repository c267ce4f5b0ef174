"""The flags of the verb evaluate, beside those of `inference`."""

from dataclasses import dataclass
from typing import Literal

from rayalign.config.flags import check_bounds, flag


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation"""

    ref_model: str = flag(
        "auto",
        "Model or adapter that implicit rewards and drift are measured from. auto: what the model's run started from, else an "
        "adapter's base model; none: no reference.",
    )
    beta: float = flag(0.1, "Implicit rewards are beta (log p - log p of the reference).", above=0)
    sample_kl: bool = flag(
        False,
        "Draw a response to each prompt from the model (at most 128 tokens) and report the KL divergence from the reference on "
        "these; else only the drift on the chosen responses is told.",
    )
    compare: str | None = flag(None, "A second model or adapter, evaluated on the same records, with paired tests.")
    image_checks: tuple[Literal["shuffled", "ablated", "none"], ...] = flag(
        ("shuffled", "ablated"),
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
    judge_model: str | None = flag(None, "The name that --judge_url knows the judge by.")

    def __post_init__(self) -> None:
        check_bounds(self)
        if "none" in self.image_checks and len(self.image_checks) > 1:
            raise ValueError(f"--image_checks {' '.join(self.image_checks)}: none stands alone.")
        if bool(self.judge_url) != bool(self.judge_model):
            raise ValueError("--judge_url and --judge_model belong together: give both.")
