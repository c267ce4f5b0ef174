"""What verbs that run a model over records begin with: flags with whole paths, the cluster, the files of model and data."""

import contextlib
import dataclasses
import hashlib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rayalign.algorithms import SFT
from rayalign.cluster import require_lasting_folder
from rayalign.config.config import Config
from rayalign.config.inference import InferenceConfig
from rayalign.config.plugins import Plugin
from rayalign.config.sections import ClusterConfig, DataConfig, ModelConfig, OptimizerConfig, RunConfig
from rayalign.data.rows import Sources
from rayalign.downloads import versions
from rayalign.evaluation.pool_folder import ROWS, SETTINGS
from rayalign.formats.columns import parse_renames
from rayalign.joining import ray_as_found, start_ray
from rayalign.models.compat import hub_revision
from rayalign.models.registry import REGISTERED_MODELS
from rayalign.models.size import reason_for_gpus
from rayalign.models.source import ModelSource, require_model
from rayalign.nodes import resolve_cluster, wait_for_workers
from rayalign.ops.value_head import find_value_head
from rayalign.reference.key import hashed_files, is_hashed
from rayalign.shared_paths import check_shared_paths
from rayalign.sources.files import Dataset, whole_argument
from rayalign.sources.several import resolve_datasets
from rayalign.sources.whole_paths import whole_model
from rayalign.storage import Store, is_url

logger = logging.getLogger(__name__)

PICTURES = "image_root"
"""The setting of a pool that says where the images lie that its rows name by their whole paths."""

ANYWHERE = "/"
"""In place of a folder that holds all images, where there is none."""


def config_of(flags: InferenceConfig, plugins: tuple[Plugin, ...] = ()) -> Config:
    """The flags as those of a run that trains nothing, with absolute paths; `plugins` read its rows, too. Raises ValueError
    where --output_dir is missing or would not last."""
    if not flags.output_dir:
        raise ValueError("No output folder given: pass --output_dir.")
    require_lasting_folder(flags.output_dir)
    return Config(
        algorithm=SFT(),
        data=DataConfig(
            dataset=tuple(whole_argument(argument) for argument in flags.dataset),
            max_length=flags.max_length,
            columns=flags.columns,
            image_root=Store.at(flags.image_root).location if flags.image_root else None,
            allow_image_urls=flags.allow_image_urls,
            data_seed=flags.data_seed,
            max_pixels=flags.max_pixels,
        ),
        model=ModelConfig(
            model=flags.model and whole_model(flags.model),
            model_type=flags.model_type,
            adapter=flags.adapter and whole_model(flags.adapter),
            dtype=flags.dtype,
            attn_implementation=flags.attn_implementation,
            gradient_checkpointing=False,
            trust_remote_code=flags.trust_remote_code,
        ),
        optimizer=OptimizerConfig(batch_size=flags.batch_size),
        run=RunConfig(output_dir=Store.at(flags.output_dir).location, overwrite=flags.overwrite),
        cluster=ClusterConfig(
            num_workers=flags.num_workers,
            gpus_per_worker=flags.gpus_per_worker,
            cpus_per_worker=flags.cpus_per_worker,
            accelerator_type=flags.accelerator_type,
            label_selector=flags.label_selector,
            wait_for_nodes=flags.wait_for_nodes,
        ),
        plugins=plugins,
    )


@contextlib.contextmanager
def on_cluster(config: Config, *, model: ModelSource | None) -> Iterator[Config]:
    """Within it, Ray runs and has room for the workers, whose GPUs are resolved in the configuration; a cluster that is started
    here ends with it. `model`: what each worker loads; None: they need no GPU.

    Raises ValueError for workers that there is no room for, and for an output folder that not every node sees.
    """
    with ray_as_found():
        start_ray(config)

        def reason() -> str | None:
            return None if model is None else reason_for_gpus(model.base, trust_remote_code=config.model.trust_remote_code)

        if model is None and config.cluster.gpus_per_worker is None:
            config = config.replace({"gpus_per_worker": 0})
        config = resolve_cluster(config, reason)
        wait_for_workers(config)
        folder = Store.at(str(config.run.output_dir)).local_path
        if folder is not None:
            check_shared_paths([], {f"--output_dir {folder}": str(folder)})
        yield config


def sources_of(config: Config) -> Sources:
    """The data sets of --dataset and how their images are found; raises ValueError where there is none, and for an
    output folder that is the same as a data set's, or around or inside of it."""
    if not config.data.dataset:
        raise ValueError("No data given: pass --dataset with files, folders, globs or registered names.")
    data = config.data
    datasets = datasets_of(data.dataset)
    if config.run.output_dir:
        for dataset in datasets:
            _require_apart(dataset, Store.at(config.run.output_dir))
    reading = tuple(plugin for plugin in config.plugins if plugin.formats)
    return Sources(datasets, data.image_root, data.allow_image_urls, reading, parse_renames(data.columns))


def datasets_of(arguments: Sequence[str]) -> tuple[Dataset, ...]:
    """The data sets, of which those that a pool wrote have their images where its settings say."""
    return tuple(dataclasses.replace(dataset, pictures=_pictures_of(dataset)) for dataset in resolve_datasets(arguments))


def _pictures_of(dataset: Dataset) -> str | None:
    """Where the images of a data set lie that a pool wrote, as its settings say; None for any other."""
    folders = {Store(file.location).parent.location for file in dataset.files}
    if len(folders) != 1 or Store(min(folders)).name != ROWS:
        return None
    note = Store(min(folders)).parent / SETTINGS
    try:
        settings = note.read_json_object() if note.exists() else {}
    except ValueError:  # a file of the user's own that has the name
        return None
    root = settings.get(PICTURES)
    if "verb" not in settings or not isinstance(root, str) or root == ANYWHERE:
        return None
    logger.info("--dataset %s: its images lie in %s, as %s says", dataset.argument, root, note.location)
    return root


def picture_root(image_root: str | None, datasets: Sequence[Dataset]) -> str:
    """The folder below which all images of data sets lie: the image root, or what the folders of their images have in common;
    ANYWHERE where that is nothing."""
    if image_root:
        return image_root
    places = {dataset.folder_of(file).location for dataset in datasets for file in dataset.files}
    try:
        shared = os.path.commonpath([place.replace("://", ":/", 1) for place in places])
    except ValueError:  # a disk's and a store's
        return ANYWHERE
    return ANYWHERE if shared in ("", "/") or shared.endswith(":") else shared.replace(":/", "://", 1)


def pictures_of_rows(sources: Sources) -> dict[str, str]:
    """What the settings of a pool whose rows have the prompts' images say of where these lie; nothing where no folder holds
    them all."""
    root = picture_root(sources.image_root, sources.datasets)
    return {} if root == ANYWHERE else {PICTURES: root}


def _require_apart(dataset: Dataset, output: Store) -> None:
    """Raises ValueError for an output folder whose results would be taken for records, or that is emptied with them in it."""
    place = Store.at(re.sub(r"#\d+$", "", dataset.argument))
    inside = [file.location for file in dataset.files if _is_below(file.location, output)]
    if inside:
        problem = f"holds {inside[0]}, which is read for --dataset {dataset.argument}"
    elif dataset.files and place.is_dir() and _is_below(output.location, place):
        problem = f"lies in the folder of --dataset {dataset.argument}, and its results would be taken for records"
    else:
        return
    raise ValueError(f"--output_dir {output.location}: {problem}. Choose a folder beside the data.")


def _is_below(location: str, folder: Store) -> bool:
    """Whether a path or URL is a folder or lies in it, links followed."""
    one, other = (
        os.path.realpath(store.local_path) if store.local_path is not None else store.location
        for store in (Store.at(location), folder)
    )
    return f"{one}/".startswith(f"{other.rstrip('/')}/")


def model_of(config: Config) -> ModelSource:
    """The model that the flags name; raises ValueError where there is none."""
    if not (config.model.model or config.model.model_type or config.model.adapter):
        raise ValueError("No model given: pass --model FOLDER_OR_HUB_ID, or --model_type with a registered name.")
    return require_model(config.model, REGISTERED_MODELS)


def is_reward_model_here(source: ModelSource) -> bool:
    """Whether a model in a folder of this machine is a reward model; of others those find out that load them."""
    place = Path(source.adapter or source.base)
    return place.is_dir() and find_value_head(place) is not None


def files_of_model(source: ModelSource) -> dict[str, Any]:
    """What tells a model from every other, for the settings of a pool: its files with their sizes and times of change."""
    return {"base": _versions(source.base), "adapter": _versions(source.adapter) if source.adapter else None}


def files_of_data(sources: Sources) -> dict[str, Any]:
    """The same of data sets: their files, draws, renamed columns, and the plugins that read them."""
    files = [[re.sub(r".*#", "#", d.argument) if d.sample else "", *map(str, d.files)] for d in sources.datasets]
    told: dict[str, Any] = {"files": files, "image_root": sources.image_root, "columns": sorted(map(list, sources.columns))}
    if sources.plugins:
        told["plugins"] = [[plugin.name, hashlib.sha256(plugin.text).hexdigest()] for plugin in sources.plugins]
    return told


def _versions(model: str) -> dict[str, str]:
    if is_url(model):
        return {f"{model}/{name}": version for name, version in versions(model).items() if is_hashed(name)}
    if not Path(model).is_dir():
        return {model: hub_revision(model)}
    stats = [(file, file.stat()) for file in hashed_files(Path(model))]
    return {str(file): f"{stat.st_size} bytes, version {stat.st_mtime_ns}" for file, stat in stats}
