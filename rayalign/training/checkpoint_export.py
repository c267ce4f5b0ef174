"""A checkpoint of a run as a model folder, with the files that the run's own model/ has: what was trained, put onto the model
that the run began with."""

import logging
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rayalign import __version__
from rayalign.algorithms import ALGORITHMS, Algorithm
from rayalign.config.config import Config, config_from_mapping
from rayalign.config.plugins import PLUGIN, load_plugins
from rayalign.config.sections import TunerConfig
from rayalign.config.serving import ExportConfig
from rayalign.config.yaml_files import parse_flags
from rayalign.data.encoder_spec import EncoderSpec
from rayalign.models.registry import REGISTERED_MODELS
from rayalign.models.source import require_model, resolve_model
from rayalign.policy.loading import load_policy
from rayalign.policy.policy import Policy
from rayalign.policy.saving import save_policy
from rayalign.serving.export_folder import CHECKPOINT_NOTE, RUN, check_apart, check_empty
from rayalign.sources.whole_paths import whole_model
from rayalign.storage import Store
from rayalign.training.best import best_checkpoint
from rayalign.training.checkpoint import load_weights
from rayalign.training.checkpoint_folder import Checkpoint, fetch_weights, whole_checkpoints
from rayalign.training.origin import began_with_adapter

logger = logging.getLogger(__name__)

OF_THE_START = ("model", "model_type", "adapter", "beta")
"""Flags of a run that its implicit rewards are measured by: what it began with, and their scale."""

HOW_TO_NAME = (
    "Pass --run_dir with the run's folder and --checkpoint best, last or a step, or --checkpoint with a checkpoint's folder."
)


def run(flags: ExportConfig) -> Store:
    """Writes the model of a checkpoint and returns its folder.

    Raises ValueError where there is no such checkpoint or it is not whole, where the run's model is gone, and for a folder that
    must not be written over.
    """
    if not flags.checkpoint or not flags.output_dir:
        raise ValueError(f"{HOW_TO_NAME} --output_dir names a new folder.")
    if flags.layout != "transformers":
        raise ValueError(
            f"--layout {flags.layout} with --checkpoint: a checkpoint becomes what the run's model/ is. Leave --layout out, "
            "then export that folder with --model and --layout."
        )
    checkpoint = find_checkpoint(flags.checkpoint, flags.run_dir)
    output = Store.at(flags.output_dir)
    check_apart(output, {checkpoint.store.location: "the checkpoint that is exported"})
    check_empty(output, overwrite=flags.overwrite, is_export=(output / CHECKPOINT_NOTE).exists())
    config = config_of_run(checkpoint.store.parent.parent, flags.model)
    began = require_model(config.model, REGISTERED_MODELS)
    check_apart(
        output,
        {
            began.adapter: f"the adapter that the run began with, {began.adapter}",
            began.base: f"the run's base model, {began.base}",
        },
    )
    with tempfile.TemporaryDirectory() as temporary:
        weights = fetch_weights(checkpoint.store, Path(temporary))
        folder = Path(temporary) / "model"
        folder.mkdir()
        write_model(config, weights, folder)
        note = {"rayalign": __version__, "checkpoint": checkpoint.store.name, RUN: _start_of(config)}
        Store(str(folder / CHECKPOINT_NOTE)).write_json(note)
        odd = sorted({store.name for store in output.list()} - {file.name for file in folder.iterdir()})
        if odd:
            raise ValueError(
                f"--output_dir {output.location} holds something else than an earlier export ({odd[0]}), which is all that "
                "--overwrite true replaces. Choose another folder."
            )
        output.delete()
        output.upload(folder)
    logger.info("The model of step %d is in %s", checkpoint.step, output.location)
    return output


def find_checkpoint(name: str, run_dir: str | None) -> Checkpoint:
    """The whole checkpoint that --checkpoint and --run_dir name."""
    if run_dir is None:
        store = Store.at(name)
        found = [checkpoint for checkpoint in whole_checkpoints(store.parent) if checkpoint.store == store]
        if not found:
            raise ValueError(f"--checkpoint {name}: is no folder of a whole checkpoint of a run. {HOW_TO_NAME}")
        return found[0]
    folder = Store.at(run_dir)
    kept = whole_checkpoints(folder / "checkpoints")  # the newest first
    best = best_checkpoint(folder)
    wanted = {
        "last": kept[:1],
        "best": [checkpoint for checkpoint in kept if checkpoint.store == best],
    }.get(name, [checkpoint for checkpoint in kept if name in (str(checkpoint.step), checkpoint.store.name)])
    if not wanted:
        steps = ", ".join(f"{c.step}{' (best)' if c.store == best else ''}" for c in reversed(kept)) or "none"
        raise ValueError(
            f"--checkpoint {name}: {folder.location} has no such checkpoint. Of these steps it keeps whole ones: {steps}."
        )
    return wanted[0]


def config_of_run(folder: Store, model: str | None = None) -> Config:
    """The configuration of a run by its folder; `model` is where its base model is now, if that has moved."""
    file = folder / "config.yaml"
    try:
        values = parse_flags(file.read_bytes())
        algorithm = _algorithm(str(values.pop("rlhf_type", None)), values.pop(PLUGIN, None) or (), folder)
        moved: Mapping[str, Any] = {"model": model, "model_type": None} if model else {}
        config = config_from_mapping(algorithm, {**values, **moved})
    except FileNotFoundError:
        raise ValueError(f"{file.location}: is not there, so the run's flags are unknown.") from None
    except ValueError as error:
        raise ValueError(f"{file.location}, the flags of the run: {error}") from None
    if model and began_with_adapter(folder) and resolve_model(config.model, REGISTERED_MODELS).adapter is None:
        raise ValueError(
            f"--model {model}: the run began with an adapter, {values.get('adapter') or values.get('model')}, and this is "
            "none. Give the folder where that adapter is now."
        )
    return config


def _start_of(config: Config) -> dict[str, Any]:
    """The flags of OF_THE_START, with whole paths."""
    start = {name: value for name, value in config.to_dict().items() if name in OF_THE_START}
    return start | {name: whole_model(start[name]) for name in ("model", "adapter") if start[name]}


def _algorithm(name: str, plugins: Any, folder: Store) -> type[Algorithm]:
    if name in ALGORITHMS:
        return ALGORITHMS[name]
    names = [Store(str(plugin)).name.removesuffix(".py") for plugin in plugins]
    files = {plugin: folder / "plugins" / f"{plugin}.py" for plugin in names}
    for plugin in load_plugins([file.location if file.exists() else plugin for plugin, file in files.items()], ALGORITHMS):
        if name in plugin.algorithms:
            return plugin.algorithms[name]
    raise ValueError(f"the algorithm {name} is unknown.")


def write_model(config: Config, weights: Path, folder: Path) -> None:
    """Writes into `folder` what a run of this configuration writes as its model/, with the trainable weights of the folder
    `weights`. Runs on the CPU, which holds the whole model for it."""
    dtype: Any = config.model.dtype_on("cuda" if config.cluster.gpus_per_worker else "cpu")
    model = replace(
        config.model,
        dtype=dtype,
        # How the run computed is of no account for what is written, and may not work on this machine.
        attn_implementation="sdpa",
        gradient_checkpointing=False,
        torch_compile=False,
    )
    standard = {
        name: getattr(TunerConfig(), name) for name in ("quant_bits", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
    }
    unquantised = replace(config, model=model, tuner=replace(config.tuner, **standard))
    policy = trained_policy(unquantised, weights, device=torch.device("cpu"))
    save_policy(policy, folder, safe_serialization=config.run.safe_serialization)
    base, trust = require_model(config.model, REGISTERED_MODELS).base, config.model.trust_remote_code
    spec = EncoderSpec(model=base, responses=config.algorithm.needs.responses, trust_remote_code=trust)
    spec.processor.save_pretrained(folder)


def trained_policy(config: Config, weights: Path, *, device: torch.device) -> Policy:
    """The model of a run's configuration with the trainable weights of the folder `weights`, and without what a reference may
    need."""
    policy = load_policy(
        require_model(config.model, REGISTERED_MODELS),
        model=config.model,
        tuner=config.tuner,
        device=device,
        needs=replace(config.algorithm.needs, reference=False),
        spread_over_gpus=device.type == "cuda" and config.cluster.spreads_models,
        seed=config.optimizer.seed,
    )
    load_weights(weights, policy)
    return policy
