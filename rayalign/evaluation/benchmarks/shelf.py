"""All benchmarks, by the names that --benchmarks takes."""

from collections.abc import Mapping

from rayalign.config.flags import did_you_mean
from rayalign.evaluation.benchmarks.amber import AMBER
from rayalign.evaluation.benchmarks.benchmark import Benchmark
from rayalign.evaluation.benchmarks.chair import CHAIR
from rayalign.evaluation.benchmarks.hallusion_bench import HALLUSION_BENCH
from rayalign.evaluation.benchmarks.mm_rlhf_rewardbench import MM_RLHF_REWARDBENCH
from rayalign.evaluation.benchmarks.mmhal_bench import MMHAL_BENCH
from rayalign.evaluation.benchmarks.mmstar import MMSTAR
from rayalign.evaluation.benchmarks.multimodal_rewardbench import MULTIMODAL_REWARDBENCH
from rayalign.evaluation.benchmarks.pope import POPE
from rayalign.evaluation.benchmarks.vl_rewardbench import VL_REWARDBENCH

BENCHMARKS: Mapping[str, Benchmark] = {
    "pope": POPE,
    "mmstar": MMSTAR,
    "hallusion_bench": HALLUSION_BENCH,
    "vl_rewardbench": VL_REWARDBENCH,
    "multimodal_rewardbench": MULTIMODAL_REWARDBENCH,
    "mm_rlhf_rewardbench": MM_RLHF_REWARDBENCH,
    "chair": CHAIR,
    "amber": AMBER,
    "mmhal_bench": MMHAL_BENCH,
}


def parse_benchmarks(arguments: tuple[str, ...], *, flag: str = "--benchmarks") -> dict[str, str]:
    """The folder of each benchmark that a flag names as NAME:FOLDER. Raises ValueError."""
    folders: dict[str, str] = {}
    for argument in arguments:
        name, colon, folder = argument.partition(":")
        name = name.replace("-", "_").lower()
        if name not in BENCHMARKS:
            hint = did_you_mean(name, BENCHMARKS) or f" There are {', '.join(BENCHMARKS)}."
            raise ValueError(f"{flag} {argument}: there is no benchmark {name}.{hint}")
        if not colon or not folder:
            raise ValueError(f"{flag} {argument}: where are its files? Write {name}:FOLDER; it needs {BENCHMARKS[name].files}.")
        if name in folders:
            raise ValueError(f"{flag} {argument}: {name} is there twice. Give it once.")
        folders[name] = folder
    return folders
