"""The flags of a plan: the GPUs that it is for."""

from dataclasses import dataclass

from rayalign.config.flags import check_bounds, flag


@dataclass(frozen=True)
class PlanConfig:
    """Plan"""

    gpu_memory_gb: float = flag(80, "Memory of one GPU.", above=0)
    gpu_tflops: float = flag(
        989,
        "Peak of one GPU in TFLOPS, dense, in the run's --dtype; in bfloat16 an H100 SXM has 989, an A100 312, an L4 121.",
        above=0,
    )
    mfu: float = flag(
        0.4, "Share of the peak that training reaches, counting recomputation as work. 0.3 to 0.5 is usual.", above=0, at_most=1
    )
    gpus: int | None = flag(None, "GPUs that the hours are for. Default: as many as --num_workers workers need.", at_least=1)
    price_per_hour: float | None = flag(None, "Price of one GPU for an hour. Default: no cost is told.", at_least=0)

    def __post_init__(self) -> None:
        check_bounds(self)
