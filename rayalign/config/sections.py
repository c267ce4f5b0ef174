"""The flags that no algorithm owns, once: frozen dataclasses by concern, read by the command line, YAML files and Tune alike.

A field is a flag: its name, type, default, bounds and help are written here and nowhere else. `config` joins the sections of a
run with the algorithm's own flags.
"""

from dataclasses import dataclass
from typing import Literal

from rayalign.config.flags import check_bounds, flag
from rayalign.config.labels import LABEL, parse_selector
from rayalign.config.workers import workers_of


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
    max_length: int = flag(
        4096,
        "Longest prompt + response in tokens, image tokens included: a photo is 2,340 of them in LLaVA 1.6, 3,328 in InternVL.",
        above=1,
    )
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
        "The run stops with a table of reasons when more than this fraction of a data set's rows is unusable.",
        at_least=0,
        at_most=1,
    )
    columns: tuple[str, ...] = flag(
        (), "FROM=TO ...: columns of the rows renamed before their format is recognised, such as image_path=images."
    )
    image_root: str | None = flag(None, "Folder that relative image paths start from. Default: the data set file's own folder.")
    allow_image_urls: bool = flag(
        False,
        "Fetch images named by http(s) URLs, and by s3:// gs:// ones outside of the data set's folder and --image_root. "
        "Private addresses stay refused.",
    )
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
    adapter: str | None = flag(
        None,
        "Folder of a LoRA adapter of --model. Training continues from it; with --stack_adapter true a new adapter is trained "
        "on top of it; with --sft_type full it is merged into the weights first.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag(
        "auto",
        "Type of the arithmetic and of frozen weights; trainable weights are kept in float32. auto: bfloat16 on a GPU, float32 "
        "on CPUs. float16 scales the loss, and skips steps whose gradients overflow (skipped_steps).",
    )
    attn_implementation: Literal["sdpa", "flex_attention", "eager"] = flag(
        "sdpa",
        "Attention kernel of the language model. sdpa: prompt and responses apart, where the model allows it; flex_attention: "
        "compiled for the mask's blocks, on GPUs; eager: plain products, for models that cap their attention's logits.",
    )
    gradient_checkpointing: bool | Literal["auto"] = flag(
        True,
        "Recompute activations in the backward pass: less memory, about a third more time. auto: of as few layers as the GPUs' "
        "memory demands, by the plan's estimate; of all on CPUs.",
    )
    torch_compile: bool = flag(
        False, "Compile the language model's layers (torch.compile): some percent faster, after minutes in the first steps."
    )
    precompute_ref_log_probs: bool | None = flag(
        None,
        "Compute the reference's log-probabilities once, before training, and keep them beside the encoded records, for all "
        "epochs and runs that need the same; needed with --sft_type full, which has no reference left later (kto's mismatched "
        "rows take a second copy of the model there). Default: true with full, with more than one epoch, and in a sweep.",
    )
    trust_remote_code: bool = flag(False, "Run Python code that comes with the model. Only for sources you trust.")

    def dtype_on(self, device_type: str) -> str:
        """The name of the arithmetic's type on `cuda` or `cpu`."""
        if self.dtype == "auto":
            return "bfloat16" if device_type == "cuda" else "float32"
        return self.dtype

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True)
class TunerConfig:
    """Tuner"""

    sft_type: Literal["lora", "full"] = flag("lora", "lora: adapters on the trainable parts; full: all weights of these parts.")
    freeze_vit: bool = flag(
        True, "The vision tower is not trained. It runs in evaluation mode either way: no dropout, no running statistics."
    )
    freeze_aligner: bool = flag(True, "What stands between vision tower and language model (projector, merger) is not trained.")
    freeze_llm: bool = flag(False, "The language model and its output head are not trained.")
    lora_target_modules: tuple[str, ...] = flag(
        ("DEFAULT",),
        "Where adapters go, in parts that are not frozen. DEFAULT: attention q, k, v of language model and vision tower, every "
        "linear layer of the aligner; ALL: every linear layer; else module names, or one regular expression.",
    )
    lora_rank: int = flag(8, "Rank of the LoRA matrices.", at_least=1)
    lora_alpha: float = flag(32, "LoRA scale: updates are multiplied by alpha / rank.", above=0)
    lora_dropout: float = flag(
        0.05,
        "Dropout before the LoRA matrices; SFT only, it is off where two policies or two responses are compared.",
        at_least=0,
        at_most=0.99,
    )
    use_rslora: bool = flag(
        False, "Scale updates by alpha / sqrt(rank) (rank-stabilised LoRA, https://arxiv.org/abs/2312.03732)."
    )
    use_dora: bool = flag(
        False, "Learn each weight row's magnitude apart from its direction (https://arxiv.org/abs/2402.09353)."
    )
    stack_adapter: bool = flag(
        False,
        "Keep the adapter that training starts from frozen, and train a new one on top; the reference is the model with the "
        "frozen one. The result is one adapter that holds both.",
    )
    quant_bits: int | None = flag(
        None, "4: the language model's frozen linear layers are kept in 4 bits (QLoRA), which needs the extra qlora."
    )
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = flag("nf4", "The 4-bit type: NormalFloat or floating point.")
    bnb_4bit_use_double_quant: bool = flag(True, "Quantise the scales of the 4-bit blocks, too.")

    def __post_init__(self) -> None:
        check_bounds(self)
        _check_tuner(self)


def _check_tuner(tuner: TunerConfig) -> None:
    """Raises ValueError for flags that contradict each other."""
    if tuner.freeze_vit and tuner.freeze_aligner and tuner.freeze_llm:
        raise ValueError(
            "--freeze_llm true: with --freeze_vit and --freeze_aligner nothing is left to train. Turn one of the three off."
        )
    if tuner.sft_type == "lora" and not any(tuner.lora_target_modules):
        raise ValueError(
            "--lora_target_modules is empty: there is no layer to put an adapter into. Pass DEFAULT, ALL, module names or a "
            "regular expression, or leave the flag out."
        )
    if tuner.quant_bits not in (None, 4):
        raise ValueError(f"--quant_bits {tuner.quant_bits}: only 4 is supported. Pass 4, or leave the flag out.")
    if tuner.sft_type == "full":
        of_lora = [name for name in ("use_rslora", "use_dora", "stack_adapter", "quant_bits") if getattr(tuner, name)]
        if of_lora:
            raise ValueError(
                f"--{of_lora[0]} with --sft_type full: it is an option of LoRA, and full trains no adapter. Use "
                "--sft_type lora, or leave the option out."
            )
    if tuner.quant_bits is None and (tuner.bnb_4bit_quant_type != "nf4" or not tuner.bnb_4bit_use_double_quant):
        raise ValueError("--bnb_4bit_quant_type and --bnb_4bit_use_double_quant say how to quantise: add --quant_bits 4.")
    if tuner.stack_adapter and tuner.use_dora:
        raise ValueError(
            "--stack_adapter with --use_dora: a DoRA and another adapter can't be saved as one. Leave one of the two out."
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimisation"""

    num_train_epochs: float = flag(1.0, "Passes over the training records.", above=0)
    max_steps: int | None = flag(None, "Optimizer steps; overrides --num_train_epochs.", at_least=1)
    batch_size: int = flag(1, "Pairs per worker and micro-batch.", at_least=1)
    max_tokens_per_batch: int | None = flag(
        None,
        "Rows of a micro-batch are also as few as keep it within so many tokens (one row may have more; padding counts, on "
        "models that need it). The pairs of an optimizer step stay the same: only its cut changes.",
        above=0,
    )
    gradient_accumulation_steps: int = flag(
        16, "Micro-batches per worker and optimizer step; global batch = batch_size x accumulation x workers.", at_least=1
    )
    optim: Literal["adamw_torch", "adamw_8bit"] = flag(
        "adamw_torch",
        "AdamW with moments in float32, or (adamw_8bit, which needs the extra qlora) in 8 bits with a scale for each 256 of "
        "them: 2 bytes a trained weight in place of 8, and an update that is nearly the same.",
    )
    learning_rate: float = flag(5e-5, "Peak learning rate of AdamW.", above=0)
    vit_lr: float | None = flag(
        None, "Peak learning rate of the vision tower, where it is trained. Default: --learning_rate.", above=0
    )
    aligner_lr: float | None = flag(
        None, "Peak learning rate of the aligner, where it is trained. Default: --learning_rate.", above=0
    )
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = flag("cosine", "Decay after the warm-up, to 0.")
    warmup_ratio: float = flag(0.03, "Fraction of the steps over which the learning rate rises.", at_least=0, at_most=1)
    weight_decay: float = flag(0.1, "AdamW's weight decay; not on biases and norms.", at_least=0)
    adam_beta1: float = flag(0.9, "AdamW's beta1.", at_least=0, at_most=0.9999999)
    adam_beta2: float = flag(0.95, "AdamW's beta2.", at_least=0, at_most=0.9999999)
    adam_epsilon: float = flag(1e-8, "AdamW's epsilon.", above=0)
    max_grad_norm: float = flag(1.0, "Gradients are scaled down to this norm; 0 turns it off.", at_least=0)
    seed: int = flag(42, "Seed of adapter initialisation and dropout.", at_least=0)

    def rows_at_a_time(self, longest: int) -> int:
        """The most rows of a micro-batch whose longest row has so many tokens."""
        limit = self.max_tokens_per_batch
        return self.batch_size if limit is None else max(1, min(self.batch_size, limit // longest))

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True)
class RunConfig:
    """Output"""

    output_dir: str | None = flag(
        None, "The run's folder: local, shared or s3:// gs://. Default: output/<algorithm> below the current folder."
    )
    logging_steps: int = flag(5, "Steps between two lines of metrics.", at_least=1)
    report_to: tuple[Literal["tensorboard", "wandb", "mlflow", "none"], ...] = flag(
        ("tensorboard",),
        "Where metrics go beside metrics.jsonl: tensorboard (event files in --output_dir), wandb, mlflow, several of them, or "
        "none.",
    )
    profile_steps: str | None = flag(
        None,
        "Trace these optimizer steps with torch.profiler, FIRST:LAST as the log counts them (10:12): a file "
        "for each worker in profile/, which Perfetto opens. Default: none.",
    )
    eval_steps: int = flag(50, "Steps between two passes over the held-out records (also at the end).", at_least=1)
    eval_on_start: bool = flag(
        True, "A pass over the held-out records before the first step, too: what the training changes is told from there."
    )
    max_eval_records: int = flag(
        1000, "Of more held-out records than this, so many are drawn once and evaluated, the same ones each time.", at_least=2
    )
    eval_answers: int = flag(
        4,
        "Held-out prompts that the model answers by itself (the likeliest token each time, at most 64) before the first step "
        "and at the end, for the report. 0: none.",
        at_least=0,
    )
    eval_benchmarks: tuple[str, ...] = flag(
        (),
        "NAME:FOLDER ...: benchmarks, as the verb evaluate has them, of each checkpoint (--save_steps), beside the training: "
        "in a process with the CPUs and GPUs of a worker, as soon as there is room for one. eval_NAME/METRIC are the figures.",
    )
    max_eval_questions: int = flag(
        1000, "Of a benchmark of --eval_benchmarks with more questions, so many are drawn, the same ones each time.", at_least=1
    )
    save_steps: int = flag(50, "Steps between two checkpoints (also at the end).", at_least=1)
    save_total_limit: int = flag(2, "Newest checkpoints kept, and beside them the best one.", at_least=1)
    metric_for_best_model: str | None = flag(
        None,
        "Metric of the evaluations, by its name in metrics.jsonl, that tells the best checkpoint. Each evaluation that is the "
        "best so far is saved: a checkpoint more, where --eval_steps is no multiple of --save_steps. Default: "
        "eval_accuracy/likelihood, else eval_rewards/accuracies, else eval_loss; equal values by eval_rewards/margins. Also a "
        "benchmark's, such as pope/accuracy.",
    )
    greater_is_better: bool | None = flag(
        None, "Whether a high --metric_for_best_model is good. Default: by its name; low is good of losses, nll, kl."
    )
    early_stopping_patience: int | None = flag(
        None,
        "Evaluations in a row without a better --metric_for_best_model after which the run stops. Default: it never does.",
        at_least=1,
    )
    load_best_model_at_end: bool = flag(
        False, "model/ is of the best evaluation's step, and so are the final figures; else of the last step."
    )
    safe_serialization: bool = flag(
        True, "Write a reward model's head as value_head.safetensors; false: as value_head.bin. All else is always safetensors."
    )
    resume: bool = flag(True, "Continue an unfinished run of --output_dir that has the same configuration.")
    overwrite: bool = flag(False, "Delete what --output_dir holds and start anew.")
    dry_run: bool = flag(
        False,
        "Print what the run would need (memory, operations, GPUs, hours) and stop. The verb plan does so for GPUs and "
        "prices that you name.",
    )

    def __post_init__(self) -> None:
        check_bounds(self)
        if "none" in self.report_to and len(self.report_to) > 1:
            raise ValueError(
                f"--report_to {' '.join(self.report_to)}: none is for no sink at all. Leave it out, or the others."
            )
        if self.greater_is_better is not None and self.metric_for_best_model is None:
            raise ValueError(
                f"--greater_is_better {str(self.greater_is_better).lower()} without --metric_for_best_model: it says so of a "
                "metric that you name. Name one (--metric_for_best_model eval_loss), or leave this flag out."
            )


@dataclass(frozen=True)
class ClusterConfig:
    """Cluster"""

    num_workers: int | str = flag(
        1,
        "Train workers. MIN:MAX: as many as there is room for, more when nodes join and fewer when they are "
        "lost; the global batch stays that of MAX workers, and the weights come out the same.",
    )
    gpus_per_worker: float | None = flag(
        None,
        "GPUs of each worker. Default: 1 where a node has some, or where the model has 1e9 parameters and more, else 0.",
        at_least=0,
    )
    cpus_per_worker: float = flag(1, "CPUs of each worker; its threads.", above=0)
    accelerator_type: str | None = flag(
        None, "Kind of GPU that workers run on, by Ray's name of it: L4, A100, H100 and so on. Default: any."
    )
    label_selector: tuple[str, ...] = flag(
        (),
        "LABEL=VALUE ...: labels of the nodes that workers run on, such as ray.io/market-type=on-demand; also LABEL=!VALUE and "
        "LABEL=in(A,B). Default: any node.",
    )
    data_label_selector: tuple[str, ...] = flag(
        (), "The same for the tasks that encode records, such as a group of nodes without GPUs. Default: any node."
    )
    strategy: Literal["auto", "ddp", "fsdp", "device_map"] = flag(
        "auto",
        "ddp: a whole model on each worker; fsdp: each worker has a share of the model's weights, gradients and "
        "moments; device_map: a worker spreads its model over its GPUs. "
        "auto: device_map where a worker has several GPUs, else ddp.",
    )
    shard_group_size: int | None = flag(
        None,
        "Of --strategy fsdp: each group of so many workers, such as those of a node, has a whole model between them, and "
        "groups only add up their gradients. It divides --num_workers. Default: all workers are one group.",
        at_least=2,
    )
    sync_each_batch: bool = flag(
        True,
        "Of --strategy fsdp with --sft_type full: whether workers add up their gradients after each micro-batch. false: once a "
        "step, which sends fewer bytes where a step has several, and each worker holds all gradients of the language model.",
    )
    wait_for_nodes: float | None = flag(
        None,
        "Seconds that a run waits for nodes with room for its workers, which it asks the cluster's autoscaler for. Default: "
        "600 on a cluster that it joins, 0 on its own.",
        at_least=0,
    )
    max_failures: int = flag(
        3,
        "Restarts after a process or node is lost, each from the newest checkpoint. A new checkpoint starts the count anew.",
        at_least=0,
    )

    def __post_init__(self) -> None:
        check_bounds(self)
        workers_of(self.num_workers)
        if self.is_elastic and self.label_selector:
            raise ValueError(
                f"--num_workers {self.num_workers} with --label_selector {' '.join(self.label_selector)}: Ray Train counts the "
                "room for an elastic run's workers on nodes of any label. Pass one number of workers, or leave "
                "--label_selector out."
            )
        kind = self.accelerator_type
        if kind is not None and not LABEL.fullmatch(kind):
            raise ValueError(f"--accelerator_type {kind}: must be one of Ray's names, such as L4, A100 or H100.")
        if kind is not None and self.gpus_per_worker == 0:
            raise ValueError(
                f"--accelerator_type {kind} with --gpus_per_worker 0: it says which GPUs the workers get, and they get none. "
                "Leave one of the two out."
            )
        parse_selector("label_selector", self.label_selector)
        parse_selector("data_label_selector", self.data_label_selector)
        if self.shards_models and (self.gpus_per_worker or 0) > 1:
            raise ValueError(
                f"--gpus_per_worker {self.gpus_per_worker:g} with --strategy fsdp: a worker has one GPU there, and the model "
                "is sharded over workers. Pass --gpus_per_worker 1 and a higher --num_workers."
            )
        if (self.gpus_per_worker or 0) > 1 and (self.strategy == "ddp" or not float(self.gpus_per_worker or 0).is_integer()):
            raise ValueError(
                f"--gpus_per_worker {self.gpus_per_worker:g} with --strategy {self.strategy}: a worker has a share of one GPU, "
                "one, or several whole ones, which only --strategy device_map (or auto) makes use of. Pass --gpus_per_worker 1 "
                "and a higher --num_workers, or a whole number with device_map."
            )
        self._check_groups()

    def _check_groups(self) -> None:
        if not self.sync_each_batch and not self.shards_models:
            raise ValueError(
                f"--sync_each_batch false with --strategy {self.strategy}: gradients are added up once a step there anyway. "
                "Leave the flag out, or pass --strategy fsdp."
            )
        size = self.shard_group_size
        if size is None:
            return
        if not self.shards_models:
            raise ValueError(
                f"--shard_group_size {size} with --strategy {self.strategy}: no model is sharded there. Pass --strategy fsdp, "
                "or leave it out."
            )
        if self.is_elastic:
            raise ValueError(
                f"--shard_group_size {size} with --num_workers {self.num_workers}: not every number of workers can be cut into "
                "groups of one size. Pass one number of workers, or leave --shard_group_size out."
            )
        if self.fewest_workers % size:
            raise ValueError(
                f"--shard_group_size {size} with --num_workers {self.num_workers}: workers are cut into groups of one size. "
                "Pass a size that divides the number of workers."
            )

    @property
    def fewest_workers(self) -> int:
        """How many workers a run needs to train."""
        return workers_of(self.num_workers)[0]

    @property
    def most_workers(self) -> int:
        """How many workers a run trains with where there is room: those of the global batch."""
        return workers_of(self.num_workers)[1]

    @property
    def is_elastic(self) -> bool:
        """Whether a run goes on with fewer or more workers as nodes come and go."""
        return isinstance(self.num_workers, str) and ":" in self.num_workers

    @property
    def worker_labels(self) -> dict[str, str]:
        """Labels of the workers' nodes, with their conditions."""
        return parse_selector("label_selector", self.label_selector)

    @property
    def data_labels(self) -> dict[str, str]:
        """Labels of the nodes that encode records, with their conditions."""
        return parse_selector("data_label_selector", self.data_label_selector)

    @property
    def shards_models(self) -> bool:
        """Whether a model is sharded over the workers."""
        return self.strategy == "fsdp"

    @property
    def num_shards(self) -> int:
        """The workers over which a model is sharded, if it is; the fewest of an elastic run."""
        return self.shard_group_size or self.fewest_workers

    @property
    def spreads_models(self) -> bool:
        """Whether a worker spreads its model over its GPUs."""
        return self.strategy == "device_map" or (self.strategy == "auto" and (self.gpus_per_worker or 0) > 1)
