"""The places that a run reads and writes, named so that they mean the same in every process."""

import re
from pathlib import Path

from rayalign.config.config import Config
from rayalign.sources.files import whole_argument
from rayalign.storage import Store, is_url


def with_whole_paths(config: Config) -> Config:
    """The same configuration with absolute paths, since other processes have other working folders. Registered data sets, hub
    ids and URLs stay as they are."""
    data, model, run = config.data, config.model, config.run
    folder = run.output_dir or f"output/{config.algorithm.name}"
    places = {"output_dir": folder, "image_root": data.image_root, "cache_dir": data.cache_dir}
    models = {"model": model.model, "adapter": model.adapter}
    return config.replace(
        {
            "dataset": [whole_argument(argument) for argument in data.dataset],
            "val_dataset": [whole_argument(argument) for argument in data.val_dataset],
            "eval_benchmarks": [_whole_benchmark(argument) for argument in run.eval_benchmarks],
            **{name: _whole(f"--{name}", place) for name, place in places.items() if place},
            **{name: whole_model(place) for name, place in models.items() if place},
        }
    )


def whole_model(place: str) -> str:
    """A model or adapter named from any working folder: a local folder's path is made absolute, a hub id or URL stays. A name
    that may be either, such as runs/sft, is the folder where there is one, as a model's own loading takes it."""
    if is_url(place) or not Path(place).expanduser().is_dir():
        return place
    return str(Path(place).expanduser().resolve())


def _whole_benchmark(argument: str) -> str:
    """NAME:FOLDER with a whole folder; what is not written so is refused elsewhere."""
    name, _, folder = argument.partition(":")
    return f"{name}:{_whole(f'--eval_benchmarks {name}:', folder)}" if folder else argument


def _whole(flag: str, place: str) -> str:
    """A folder's absolute path or URL; raises ValueError for a URL that no file system has."""
    if re.match(r"(s3|gs|gcs|file|https?):", place) and not re.match(r"\w+://.*[^/]", place):
        raise ValueError(f"{flag} {place}: is no path and no whole URL. Write one such as s3://bucket/folder.")
    store = Store.at(place)
    if store.local_path is None:
        try:
            store.resolve()
        except (OSError, ValueError) as error:
            raise ValueError(f"{flag} {place}: {error}. Give a path, or a URL of s3://, gs:// or file://.") from None
    return store.location
