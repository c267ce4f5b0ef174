"""Which split a data file belongs to, by its name, as the Hugging Face hub tells it; `files` asks of all that one --dataset
names."""

import posixpath
import re
from collections.abc import Sequence

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Words of a file's name, or of its folders', by the split that they name."""

_SPLIT_OF = {word: split for split, words in SPLITS.items() for word in words}


def require_one_split(argument: str, locations: Sequence[str]) -> None:
    """Raises ValueError where the files of a --dataset argument belong to several splits, of which some are not to be trained
    on."""
    if len(locations) < 2:
        return
    paths = [location.rpartition("://")[2] for location in locations]
    folder = posixpath.commonpath([posixpath.dirname(path) for path in paths])
    found: dict[str, str] = {}
    for location, path in zip(locations, paths, strict=True):
        split = _split_of(path[len(folder) :])
        if split is not None:
            found.setdefault(split, location)
    if len(found) > 1:
        one = found.get("train", next(iter(found.values())))
        raise ValueError(
            f"Dataset '{argument}' holds the splits {', '.join(found)}, of which not all are to be trained on, such as "
            f"{', '.join(found.values())}. Name the files to read, such as {one}, or a glob of them."
        )


def _split_of(path: str) -> str | None:
    """The split that a path names; of several the one nearest to its end, where files stand in folders."""
    for part in reversed(path.lower().split("/")):
        for word in re.findall("[a-z]+", part):
            if word in _SPLIT_OF:
                return _SPLIT_OF[word]
    return None
