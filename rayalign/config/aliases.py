"""Flags of other tools: the names that mean one of ours, and for those that don't, what to use here instead.

Plain data, which the command line, YAML files, error texts and the page for people who move over are all made of. Read in
ms-swift 2.6.1 and 4.6.0, TRL 1.16 and LLaMA-Factory 0.9.5.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rayalign.config.flags import Flag

SWIFT2, SWIFT3, SWIFT4, TRL, FACTORY = "ms-swift 2.6", "ms-swift 3", "ms-swift 4.6", "TRL", "LLaMA-Factory"
SWIFT, HF, ALL = (SWIFT2, SWIFT4), (SWIFT4, TRL, FACTORY), (SWIFT2, SWIFT4, TRL, FACTORY)
"""HF: those that take all flags of transformers' TrainingArguments; ms-swift 2.6 takes most of them."""


@dataclass(frozen=True)
class Alias:
    """Another tool's name of a flag of ours.

    `values` turns its words into ours; what it doesn't list is passed on as it is, or, where `refused` says what to do instead,
    refused. One that lists `true` is a switch, whose words are those of any flag of true and false. `separator` stands between
    the values of a list written as one word.
    """

    name: str
    flag: str
    tools: Sequence[str]
    note: str = ""
    values: Mapping[str, str] = field(default_factory=dict)
    refused: str = ""
    separator: str | None = None

    @property
    def is_switch(self) -> bool:
        """Whether it takes true and false."""
        return "true" in self.values

    @property
    def bare(self) -> list[str]:
        """The values that its name alone stands for."""
        return ["true"] if self.is_switch else []

    def convert(self, value: Any) -> Any:
        """Our flag's value for the alias's; raises ValueError where there is none."""
        if isinstance(value, list):
            converted = [self.convert(item) for item in value]
            return [part for item in converted for part in (item if isinstance(item, list) else [item])]
        if self.is_switch:
            value = Flag(self.name, bool, None, "", "").convert(value)
        word = str(value).lower() if isinstance(value, bool) else str(value)
        if word in self.values:
            return self.values[word]
        if self.refused:
            raise ValueError(f"--{self.name} {word}: {self.refused}")
        if self.separator and isinstance(value, str):
            return [part.strip() for part in value.split(self.separator)]
        return value


@dataclass(frozen=True)
class Elsewhere:
    """Flags of other tools that no flag here means the same as, and what to use instead."""

    names: str
    tools: Sequence[str]
    advice: str


ALIASES: Sequence[Alias] = (
    Alias("model_id_or_path", "model", (SWIFT2,), "Hub ids are Hugging Face's."),
    Alias("model_name_or_path", "model", (TRL, FACTORY)),
    Alias("adapters", "adapter", (SWIFT4,), "One adapter."),
    Alias("adapter_name_or_path", "adapter", (FACTORY,), "One adapter, in a folder."),
    Alias("torch_dtype", "dtype", (SWIFT4,)),
    Alias("dtype", "dtype", (SWIFT2,), values={"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}),
    Alias("bf16", "dtype", HF, values={"true": "bfloat16"}, refused="Name the type instead, such as --dtype float32."),
    Alias("fp16", "dtype", HF, values={"true": "float16"}, refused="Leave it out, or name the type, such as --dtype float32."),
    Alias("attn_impl", "attn_implementation", (SWIFT4,)),
    Alias(
        "flash_attn",
        "attn_implementation",
        (FACTORY,),
        values={"sdpa": "sdpa", "disabled": "eager"},
        refused="There is no such kernel here. Pass --attn_implementation sdpa (the default) or flex_attention.",
    ),
    Alias("disable_gradient_checkpointing", "gradient_checkpointing", (FACTORY,), values={"true": "false", "false": "true"}),
    Alias("tuner_type", "sft_type", (SWIFT4,)),
    Alias("train_type", "sft_type", (SWIFT3,)),
    Alias("finetuning_type", "sft_type", (FACTORY,)),
    Alias("use_peft", "sft_type", (TRL,), values={"true": "lora", "false": "full"}),
    Alias("lora_r", "lora_rank", (TRL,)),
    Alias("lora_dropout_p", "lora_dropout", (SWIFT2,)),
    Alias("target_modules", "lora_target_modules", SWIFT, values={"all-linear": "ALL"}),
    Alias("lora_target", "lora_target_modules", (FACTORY,), values={"all": "ALL"}, separator=","),
    Alias("lora_target_modules", "lora_target_modules", (TRL,), values={"all-linear": "ALL"}),
    Alias("target_regex", "lora_target_modules", SWIFT, "One regular expression."),
    Alias("lora_target_regex", "lora_target_modules", (SWIFT2,), "One regular expression."),
    Alias("freeze_vision_tower", "freeze_vit", (FACTORY,)),
    Alias("freeze_multi_modal_projector", "freeze_aligner", (FACTORY,)),
    Alias("freeze_language_model", "freeze_llm", (FACTORY,)),
    Alias("quantization_bit", "quant_bits", (SWIFT2, FACTORY), "4 only.", values={"0": "none"}),
    Alias("load_in_4bit", "quant_bits", (TRL,), values={"true": "4", "false": "none"}),
    Alias("quantization_type", "bnb_4bit_quant_type", (FACTORY,)),
    Alias("double_quantization", "bnb_4bit_use_double_quant", (FACTORY,)),
    Alias("use_bnb_nested_quant", "bnb_4bit_use_double_quant", (TRL,)),
    Alias("per_device_train_batch_size", "batch_size", ALL, "Pairs, on each worker."),
    Alias("max_steps", "max_steps", ALL, values={"-1": "none"}),
    Alias("ray_num_workers", "num_workers", (FACTORY,)),
    Alias("custom_train_dataset_path", "dataset", (SWIFT2,)),
    Alias("custom_val_dataset_path", "val_dataset", (SWIFT2,)),
    Alias(
        "eval_dataset",
        "val_dataset",
        (FACTORY,),
        "Files, not names of dataset_info.json; in ms-swift 4.6 it names benchmarks.",
        separator=",",
    ),
    Alias("split_dataset_ratio", "dataset_test_ratio", (SWIFT4,)),
    Alias("val_size", "dataset_test_ratio", (FACTORY,), "A fraction, not a number of records."),
    Alias("dataset_seed", "data_seed", (SWIFT2,)),
    Alias("cutoff_len", "max_length", (FACTORY,), "Longer records are dropped; --truncation_strategy right cuts them."),
    Alias(
        "truncation_mode",
        "truncation_strategy",
        (TRL,),
        values={"keep_start": "right"},
        refused="Pass --truncation_strategy: right cuts the end of the responses, left the oldest turns.",
    ),
    Alias("rescale_image", "max_pixels", (SWIFT2,), values={"-1": "none"}),
    Alias("image_max_pixels", "max_pixels", (FACTORY,)),
    Alias("media_dir", "image_root", (FACTORY,)),
    Alias(
        "stage",
        "rlhf_type",
        (FACTORY,),
        "ORPO and SimPO are algorithms of their own: --rlhf_type orpo, simpo.",
        values={name: name for name in ("sft", "rm", "dpo", "kto")},
        refused="There is no such stage here. Pass sft, rm, dpo or kto.",
    ),
    Alias("pref_beta", "beta", (FACTORY,)),
    Alias(
        "pref_loss",
        "loss_type",
        (FACTORY,),
        values={name: name for name in ("sigmoid", "hinge", "ipo")},
        refused="Pass sigmoid, hinge or ipo; orpo, simpo and kto are algorithms of their own (--rlhf_type).",
    ),
    Alias("dpo_label_smoothing", "label_smoothing", (FACTORY,)),
    Alias("kto_chosen_weight", "desirable_weight", (FACTORY,)),
    Alias("kto_rejected_weight", "undesirable_weight", (FACTORY,)),
)

ELSEWHERE: Sequence[Elsewhere] = (
    Elsewhere(
        "deepspeed fsdp fsdp_config deepspeed_config_path zero_hpz_partition_size",
        ALL,
        "pass --strategy fsdp, which shards the model over the workers (--num_workers); --strategy device_map spreads "
        "it over one worker's GPUs.",
    ),
    Elsewhere(
        "device_map max_memory device_map_config", (*SWIFT, FACTORY), "pass --strategy device_map and --gpus_per_worker."
    ),
    Elsewhere(
        "ddp_backend ddp_timeout ddp_find_unused_parameters ddp_broadcast_buffers",
        ALL,
        "Ray connects the workers. Leave it out; --num_workers says how many there are.",
    ),
    Elsewhere("sequence_parallel_size sequence_parallel", SWIFT, "a row is not split over workers here. Leave it out."),
    Elsewhere(
        "logging_dir run_name use_swanlab swanlab_project plot_loss",
        ALL,
        "metrics go to metrics.jsonl, report.html and tensorboard/ in --output_dir, whose name is the run's; --report_to names "
        "more places. Leave it out.",
    ),
    Elsewhere("disable_tqdm logging_first_step log_level", ALL, "pass --logging_steps for how often a line is logged."),
    Elsewhere(
        "push_to_hub hub_model_id hub_strategy hub_private_repo", ALL, "nothing is uploaded here; --output_dir has it all."
    ),
    Elsewhere("hub_token hf_hub_token use_hf", (*SWIFT, FACTORY), "hub ids are Hugging Face's; a token goes into HF_TOKEN."),
    Elsewhere("model_revision", ALL, "download that revision, and pass its folder as --model."),
    Elsewhere("pure_bf16", (FACTORY,), "trainable weights are always kept in float32. Pass --dtype bfloat16 for the rest."),
    Elsewhere("tf32", HF, "products of float32 stay exact here. Pass --dtype bfloat16 for speed."),
    Elsewhere("load_in_8bit", (TRL,), "only 4 bits are supported: --quant_bits 4."),
    Elsewhere("quant_method quantization_method", (*SWIFT, FACTORY), "--quant_bits 4 is bitsandbytes'; leave the method out."),
    Elsewhere(
        "bnb_4bit_compute_dtype bnb_4bit_comp_dtype bnb_4bit_quant_storage", (*SWIFT, TRL), "the arithmetic's type is --dtype."
    ),
    Elsewhere(
        "use_flash_attn",
        (SWIFT2,),
        "there is no such kernel here. Pass --attn_implementation sdpa (the default) or flex_attention.",
    ),
    Elsewhere(
        "use_liger use_liger_kernel enable_liger_kernel use_unsloth",
        ALL,
        "its kernels are not used here. Leave it out; --torch_compile true makes layers faster.",
    ),
    Elsewhere("gradient_checkpointing_kwargs vit_gradient_checkpointing vit_use_gc", ALL, "pass --gradient_checkpointing."),
    Elsewhere(
        "packing neat_packing padding_free pad_to_multiple_of group_by_length train_sampling_strategy",
        (*SWIFT, TRL, FACTORY),
        "a pair is one row without padding already. Leave it out; --max_tokens_per_batch limits a micro-batch by tokens.",
    ),
    Elsewhere(
        "auto_find_batch_size", ALL, "pass --batch_size, and --max_tokens_per_batch as a limit; the verb plan tells both."
    ),
    Elsewhere(
        "per_device_eval_batch_size eval_batch_size", ALL, "held-out records are run by --batch_size, too. Leave it out."
    ),
    Elsewhere("warmup_steps", ALL, "pass the fraction of the steps as --warmup_ratio."),
    Elsewhere("optimizer", ALL, "pass --optim: the optimizer is AdamW, with moments in float32 or in 8 bits."),
    Elsewhere("lr_scheduler_kwargs min_lr", ALL, "--lr_scheduler_type cosine and linear end at 0. Leave it out."),
    Elsewhere(
        "lora_lr_ratio lorap_lr_ratio loraplus_lr_ratio",
        (*SWIFT, FACTORY),
        "both matrices of an adapter have one --learning_rate.",
    ),
    Elsewhere("neftune_noise_alpha", ALL, "embeddings get no noise here. Leave it out."),
    Elsewhere("disable_dropout", (TRL,), "--lora_dropout is for SFT only, and always off elsewhere. Leave it out."),
    Elsewhere("eval_strategy evaluation_strategy do_eval", ALL, "--eval_steps says how often held-out records are run."),
    Elsewhere("save_strategy save_only_model", ALL, "--save_steps says how often a checkpoint is written; it is always whole."),
    Elsewhere("do_train", HF, "a run always trains. Leave it out."),
    Elsewhere("logging_strategy", ALL, "--logging_steps says how often metrics are logged."),
    Elsewhere("save_safetensors", ALL, "weights are always safetensors. Leave it out."),
    Elsewhere(
        "resume_from_checkpoint ignore_data_skip resume_only_model",
        ALL,
        "the same command continues an unfinished run of --output_dir. Leave it out; --resume false starts anew.",
    ),
    Elsewhere("overwrite_output_dir", (FACTORY,), "pass --overwrite true, which deletes what --output_dir holds."),
    Elsewhere(
        "ref_model ref_model_id_or_path ref_adapters ref_model_adapters ref_model_type",
        (*SWIFT, FACTORY),
        "the reference is the model at the start. Leave it out, or start from that model.",
    ),
    Elsewhere("create_new_adapter", (FACTORY,), "pass --adapter with --stack_adapter true; the result holds both adapters."),
    Elsewhere("precompute_ref_batch_size", (TRL,), "the reference is run by --batch_size, too. Leave it out."),
    Elsewhere("sync_ref_model ref_model_mixup_alpha ref_model_sync_steps", (TRL,), "the reference never changes in a run."),
    Elsewhere("pref_ftx", (FACTORY,), "pass --rpo_alpha; it is a mean over tokens here, over responses there."),
    Elsewhere("pref_bco_weight", (FACTORY,), "name both losses: --loss_type sigmoid bco_pair --loss_weights 1 WEIGHT."),
    Elsewhere("use_weighting", (TRL,), "pairs are not weighted by the policy here. Leave it out."),
    Elsewhere(
        "max_prompt_length max_completion_length max_model_len model_max_length",
        (SWIFT4, TRL, FACTORY),
        "prompt and response have one limit, --max_length.",
    ),
    Elsewhere(
        "generate_during_eval predict_with_generate",
        (SWIFT2, TRL, FACTORY),
        "the model answers --eval_answers held-out prompts before the first step and at the end, in report.html. Leave it out.",
    ),
    Elsewhere(
        "template template_type chat_template_path chat_template",
        (*SWIFT, TRL, FACTORY),
        "the model's own chat template is used.",
    ),
    Elsewhere("system default_system", (*SWIFT, FACTORY), "a system prompt is a column of the records: `system`."),
    Elsewhere(
        "train_on_prompt mask_history loss_scale use_loss_scale assistant_only_loss completion_only_loss",
        (*SWIFT, TRL, FACTORY),
        "only the tokens of the last response are learnt.",
    ),
    Elsewhere(
        "dataset_name dataset_config dataset_train_split dataset_test_split",
        (TRL,),
        "--dataset takes files, folders, globs or registered names (rlaif-v), local or s3://; download a hub's data set first.",
    ),
    Elsewhere("dataset_dir", (FACTORY,), "--dataset takes the paths of the files themselves."),
    Elsewhere("max_samples train_dataset_sample val_dataset_sample", (SWIFT2, FACTORY), "--dataset NAME#N draws N records."),
    Elsewhere(
        "mix_strategy interleave_probs interleave_prob",
        (SWIFT4, FACTORY),
        "NAME#N in --dataset says how much of each data set there is.",
    ),
    Elsewhere("streaming dataset_streaming lazy_tokenize", (*SWIFT, TRL, FACTORY), "records are always read as a stream."),
    Elsewhere(
        "dataset_num_proc preprocess_num_proc preprocessing_num_workers dataloader_num_workers dataloader_pin_memory",
        ALL,
        "Ray Data prepares records on all CPUs of the cluster that the workers leave free. Leave it out.",
    ),
    Elsewhere(
        "overwrite_cache load_from_cache_file tokenized_path",
        (SWIFT4, FACTORY),
        "encoded records are kept in --cache_dir, and found again where they fit.",
    ),
    Elsewhere(
        "dataset_shuffle train_dataloader_shuffle shuffle_dataset disable_shuffling",
        (SWIFT4, TRL, FACTORY),
        "the order is always drawn, from --data_seed.",
    ),
    Elsewhere(
        "image_min_pixels crop_to_patches", (FACTORY,), "the model's own processor decides it; --max_pixels is a limit above."
    ),
    Elsewhere(
        "modules_to_save lora_modules_to_save additional_target",
        (*SWIFT, TRL, FACTORY),
        "LoRA trains adapters only. Pass --sft_type full to train weights.",
    ),
    Elsewhere("lora_bias lora_bias_trainable", SWIFT, "biases stay as they are. Leave it out."),
    Elsewhere(
        "init_weights init_lora_weights pissa_init",
        (*SWIFT, FACTORY),
        "adapters start at zero, as in LoRA's paper. Leave it out.",
    ),
    Elsewhere(
        "freeze_parameters freeze_parameters_ratio trainable_parameters additional_trainable_parameters",
        SWIFT,
        "pass --freeze_vit, --freeze_aligner and --freeze_llm.",
    ),
)

SAME_NAME: Mapping[str, tuple[Sequence[str], str]] = {
    "cache_dir": ((FACTORY,), "Where encoded records are kept here; where models are downloaded to there (HF_HOME here)."),
    "max_length": ((TRL,), "Longer records are dropped here, cut there; --truncation_strategy right cuts them."),
    "rpo_alpha": ((SWIFT4,), "1.0 unless given here (as in ms-swift 2.6), off there."),
    "lora_alpha": ((FACTORY,), "32 unless given here, twice the rank there."),
    "dataset": ((FACTORY,), "Files here, names of dataset_info.json there."),
    "warmup_ratio": ((SWIFT2, SWIFT4), "0.03 unless given here; 0.05 and 0 there."),
}
"""Flags that have the same name in another tool, and what differs."""

_ALIASES = {alias.name: alias for alias in ALIASES}
_ELSEWHERE = {name: entry for entry in ELSEWHERE for name in entry.names.split()}


def alias_of(name: str, own: Container[str]) -> Alias | None:
    """The alias of a name, unless it is one of our `own` flags; an alias of its own name only turns words."""
    alias = _ALIASES.get(name)
    return alias if alias and (name not in own or alias.flag == name) else None


def advice_for(name: str) -> str | None:
    """A sentence on another tool's flag that means none of ours; None for a name that no tool has."""
    entry = _ELSEWHERE.get(name)
    return f"--{name} ({', '.join(entry.tools)}) is no flag here: {entry.advice}" if entry else None


def aliases_table() -> str:
    """The tables of the page for people who move over, in Markdown."""
    lines = ["| there | tools | here | note |", "|---|---|---|---|"]
    for alias in ALIASES:
        notes = [alias.note, ", ".join(f"`{a}` is `{b}`" for a, b in alias.values.items() if a != b)]
        lines.append(_row(f"`--{alias.name}`", alias.tools, f"`--{alias.flag}`", " ".join(filter(None, notes))))
    lines += ["", "| same name | tools | what differs |", "|---|---|---|"]
    lines += [_row(f"`--{name}`", tools, text) for name, (tools, text) in SAME_NAME.items()]
    lines += ["", "| there | tools | here |", "|---|---|---|"]
    for entry in ELSEWHERE:
        names = ", ".join(f"`--{name}`" for name in entry.names.split())
        lines.append(_row(names, entry.tools, entry.advice[0].upper() + entry.advice[1:]))
    return "\n".join(lines) + "\n"


def _row(name: str, tools: Sequence[str], *cells: str) -> str:
    return f"| {' | '.join((name, ', '.join(tools), *cells))} |"
