"""The folder that an export goes into. It is emptied first, so that it must hold nothing but an earlier export, and nothing
that is read."""

import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from rayalign.storage import Store, is_url

CHECKPOINT_NOTE = "exported_checkpoint.json"
"""The file beside the model of a checkpoint that says that it was exported, and may be written over: a run's own model/ has the
others, too. `RUN` in it are the flags of its run that tell what the model is compared with."""

RUN = "run"


def check_apart(output: Store, read: Mapping[str | None, str]) -> None:
    """Raises ValueError where `output` is, holds or lies in a folder that is read. `read`: what errors call each folder or URL;
    what is no folder here, as hub ids, is passed over."""
    own = _whole(output)
    for place, words in read.items():
        if place is None or not (is_url(place) or Path(place).expanduser().is_dir()):
            continue
        other = _whole(Store.at(place))
        if other.is_relative_to(own) or own.is_relative_to(other):
            how = "holds" if other.is_relative_to(own) else "lies in"
            raise ValueError(f"--output_dir {output.location} {how} {words}. Choose another folder.")


def check_empty(output: Store, *, overwrite: bool, is_export: bool) -> None:
    """Raises ValueError where `output` has files that must not be deleted."""
    if not output.list():
        return
    if not overwrite:
        raise ValueError(
            f"--output_dir {output.location} is not empty. Pass --overwrite true to replace an earlier export, or another "
            "--output_dir."
        )
    if not is_export:
        raise ValueError(
            f"--output_dir {output.location} holds something else than an earlier export, which is all that --overwrite true "
            "replaces. Choose another folder."
        )


def _whole(store: Store) -> PurePosixPath:
    """Where a folder is, over links; of a URL without its options."""
    local = store.local_path
    return PurePosixPath(store.location.partition("?")[0] if local is None else os.path.realpath(local))
