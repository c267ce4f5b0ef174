"""Folders written by `datasets.save_to_disk`: which of their files hold rows, and which are notes about them.

`files` asks while it looks through a folder; `arrow_rows` reads what is found.
"""

import posixpath
from collections.abc import Sequence

from rayalign.storage import Store

STATE, INFO, SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
"""A saved data set's list of files, its description, and the list of splits in the folder around several."""


def without_their_notes(folder: Store, names: Sequence[str]) -> list[str]:
    """The files of a folder, by their paths inside it, without those that only describe a saved data set; of .arrow files,
    those that belong to one.

    Raises ValueError for several splits, of which some are not to be trained on, and where a file with rows is missing.
    """
    present = set(names)
    arrow = {posixpath.dirname(name) for name in names if name.lower().endswith(".arrow")}
    saved = [name for name in names if posixpath.basename(name) == STATE and posixpath.dirname(name) in arrow]
    notes: set[str] = set()
    rows: set[str] = set()
    for state in saved:
        inner = posixpath.dirname(state)
        notes |= {state, posixpath.join(inner, INFO)}
        rows |= {posixpath.join(inner, name) for name in _files_of(folder / state)}
    lost = sorted(rows - present)
    if lost:
        raise ValueError(f"{folder.location}: its {STATE} names {lost[0]}, which isn't there. Copy the whole folder.")
    for name in names:
        if posixpath.basename(name) == SPLITS and any(state.startswith(name.removesuffix(SPLITS)) for state in saved):
            _require_one_split(folder / name)
            notes.add(name)
    return [name for name in names if name not in notes and (name in rows or not name.lower().endswith(".arrow"))]


def _files_of(state: Store) -> list[str]:
    content = state.read_json()
    files = content.get("_data_files") if isinstance(content, dict) else None
    if not isinstance(files, list) or (content.get("_indices_data_files") or content.get("_indices_files")):
        raise ValueError(
            f"{state.location}: written by an old version of datasets. Write the rows as parquet: "
            "datasets.load_from_disk(FOLDER).to_parquet('rows.parquet')."
        )
    return [str(file["filename"]) for file in files]


def _require_one_split(splits: Store) -> None:
    names = splits.read_json().get("splits", [])
    if len(names) > 1:
        raise ValueError(
            f"{splits.parent.location} holds the splits {', '.join(names)}. Name the one to read, such as "
            f"{splits.parent.location}/{names[0]}."
        )
