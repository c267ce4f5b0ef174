"""Every flag of rayalign, once: frozen dataclasses by concern, read by the command line, YAML files and Tune alike.

A field is a flag: its name, type, default, bounds and help are written here and nowhere else. An algorithm's own flags
live with the algorithm; `Config` joins both.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rayalign.flags import Flag, check_bounds, did_you_mean, flag, flags_of, section_from_mapping

__all__ = [
    "ClusterConfig",
    "Config",
    "DataConfig",
    "ExportConfig",
    "Flag",
    "ModelConfig",
    "OptimizerConfig",
    "RunConfig",
    "TuneConfig",
    "TunerConfig",
    "check_bounds",
    "config_from_mapping",
    "flag",
    "flags_of",
    "section_from_mapping",
    "section_types",
]


@dataclass(frozen=True)
class DataConfig:
    """Data"""

    dataset: tuple[str, ...] = flag(
        (),
        "Training records: files, folders, globs or registered names (rlaif-v), local or s3:// gs://; NAME#N draws N of them; "
        "several mix.",
    )
    val_dataset: tuple[str, ...] = flag(
        (), "Held-out records, written like --dataset. Empty: --dataset_test_ratio of --dataset is held out."
    )
    dataset_test_ratio: float = flag(
        0.01, "Fraction of the training records held out when --val_dataset is empty.", at_least=0, at_most=0.9
    )
    max_length: int = flag(2048, "Longest prompt + response in tokens, image tokens included.", above=1)
    truncation_strategy: Literal["delete", "left", "right", "raise"] = flag(
        "delete",
        "What happens to a longer record. delete: it is dropped and counted; left: the oldest history turns go first; "
        "right: the responses' tails go; raise: the run stops. Image tokens are never cut.",
    )
    max_pixels: int | None = flag(
        None, "Images with more pixels (width x height) are scaled down to this many before the processor.", above=0
    )
    max_dropped_fraction: float = flag(
        0.05,
        "The run stops with a table of reasons when more than this fraction of the rows is unusable.",
        at_least=0,
        at_most=1,
    )
    image_root: str | None = flag(None, "Folder that relative image paths start from. Default: the data set file's own folder.")
    allow_image_urls: bool = flag(False, "Fetch images named by http(s) URLs. Private addresses stay refused.")
    data_seed: int = flag(42, "Seed of NAME#N draws, the held-out split and the training order.", at_least=0)
    cache_dir: str | None = flag(
        None,
        "Where encoded records are kept for reuse; shared storage on a cluster. Default: .rayalign_cache beside --output_dir.",
    )

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True)
class ModelConfig:
    """Model"""

    model: str | None = flag(None, "Model folder or hub id. The folder of an adapter (a run's model/) continues from it.")
    model_type: str | None = flag(None, "Registered model name, such as llava1_6-mistral-7b-instruct; stands in for --model.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag(
        "auto", "Weights' type. auto: bfloat16 on a GPU, float32 on CPUs."
    )
    attn_implementation: Literal["sdpa", "eager"] = flag("sdpa", "Attention kernel of the language model.")
    gradient_checkpointing: bool = flag(
        True, "Recompute activations in the backward pass: less memory, about a third more time."
    )
    trust_remote_code: bool = flag(False, "Run Python code that comes with the model. Only for sources you trust.")

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True)
class TunerConfig:
    """Tuner"""

    sft_type: Literal["lora", "full"] = flag(
        "lora",
        "lora: adapters on the language model; full: all of its weights. Vision tower and projector stay frozen.",
    )
    lora_target_modules: tuple[str, ...] = flag(
        ("DEFAULT",),
        "DEFAULT: the language model's attention q, k, v; ALL: every linear layer of the language model; else module names, or "
        "one regular expression.",
    )
    lora_rank: int = flag(8, "Rank of the LoRA matrices.", at_least=1)
    lora_alpha: float = flag(32, "LoRA scale: updates are multiplied by alpha / rank.", above=0)
    lora_dropout: float = flag(
        0.05,
        "Dropout before the LoRA matrices; SFT only, it is off where two policies or two responses are compared.",
        at_least=0,
        at_most=0.99,
    )

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimisation"""

    num_train_epochs: float = flag(1.0, "Passes over the training records.", above=0)
    max_steps: int | None = flag(None, "Optimizer steps; overrides --num_train_epochs.", at_least=1)
    batch_size: int = flag(1, "Pairs per worker and micro-batch.", at_least=1)
    gradient_accumulation_steps: int = flag(
        16, "Micro-batches per worker and optimizer step; global batch = batch_size x accumulation x workers.", at_least=1
    )
    learning_rate: float = flag(5e-5, "Peak learning rate of AdamW.", above=0)
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = flag("cosine", "Decay after the warm-up, to 0.")
    warmup_ratio: float = flag(0.03, "Fraction of the steps over which the learning rate rises.", at_least=0, at_most=1)
    weight_decay: float = flag(0.1, "AdamW's weight decay; not on biases and norms.", at_least=0)
    adam_beta1: float = flag(0.9, "AdamW's beta1.", at_least=0, at_most=0.9999999)
    adam_beta2: float = flag(0.95, "AdamW's beta2.", at_least=0, at_most=0.9999999)
    adam_epsilon: float = flag(1e-8, "AdamW's epsilon.", above=0)
    max_grad_norm: float = flag(1.0, "Gradients are scaled down to this norm; 0 turns it off.", at_least=0)
    seed: int = flag(42, "Seed of adapter initialisation and dropout.", at_least=0)

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True)
class RunConfig:
    """Output"""

    output_dir: str | None = flag(
        None, "The run's folder: local, shared or s3:// gs://. Default: output/<algorithm> below the current folder."
    )
    logging_steps: int = flag(5, "Steps between two lines of metrics.", at_least=1)
    eval_steps: int = flag(50, "Steps between two passes over the held-out records (also at the end).", at_least=1)
    save_steps: int = flag(50, "Steps between two checkpoints (also at the end).", at_least=1)
    save_total_limit: int = flag(2, "Checkpoints kept.", at_least=1)
    safe_serialization: bool = flag(
        True, "Write a reward model's head as value_head.safetensors; false: as value_head.bin. All else is always safetensors."
    )
    resume: bool = flag(True, "Continue an unfinished run of --output_dir that has the same configuration.")
    overwrite: bool = flag(False, "Delete what --output_dir holds and start anew.")

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True)
class ClusterConfig:
    """Cluster"""

    num_workers: int = flag(1, "Train workers.", at_least=1)
    gpus_per_worker: float | None = flag(
        None, "GPUs of each worker. Default: 1 where the cluster has GPUs, else 0.", at_least=0
    )
    cpus_per_worker: float = flag(1, "CPUs of each worker; its threads.", above=0)
    strategy: Literal["auto", "ddp", "device_map"] = flag(
        "auto",
        "ddp: a whole model on each worker; device_map: a worker spreads its model over its GPUs. "
        "auto: device_map where a worker has several GPUs, else ddp.",
    )
    max_failures: int = flag(3, "Restarts after a worker or node is lost, each from the newest checkpoint.", at_least=0)

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True)
class TuneConfig:
    """Search"""

    search: tuple[str, ...] = flag(
        (),
        "What to try: FLAG=grid:A,B,C (every one of them, with every other grid), FLAG=choice:A,B,C, FLAG=uniform:LOW:HIGH or "
        "FLAG=loguniform:LOW:HIGH (drawn for each trial).",
    )
    num_samples: int = flag(
        8, "Trials drawn where --search has something to draw; a grid runs whole for each draw.", at_least=1
    )
    max_concurrent_trials: int | None = flag(
        None, "Trials that run at a time. Default: as many as fit the cluster.", at_least=1
    )
    metric: str = flag("eval_rewards/accuracies", "Metric that ranks the trials; SFT has eval_loss (with --mode min).")
    mode: Literal["max", "min"] = flag("max", "Whether a high or a low --metric is good.")

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True)
class ExportConfig:
    """Export"""

    model: str | None = flag(None, "The reward model: the model/ folder of a run of pipelines/rm.py, local or s3:// gs://.")
    output_dir: str | None = flag(None, "Folder that is written: local, shared or s3:// gs://.")
    layout: Literal["transformers", "vllm"] = flag(
        "transformers",
        "The head's name. transformers: score.weight, which transformers and ms-swift read; vllm: language_model.score.weight, "
        "which vLLM reads.",
    )
    overwrite: bool = flag(False, "Replace an earlier export in --output_dir.")

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True)
class Config:
    """One run, fully described: the algorithm with its hyper-parameters, and the sections above."""

    algorithm: Any
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    tuner: TunerConfig = TunerConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    run: RunConfig = RunConfig()
    cluster: ClusterConfig = ClusterConfig()

    def __post_init__(self) -> None:
        if not self.run.safe_serialization and self.algorithm.needs.head != "value":
            raise ValueError(
                f"--safe_serialization false: only rm has a head to write in another format, {self.algorithm.name} has none; "
                "its weights are always .safetensors. Leave the flag out."
            )

    @property
    def global_batch_size(self) -> int:
        """Pairs per optimizer step over all workers and accumulation steps."""
        return self.optimizer.batch_size * self.optimizer.gradient_accumulation_steps * self.cluster.num_workers

    def sections(self) -> tuple[Any, ...]:
        """The algorithm and the sections, in the order they are shown."""
        return (self.data, self.model, self.tuner, self.algorithm, self.optimizer, self.run, self.cluster)

    def to_dict(self) -> dict[str, Any]:
        """All flags with their values, flat; tuples as lists, so that YAML and JSON hold it."""
        flat = {f.name: getattr(section, f.name) for section in self.sections() for f in dataclasses.fields(section)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in flat.items()}

    def replace(self, values: Mapping[str, Any]) -> "Config":
        """A copy with some flags changed, wherever they live; values are converted and checked like the command line's."""
        return config_from_mapping(type(self.algorithm), {**self.to_dict(), **values})


SECTIONS: dict[str, Any] = {
    "data": DataConfig,
    "model": ModelConfig,
    "tuner": TunerConfig,
    "optimizer": OptimizerConfig,
    "run": RunConfig,
    "cluster": ClusterConfig,
}


def section_types(algorithm: type[Any]) -> tuple[type[Any], ...]:
    """The section classes of a run of an algorithm, in the order of `Config.sections`."""
    return (DataConfig, ModelConfig, TunerConfig, algorithm, OptimizerConfig, RunConfig, ClusterConfig)


def config_from_mapping(algorithm: type[Any], values: Mapping[str, Any]) -> Config:
    """Builds a Config from flat flag values, as they come from words, YAML or Tune; strings are converted to the flag's type.

    Raises ValueError that names the flag, the value and what it should have been, or the flags that do not exist.
    """
    known = [flag.name for section in section_types(algorithm) for flag in flags_of(section)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(" ".join(f"Unknown flag --{name}.{did_you_mean(name, known, prefix='--')}" for name in unknown))
    sections = {name: section_from_mapping(section, values) for name, section in SECTIONS.items()}
    return Config(algorithm=section_from_mapping(algorithm, values), **sections)
