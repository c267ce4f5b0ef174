"""The flags of what comes after training: export, serve and chat."""

from dataclasses import dataclass
from typing import Literal

from rayalign.config.flags import check_bounds, flag


@dataclass(frozen=True)
class ExportConfig:
    """Export"""

    model: str | None = flag(
        None,
        "The model/ folder of a run, local or s3:// gs://: its adapter is merged, a reward model's head becomes a score layer. "
        "With --checkpoint: where the model or adapter is now that the run began with, if it has moved.",
    )
    checkpoint: str | None = flag(
        None,
        "Write the model of a checkpoint instead, of any algorithm, as the run's model/ is written: best, last or a step of "
        "the run in --run_dir, or a checkpoint's folder.",
    )
    run_dir: str | None = flag(None, "The run's folder for --checkpoint: local, shared or s3:// gs://.")
    output_dir: str | None = flag(None, "Folder that is written: local, shared or s3:// gs://.")
    layout: Literal["transformers", "vllm", "value_head", "trl", "ms_swift"] = flag(
        "transformers",
        "trl, ms_swift: the adapter is not merged, and written as these tools load one. The others are the form of a reward "
        "model's head. transformers: score.weight, which transformers and ms-swift read; vllm: language_model.score.weight, "
        "which vLLM reads; value_head: a file of its own beside the merged weights, from which training goes on.",
    )
    overwrite: bool = flag(False, "Replace an earlier export in --output_dir.")
    push_to_hub: str | None = flag(
        None, "Upload what is exported to this repository of the Hugging Face hub, too: OWNER/NAME. It is made if need be."
    )
    hub_private: bool = flag(True, "Whether a repository that --push_to_hub makes is private.")

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True)
class ServeConfig:
    """Serve"""

    model: str | None = flag(
        None,
        "What is served: a base or merged model, or the model/ folder of a run (of rm: scores): local, s3:// gs:// or hub id.",
    )
    served_model_name: str | None = flag(None, "The name that requests call it by. Default: what --model says.")
    adapter: tuple[str, ...] = flag(
        (), "Adapters of --model that are served beside it, each under a name of its own: NAME=PATH ..."
    )
    engine: Literal["auto", "transformers", "vllm"] = flag(
        "auto",
        "What generates. auto: vllm where that is installed, there are GPUs and it does all that is asked; else transformers.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag(
        "auto", "The type of the weights. auto: bfloat16 on GPUs, float32 on CPUs."
    )
    host: str = flag("127.0.0.1", "The address that is listened on. Any other than this machine's own asks for a token.")
    port: int = flag(8000, "The port that is listened on.", at_least=1, at_most=65535)
    token_file: str | None = flag(
        None, "File with the token that requests must bring. Default: none on this machine's own address, else one made now."
    )
    min_replicas: int = flag(1, "Replicas of the model that run at least.", at_least=1)
    max_replicas: int | None = flag(
        None, "Replicas that run at most, as requests come in. Default: --min_replicas.", at_least=1
    )
    gpus_per_replica: float | None = flag(
        None, "GPUs of a replica; 0.5: two share one. Default: 1 where the cluster has GPUs, else 0.", at_least=0, at_most=1
    )
    cpus_per_replica: float = flag(1, "CPUs of a replica.", above=0)
    max_batch_size: int = flag(32, "Requests that a replica runs side by side; more of them wait.", at_least=1)
    max_concurrency: int = flag(128, "Requests that a replica has at a time; the next one is answered with 429.", at_least=1)
    max_length: int = flag(8192, "Longest prompt + response in tokens, image tokens included.", above=1)
    max_new_tokens: int = flag(
        1024, "Longest response in tokens, and how long one gets that asks for no other length.", at_least=1
    )
    max_pixels: int | None = flag(None, "Images with more pixels are scaled down to this many. Take the training's.", above=0)
    max_images: int = flag(8, "Images of a request.", at_least=0)
    max_image_mb: float = flag(16, "MiB of one image's file.", above=0, at_most=64)
    max_body_mb: float = flag(64, "MiB of a request's body.", above=0)
    allow_image_urls: bool = flag(
        False, "Fetch images of http(s):// URLs, from public addresses only. Otherwise images come inside of requests."
    )
    write_config: str | None = flag(
        None, "With vLLM: write the configuration for `serve run` into this file, and start nothing."
    )

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.max_replicas is not None and self.max_replicas < self.min_replicas:
            raise ValueError(
                f"--max_replicas {self.max_replicas} is less than --min_replicas {self.min_replicas}: give at least as many."
            )
        if self.max_new_tokens >= self.max_length:
            raise ValueError(
                f"--max_new_tokens {self.max_new_tokens}: --max_length {self.max_length} leaves no room for a prompt. Lower "
                "the first, or raise the second."
            )
        names = [name for name, _ in map(split_adapter, self.adapter)]
        twice = {name for name in names if names.count(name) > 1 or name == self.name}
        if twice:
            raise ValueError(f"--adapter: {', '.join(sorted(twice))} names two models. Give each a name of its own.")

    @property
    def name(self) -> str:
        """What requests call --model by."""
        return self.served_model_name or self.model or ""

    @property
    def adapters(self) -> dict[str, str]:
        """The folders of the adapters, by name."""
        return dict(map(split_adapter, self.adapter))


def split_adapter(word: str) -> tuple[str, str]:
    """Name and folder of an adapter that is written NAME=PATH."""
    name, _, path = word.partition("=")
    if not name or not path or "/" in name:
        raise ValueError(f"--adapter {word}: must be NAME=PATH, such as dpo=runs/dpo/model.")
    return name, path


@dataclass(frozen=True)
class ChatConfig:
    """Chat"""

    model: str | None = flag(
        None, "The model to talk to: a base or merged model, or the model/ folder of a run; local, s3:// gs:// or a hub id."
    )
    compare: str | None = flag(None, "A second model, which responds to the same questions.")
    image: tuple[str, ...] = flag((), "Images that the first question is about: files.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag(
        "auto", "The type of the weights. auto: bfloat16 on a GPU, float32 on a CPU."
    )
    temperature: float = flag(0, "0: the likeliest token each time; 1: tokens as likely as the model has them.", at_least=0)
    seed: int = flag(42, "Seed of what is drawn where --temperature is not 0.", at_least=0)
    max_new_tokens: int = flag(512, "Longest response in tokens.", at_least=1)
    max_length: int = flag(8192, "Longest conversation in tokens, image tokens included.", above=1)
    max_pixels: int | None = flag(None, "Images with more pixels are scaled down to this many. Take the training's.", above=0)

    def __post_init__(self) -> None:
        check_bounds(self)
