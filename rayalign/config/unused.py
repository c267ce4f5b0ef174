"""Flags that were given and that nothing reads, beside the others of a run: told before it starts, as its user expects them to
do something. Flags that contradict each other are refused instead."""

from dataclasses import dataclass
from typing import Any

from rayalign.config.config import Config
from rayalign.config.flags import flags_of


@dataclass(frozen=True)
class Unused:
    """A flag that nothing reads, and the flag that is the reason."""

    flag: str
    because: str
    words: str


def unused_flags(config: Config) -> list[Unused]:
    """The flags of a run that differ from their defaults and change nothing."""
    given = _given(config)
    full, data = config.tuner.sft_type == "full", config.data
    reasons: list[tuple[bool, str, str, tuple[str, ...]]] = [
        (full, "sft_type", "--sft_type full trains no adapter", tuple(n for n in given if n.startswith("lora_"))),
        (
            not full and not config.algorithm.needs.dropout and config.tuner.lora_dropout > 0,
            "rlhf_type",
            f"{config.algorithm.name} compares log-probs, which dropout would blur, so that none is used",
            ("lora_dropout",),
        ),
        (bool(data.val_dataset), "val_dataset", "--val_dataset names what is held out", ("dataset_test_ratio",)),
        (config.optimizer.max_steps is not None, "max_steps", "--max_steps tells the run's end", ("num_train_epochs",)),
        (not config.run.eval_benchmarks, "eval_benchmarks", "there are no --eval_benchmarks", ("max_eval_questions",)),
        (
            not full and config.cluster.shards_models,
            "sft_type",
            "adapters are not sharded, and their gradients are added up once a step",
            ("sync_each_batch",),
        ),
    ]
    return [
        Unused(name, because, f"--{name} {_word(given[name])} changes nothing: {reason}.")
        for is_so, because, reason, names in reasons
        for name in names
        if is_so and name in given
    ]


def _given(config: Config) -> dict[str, Any]:
    """The flags that differ from their defaults, with their values."""
    flags = ((section, flag) for section in config.sections() for flag in flags_of(type(section)))
    values = {flag.name: (getattr(section, flag.name), flag.default) for section, flag in flags}
    return {name: value for name, (value, default) in values.items() if value != default}


def _word(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value).lower()
