"""The places of a run, looked at from every node."""

import itertools
from collections.abc import Iterator
from pathlib import Path

from rayalign.cluster import require_lasting_folder
from rayalign.config.config import Config
from rayalign.data.prepare import cache_of
from rayalign.evaluation.benchmarks.shelf import parse_benchmarks
from rayalign.models.registry import REGISTERED_MODELS
from rayalign.models.source import resolve_model
from rayalign.shared_paths import SharedFile, check_shared_paths
from rayalign.sources.files import resolve_dataset
from rayalign.storage import Store, is_url

PICTURES_SOUGHT = 5
"""Entries of --image_root that each node looks for: elsewhere it may be the empty folder that something is mounted on."""


def require_lasting_folders(config: Config) -> None:
    """Raises ValueError in a job whose results or cache would lie in a folder that Ray deletes."""
    require_lasting_folder(config.run.output_dir)
    if config.data.cache_dir:
        require_lasting_folder(config.data.cache_dir, "--cache_dir")


def check_places(config: Config) -> None:
    """Raises ValueError where some node of the cluster does not see the local files that the run reads, or the folders that it
    writes to."""
    written = {
        flag: str(store.local_path)
        for flag, store in (
            (f"--output_dir {config.run.output_dir}", Store.at(str(config.run.output_dir))),
            (_cache_flag(config), cache_of(config)),
        )
        if store.local_path is not None
    }
    check_shared_paths(list(_inputs(config)), written)


def _cache_flag(config: Config) -> str:
    return f"--cache_dir {config.data.cache_dir or f'(default: {cache_of(config).location})'}"


def _inputs(config: Config) -> Iterator[SharedFile]:
    """The local files and folders that a run reads."""
    data = config.data
    for flag, arguments in (("--dataset", data.dataset), ("--val_dataset", data.val_dataset)):
        for argument in arguments:
            for file in resolve_dataset(argument).files:
                local = Store(file.location).local_path
                if local is not None:
                    yield SharedFile(f"{flag} {argument}", str(local), file.size)
    for name, place in parse_benchmarks(config.run.eval_benchmarks).items():
        local = Store.at(place).local_path
        if local is not None:
            yield SharedFile(f"--eval_benchmarks {name}:{place}", str(local), None)
    root = Store.at(data.image_root).local_path if data.image_root else None
    if root is not None:
        given = f"--image_root {data.image_root}"
        yield SharedFile(given, str(root), None)
        entries = (entry for entry in root.iterdir() if entry.exists()) if root.is_dir() else ()
        for entry in itertools.islice(entries, PICTURES_SOUGHT):
            yield SharedFile(given, str(entry), entry.stat().st_size if entry.is_file() else None)
    source = resolve_model(config.model, REGISTERED_MODELS)
    for folder in filter(None, (source.base, source.adapter)):
        if not is_url(folder) and Path(folder).is_dir():
            for path in sorted(Path(folder).iterdir()):
                if path.is_file():
                    yield SharedFile(_model_flag(config, folder), str(path), path.stat().st_size)


def _model_flag(config: Config, folder: str) -> str:
    named = {config.model.model: "--model", config.model.adapter: "--adapter"}
    return f"{named.get(folder, 'The model')} {folder}"
