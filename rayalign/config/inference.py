"""The flags that all verbs share that run a model over records: which model, which records, on which workers, and where to."""

from dataclasses import dataclass
from typing import Literal

from rayalign.config.flags import check_bounds, flag, same_flag
from rayalign.config.sections import ClusterConfig, DataConfig, ModelConfig


@dataclass(frozen=True)
class InferenceConfig:
    """Model, records and workers"""

    model: str | None = flag(None, "Model folder, URL or hub id, or the folder of an adapter (a run's model/).")
    model_type: str | None = same_flag(ModelConfig, "model_type")
    adapter: str | None = flag(None, "Folder or URL of a LoRA adapter of --model.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag(
        "auto", "Type of the arithmetic and the weights. auto: bfloat16 on a GPU, float32 on CPUs."
    )
    attn_implementation: Literal["sdpa", "flex_attention", "eager"] = same_flag(ModelConfig, "attn_implementation")
    trust_remote_code: bool = same_flag(ModelConfig, "trust_remote_code")
    dataset: tuple[str, ...] = flag(
        (), "Records: files, folders, globs or registered names (rlaif-v), local or s3:// gs://; NAME#N draws N of them."
    )
    columns: tuple[str, ...] = same_flag(DataConfig, "columns")
    image_root: str | None = same_flag(DataConfig, "image_root")
    allow_image_urls: bool = same_flag(DataConfig, "allow_image_urls")
    data_seed: int = flag(42, "Seed of NAME#N draws.", at_least=0)
    max_length: int = same_flag(DataConfig, "max_length")
    max_pixels: int | None = same_flag(DataConfig, "max_pixels")
    batch_size: int = flag(8, "Records that a worker runs at a time.", at_least=1)
    num_workers: int = flag(1, "Workers; each has the model.", at_least=1)
    gpus_per_worker: float | None = same_flag(ClusterConfig, "gpus_per_worker")
    cpus_per_worker: float = same_flag(ClusterConfig, "cpus_per_worker")
    accelerator_type: str | None = same_flag(ClusterConfig, "accelerator_type")
    label_selector: tuple[str, ...] = same_flag(ClusterConfig, "label_selector")
    wait_for_nodes: float | None = same_flag(ClusterConfig, "wait_for_nodes")
    output_dir: str | None = flag(None, "Folder of the results: local, shared or s3:// gs://. The same command goes on in it.")
    overwrite: bool = flag(False, "Delete the results that --output_dir holds and start anew.")

    def __post_init__(self) -> None:
        check_bounds(self)
