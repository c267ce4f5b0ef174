"""rayalign from Python, in a script, a notebook or a Ray job: the flags of the command line as keyword arguments.

`rayalign` shows these functions at its top and loads them when they are first used; each loads what it needs when it is called.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    import torch

    from rayalign.config.config import Config
    from rayalign.config.yaml_files import Extra
    from rayalign.evaluation.evaluate import Evaluation
    from rayalign.evaluation.pool import PoolResult
    from rayalign.policy.scoring import LoadedPolicy
    from rayalign.rounds.results import Round
    from rayalign.training.driver import Result

File: TypeAlias = str | os.PathLike[str]
FlagValue: TypeAlias = str | int | float | bool | os.PathLike[str] | Sequence[str | int | float | os.PathLike[str]] | None
"""What a flag takes: a value of its type, a word as on the command line, or a list of them where it takes several."""


@dataclass(frozen=True)
class Plan:
    """What a run would need. `text` is the whole plan, as the verb `plan` prints it.

    `memory_bytes` is of one worker at its fullest; `gpus_per_worker` how many GPUs of the size asked for hold it, `hours` what
    the run takes on `gpus` of them and `cost` what they cost: each None where it is not known or nothing fits.
    """

    text: str
    steps: int
    trainable_parameters: int
    memory_bytes: int
    gpus_per_worker: int | None
    gpus: int | None
    hours: float | None
    cost: float | None


def train(algorithm: str, *, config: File | Sequence[File] = (), **flags: FlagValue) -> "Result":
    """Trains as `rayalign ALGORITHM --flag value ...` does, and returns when the run is done.

        result = rayalign.train("dpo", model="llava-hf/llava-1.5-7b-hf", dataset=["pairs.jsonl"], beta=0.1, num_workers=2)
        result.model_dir, result.metrics["eval_rewards/accuracies"]

    `algorithm` is a name of --rlhf_type, or of an algorithm that `plugin=` brings. `config` names YAML files of flags, local or
    remote; `flags` win over them. Workers run on the Ray cluster that this process is connected to or that runs on this
    machine (in a job: the job's), else on one that is started here; what was not there before is closed at the end. An
    unfinished run of the same output_dir and configuration is continued.

    Raises ValueError, with the sentences of the command line, for flags, models, data and folders that can't be used;
    FloatingPointError for a loss that is no longer finite.
    """
    run = _config(algorithm, config, flags)
    if run.run.dry_run:
        raise ValueError("dry_run=True trains nothing: call rayalign.plan with the same flags.")

    from rayalign.joining import ray_as_found
    from rayalign.training import driver

    with ray_as_found():
        return driver.run(run)


def plan(algorithm: str, *, config: File | Sequence[File] = (), **flags: FlagValue) -> Plan:
    """What training with these flags would need, as `rayalign plan` tells: memory, GPUs, hours and cost.

    Besides the flags of `train` there are those of the GPUs: gpu_memory_gb, gpu_tflops, mfu, gpus, price_per_hour. Records are
    encoded on Ray as `train` would, where the model's processor is at hand, and stay in the cache.

    Raises ValueError, with the sentences of the command line, for flags, models and data that can't be used.
    """
    from rayalign.config.plan import PlanConfig

    run, machine = _build(algorithm, config, flags, PlanConfig)
    assert isinstance(machine, PlanConfig)

    from rayalign.estimate.plan import estimate_run
    from rayalign.estimate.table import plan_text
    from rayalign.joining import ray_as_found

    with ray_as_found():
        found = estimate_run(run, machine)
    return Plan(
        text=plan_text(found),
        steps=found.schedule.steps,
        trainable_parameters=found.num_trainable,
        memory_bytes=found.memory.total,
        gpus_per_worker=found.gpus_per_worker,
        gpus=found.time.gpus if found.time else None,
        hours=found.time.hours if found.time else None,
        cost=found.time.cost if found.time else None,
    )


def load_policy(
    model: File,
    *,
    device: "str | torch.device | None" = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    image_root: File = ".",
    columns: Sequence[str] = (),
    max_pixels: int | None = None,
    trust_remote_code: bool = False,
) -> "LoadedPolicy":
    """A model that is ready to score rows: a run's model/ folder (`Result.model_dir`), any model's folder, URL or hub id.

        policy = rayalign.load_policy(result.model_dir)
        row = {"query": "Which colour?", "images": ["a.png"], "response": "Red.", "rejected_response": "Blue."}
        logps = policy.logps([row])
        logps.chosen.total - logps.rejected.total  # [B]

    Rows are in any record format of --dataset, and refused for what drops a record there; `columns` renames their columns as
    --columns does ("image_path=images"). Relative image paths start from `image_root`, images with more than `max_pixels` are
    scaled down. `device` is the first GPU where there is one, else the CPU; `dtype` the type of the arithmetic
    (auto: bfloat16 on a GPU, float32 on a CPU). A reward model gives `policy.rewards(rows)`. No cluster is needed.

    Raises ValueError for a model that is not there, or of a kind that can't be run.
    """
    from rayalign.policy.scoring import load_for_scoring

    return load_for_scoring(
        os.fspath(model),
        device=device,
        dtype=dtype,
        image_root=os.fspath(image_root),
        columns=columns,
        max_pixels=max_pixels,
        trust_remote_code=trust_remote_code,
    )


def export(
    model: File | None = None,
    output_dir: File | None = None,
    *,
    checkpoint: File | int | None = None,
    run_dir: File | None = None,
    layout: Literal["transformers", "vllm", "value_head", "trl", "ms_swift"] = "transformers",
    overwrite: bool = False,
    push_to_hub: str | None = None,
    hub_private: bool = True,
) -> str:
    """Writes a trained model (the model/ folder of a run) as one plain folder, its adapter merged, and returns its path or URL.

    A reward model gets a `score` head, which transformers, ms-swift and vLLM load; `layout` is its name: transformers reads
    score.weight, vLLM language_model.score.weight; value_head: a file of its own, from which training goes on. trl and
    ms_swift: the adapter is not merged, and written as these tools load one. `overwrite`
    replaces an earlier export; `push_to_hub` (OWNER/NAME) uploads it, too. With `checkpoint` the model of a
    checkpoint of any run is written, as its model/ is: "best", "last" or a step of the run in `run_dir`, or a checkpoint's
    folder.

    Raises ValueError for a model with neither adapter nor value head, a checkpoint that is not there or not whole, a folder
    that must not be overwritten, and an upload that can't be made.
    """
    from rayalign.config.flags import section_from_mapping
    from rayalign.config.serving import ExportConfig

    places = {"model": model, "output_dir": output_dir, "checkpoint": checkpoint, "run_dir": run_dir}
    named = {
        name: str(place) if isinstance(place, int) else os.fspath(place) for name, place in places.items() if place is not None
    }
    upload = {"push_to_hub": push_to_hub, "hub_private": hub_private} if push_to_hub is not None else {}
    flags: ExportConfig = section_from_mapping(ExportConfig, {**named, "layout": layout, "overwrite": overwrite, **upload})
    from rayalign.training import export as verb

    return verb.run(flags).location


def evaluate(*, config: File | Sequence[File] = (), **flags: FlagValue) -> "Evaluation":
    """A model, adapter or reward model on preference data and benchmarks, alone or beside a second one, as `rayalign evaluate`
    does it with these flags.

        found = rayalign.evaluate(model=result.model_dir, dataset=["held_out.jsonl"], output_dir="runs/dpo/evaluation")
        found.metrics["model"]["dataset"]["metrics"]["accuracy/likelihood"]["value"]

    `config`, the cluster and mistakes are as in `train`. What is done already in output_dir is not computed again.
    """
    from rayalign.config.command_line import build_sections
    from rayalign.config.evaluate import EvaluateConfig
    from rayalign.config.inference import InferenceConfig

    shared, own = build_sections((InferenceConfig, EvaluateConfig), _plain_values(flags), files=_files(config))
    from rayalign.evaluation import evaluate as verb

    return verb.run(shared, own)


def generate(*, config: File | Sequence[File] = (), **flags: FlagValue) -> "PoolResult":
    """A model's own responses to the prompts of data sets, as `rayalign generate` writes them with these flags.

        responses = rayalign.generate(model=result.model_dir, dataset=["prompts.jsonl"], n=4, temperature=0.8, output_dir="out")
        for table in responses.tables(["query", "response"]): ...

    `config`, the cluster and mistakes are as in `train`. Prompts that have their responses already in output_dir are left out.
    """
    from rayalign.config.command_line import build_sections
    from rayalign.config.inference import InferenceConfig
    from rayalign.config.inference_verbs import GenerateConfig

    shared, own = build_sections((InferenceConfig, GenerateConfig), _plain_values(flags), files=_files(config))
    from rayalign.evaluation import generate as verb

    return verb.run(shared, own)


def score(*, config: File | Sequence[File] = (), **flags: FlagValue) -> "PoolResult":
    """Numbers for responses, by reward models, policies, a function of yours or a judge, as `rayalign score` writes them.

        scores = rayalign.score(scorer="reward_model=runs/rm/model", dataset=responses.dataset, output_dir="scores")

    `config`, the cluster and mistakes are as in `train`. Responses that are scored already in output_dir are left out.
    """
    from rayalign.config.command_line import build_sections
    from rayalign.config.inference import InferenceConfig
    from rayalign.config.inference_verbs import ScoreConfig

    shared, own = build_sections((InferenceConfig, ScoreConfig), _plain_values(flags), files=_files(config))
    from rayalign.evaluation import score as verb

    return verb.run(shared, own)


def iterate(algorithm: str, *, config: File | Sequence[File] = (), **flags: FlagValue) -> "list[Round]":
    """Rounds of responses, scores, pairs and training, as `rayalign iterate --rlhf_type ALGORITHM` makes them; what came out of
    each.

        rounds = rayalign.iterate("dpo", model="runs/sft/model", dataset="prompts.jsonl", scorer="python=check.py:score")
        rounds[-1].model

    `flags` are those of `train` and of rounds; `config`, the cluster and mistakes are as there. Stages that are done already in
    output_dir are left out.
    """
    from rayalign.config.inference_verbs import IterateConfig

    run, own = _build(algorithm, config, flags, IterateConfig)
    assert isinstance(own, IterateConfig)
    from rayalign.rounds import iterate as verb

    return verb.run(run, own)


def _config(algorithm: str, files: File | Sequence[File], flags: Mapping[str, FlagValue]) -> "Config":
    return _build(algorithm, files, flags, None)[0]


def _build(
    algorithm: str,
    files: File | Sequence[File],
    flags: Mapping[str, FlagValue],
    extra: "type[Extra] | None",
) -> "tuple[Config, Extra | None]":
    from rayalign.algorithms import ALGORITHMS
    from rayalign.config.command_line import build

    return build(ALGORITHMS, algorithm, _plain_values(flags), files=_files(files), extra=extra)


def _files(files: File | Sequence[File]) -> list[str]:
    return [os.fspath(file) for file in ([files] if isinstance(files, (str, os.PathLike)) else files)]


def _plain_values(flags: Mapping[str, FlagValue]) -> dict[str, Any]:
    return {name: _plain(value) for name, value in flags.items()}


def _plain(value: Any) -> Any:
    """A flag's value with paths as text."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value
