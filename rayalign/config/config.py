"""One run, fully described: an algorithm with its hyper-parameters, and the flags of `sections`.

An algorithm's own flags live with the algorithm.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rayalign.config.flags import Section, did_you_mean, flags_of, section_from_mapping
from rayalign.config.plugins import Plugin
from rayalign.config.sections import ClusterConfig, DataConfig, ModelConfig, OptimizerConfig, RunConfig, TunerConfig

if TYPE_CHECKING:
    from rayalign.algorithms import Algorithm


@dataclass(frozen=True)
class Config:
    """One run, fully described: the algorithm with its hyper-parameters, the sections above, and what --plugin brought."""

    algorithm: "Algorithm"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    tuner: TunerConfig = field(default_factory=TunerConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    plugins: tuple[Plugin, ...] = ()

    def __post_init__(self) -> None:
        if not self.run.safe_serialization and self.algorithm.needs.head != "value":
            raise ValueError(
                f"--safe_serialization false: only rm has a head to write in another format, {self.algorithm.name} has none; "
                "its weights are always .safetensors. Leave the flag out."
            )
        self._check_reference()
        self._check_sharding()
        self._check_rates()

    def _check_rates(self) -> None:
        parts = (
            ("vit", "vision tower", self.optimizer.vit_lr, self.tuner.freeze_vit),
            ("aligner", "aligner", self.optimizer.aligner_lr, self.tuner.freeze_aligner),
        )
        for part, name, rate, is_frozen in parts:
            if rate is not None and is_frozen:
                raise ValueError(
                    f"--{part}_lr {rate:g}: the {name} is not trained here. Pass --freeze_{part} false, too, or leave the rate "
                    "out."
                )

    def _check_reference(self) -> None:
        precompute = self.model.precompute_ref_log_probs
        if precompute and not self.algorithm.needs.reference:
            raise ValueError(
                f"--precompute_ref_log_probs true: {self.algorithm.name} compares with no reference here, so there is nothing "
                "to compute. Leave the flag out."
            )
        if precompute is False and self.algorithm.needs.reference and self.tuner.sft_type == "full":
            raise ValueError(
                "--precompute_ref_log_probs false with --sft_type full: the reference is the model at the start, and its "
                "weights are gone after the first step. Leave the flag out, or use --sft_type lora."
            )

    def _check_sharding(self) -> None:
        if not self.cluster.shards_models:
            return
        unfit = {
            "torch_compile": (self.model.torch_compile, "compiled layers are not sharded here"),
            "dtype": (self.model.dtype == "float16" and "float16", "its loss scale is not kept for sharded gradients"),
        }
        for name, (value, reason) in unfit.items():
            if value:
                raise ValueError(
                    f"--{name} {str(value).lower()} with --strategy fsdp: {reason}. Leave one of the two flags out."
                )

    def check_inputs(self) -> None:
        """Raises ValueError where no model or no data is given, without which no run can begin."""
        if not (self.model.model or self.model.model_type or self.model.adapter):
            raise ValueError("No model given: pass --model FOLDER_OR_HUB_ID, or --model_type with a registered name.")
        if not self.data.dataset:
            raise ValueError("No data given: pass --dataset with files, folders, globs or registered names.")

    @property
    def global_batch_size(self) -> int:
        """Pairs per optimizer step over all workers and accumulation steps, however many workers an elastic run has."""
        return self.optimizer.batch_size * self.optimizer.gradient_accumulation_steps * self.cluster.most_workers

    @property
    def uses_dropout(self) -> bool:
        """Whether adapters are trained with dropout."""
        return self.tuner.sft_type == "lora" and self.algorithm.needs.dropout and self.tuner.lora_dropout > 0

    def precomputes_reference(self, *, several_epochs: bool, several_runs: bool) -> bool:
        """Whether the reference's log-probabilities are computed before the training: as --precompute_ref_log_probs says, else
        where they are needed or will be used again."""
        asked = self.model.precompute_ref_log_probs
        if asked is not None or not self.algorithm.needs.reference:
            return bool(asked)
        return self.tuner.sft_type == "full" or several_runs or several_epochs

    def sections(self) -> tuple[Section, ...]:
        """The algorithm and the sections, in the order they are shown."""
        return (self.data, self.model, self.tuner, self.algorithm, self.optimizer, self.run, self.cluster)

    def to_dict(self) -> dict[str, Any]:
        """All flags with their values, flat; tuples as lists, so that YAML and JSON hold it."""
        flat = {f.name: getattr(section, f.name) for section in self.sections() for f in dataclasses.fields(section)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in flat.items()}

    def replace(self, values: Mapping[str, Any]) -> "Config":
        """A copy with some flags changed, wherever they live; values are converted and checked like the command line's."""
        return config_from_mapping(type(self.algorithm), {**self.to_dict(), **values}, plugins=self.plugins)


def section_types(algorithm: "type[Algorithm]") -> tuple[type[Section], ...]:
    """The section classes of a run of an algorithm, in the order of `Config.sections`."""
    return (DataConfig, ModelConfig, TunerConfig, algorithm, OptimizerConfig, RunConfig, ClusterConfig)


def config_from_mapping(algorithm: "type[Algorithm]", values: Mapping[str, Any], *, plugins: tuple[Plugin, ...] = ()) -> Config:
    """Builds a Config from flat flag values, as they come from words, YAML or Tune; strings are converted to the flag's type.
    `plugins` are loaded already.

    Raises ValueError that names the flag, the value and what it should have been, or the flags that do not exist.
    """
    known = [flag.name for section in section_types(algorithm) for flag in flags_of(section)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(" ".join(f"Unknown flag --{name}.{did_you_mean(name, known, prefix='--')}" for name in unknown))
    return Config(
        algorithm=section_from_mapping(algorithm, values),
        data=section_from_mapping(DataConfig, values),
        model=section_from_mapping(ModelConfig, values),
        tuner=section_from_mapping(TunerConfig, values),
        optimizer=section_from_mapping(OptimizerConfig, values),
        run=section_from_mapping(RunConfig, values),
        cluster=section_from_mapping(ClusterConfig, values),
        plugins=plugins,
    )
