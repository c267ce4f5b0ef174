"""What a run trains on and starts from: noted in its folder when it begins, and compared when it goes on."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayalign.config.config import Config
from rayalign.downloads import versions
from rayalign.models.compat import hub_revision
from rayalign.reference.key import hashed_files, is_hashed
from rayalign.sources.files import resolve_dataset
from rayalign.storage import Store, is_url

if TYPE_CHECKING:
    from rayalign.data.prepare import RunData

ORIGIN_NOTE = "origin.json"
"""The file of a run's folder that says which data and which base model it began with."""

SAMPLES, SAMPLE_BYTES = 128, 2**13
"""Parts of a file that its fingerprint reads: enough to tell any other training from this one, in milliseconds."""

SHOWN = 5
"""Differences that an error lists."""


def check_origin(config: Config, data: "RunData") -> None:
    """Notes in the run's folder which data and which base model it begins with; raises ValueError where an unfinished run began
    with others."""
    note = Store.at(str(config.run.output_dir)) / ORIGIN_NOTE
    now: dict[str, dict[str, str]] = {
        "dataset": _data_files(config.data.dataset),
        "val_dataset": _data_files(config.data.val_dataset),
        "encoded": {"training": data.training.store.name, "held out": data.held_out.store.name if data.held_out else "none"},
        "model": _model_files(data.source.base),
        "adapter": _model_files(data.source.adapter) if data.source.adapter else {},
    }
    if note.exists():
        remedy = "Bring it back as it was, or pass --overwrite true to start anew."
        changed = _differences(_read_note(note, now, remedy), now)
        if changed:
            lines = "".join(f"\n  {line}" for line in changed[:SHOWN])
            lines += f"\n  and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
            raise ValueError(f"The unfinished run in {note.parent.location} began with something else:{lines}\n{remedy}")
    note.write_json(now)


def began_with_adapter(folder: Store) -> bool:
    """Whether the run in a folder began with an adapter; not where no note tells."""
    note = folder / ORIGIN_NOTE
    return bool(note.exists() and note.read_json_object().get("adapter"))


def fingerprint(file: Path) -> str:
    """A file's size and a hash over parts of it, its beginning and end among them; a small file is read whole."""
    size = file.stat().st_size
    digest = hashlib.sha256()
    with file.open("rb") as content:
        if size <= SAMPLES * SAMPLE_BYTES:
            digest.update(content.read())
        else:
            for sample in range(SAMPLES):
                content.seek((size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
                digest.update(content.read(SAMPLE_BYTES))
    return f"{size} bytes, samples {digest.hexdigest()[:32]}"


def _data_files(arguments: Iterable[str]) -> dict[str, str]:
    files = (file for argument in arguments for file in resolve_dataset(argument).files)
    return {file.location: f"{file.size} bytes, version {file.modified}" for file in files}


def _model_files(model: str) -> dict[str, str]:
    """The files that a model's or adapter's outputs depend on, by name, so that its folder may move; of a model of the hub its
    revision."""
    if is_url(model):
        return {name: version for name, version in versions(model).items() if is_hashed(name)}
    folder = Path(model)
    if not folder.is_dir():
        return {model: hub_revision(model)}
    return {file.name: fingerprint(file) for file in hashed_files(folder)}


def _read_note(note: Store, like: Mapping[str, Any], remedy: str) -> Mapping[str, Mapping[str, str]]:
    try:
        content = note.read_json_object()
    except ValueError as error:
        raise ValueError(f"{error} {remedy}") from None
    if set(content) != set(like) or not all(isinstance(files, dict) for files in content.values()):
        raise ValueError(f"{note.location} is damaged: it does not tell what the run began with. {remedy}")
    return content


def _differences(before: Mapping[str, Mapping[str, str]], now: Mapping[str, Mapping[str, str]]) -> list[str]:
    """A line for each file that is new, gone or another one."""
    lines = []
    for kind in ("dataset", "val_dataset", "model", "adapter"):
        for name in sorted({*before[kind], *now[kind]}):
            old, new = before[kind].get(name), now[kind].get(name)
            if old != new:
                lines.append(f"{kind} {name}: {old or 'not there'} -> {new or 'not there'}")
    if not lines and before["encoded"] != now["encoded"]:
        lines.append("the same records are encoded otherwise: another processor, chat template or version of the libraries")
    return lines
