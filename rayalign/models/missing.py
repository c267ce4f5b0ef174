"""A model that is not where it is said to be: what was tried, which name was meant, what helps; sentences for `source`."""

import difflib
from collections.abc import Collection, Iterable
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from transformers.utils.hub import cached_file

from rayalign.downloads import model_files
from rayalign.storage import is_url

WEIGHTS = ("*.safetensors", "*.bin", "*.index.json")
DESCRIPTIONS = ("config.json", "adapter_config.json")


def require_config(model: str, named: str, known: Iterable[str] = ()) -> None:
    """Raises ValueError, a sentence that begins with `named`, where a model's folder or hub id brings no config.json.

    A hub id is looked up on this machine and, unless HF_HUB_OFFLINE is set, on the hub; `known` are hub ids that may be meant.
    """
    folder = Path(model).expanduser()
    if not is_url(model) and folder.exists():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{named}: {without(folder, 'config.json')}")
        return
    if is_url(model):
        if "config.json" not in _remote_files(model, named):
            raise ValueError(f"{named}: {without_remote(model, 'config.json')}")
        return
    if not _may_be_hub_id(model):
        raise ValueError(f"{named}: {no_folder(model)}")
    try:
        cached_file(model, "config.json")
    except (OSError, ValueError) as error:
        raise ValueError(f"{named}: {_no_hub_model(model, error, known)}") from None


def require_weights(model: str, named: str) -> None:
    """Raises ValueError where a model's folder holds no file of weights; a hub id is left to the download."""
    folder = Path(model).expanduser()
    if is_url(model):
        has_weights = any(fnmatch(name, pattern) for name in _remote_files(model, named) for pattern in WEIGHTS)
    else:
        has_weights = not folder.is_dir() or any(next(folder.glob(pattern), None) for pattern in WEIGHTS)
    if not has_weights:
        raise ValueError(
            f"{named}: the folder has a config.json and no weights (*.safetensors or *.bin). Copy them beside it; a download "
            "that was cut short goes on when it is started again."
        )


def no_folder(model: str) -> str:
    """That a path leads nowhere, and which folder near it may be meant."""
    folder = Path(model).expanduser()
    if folder.is_file():
        return f"is a file, and a model is a folder. Did you mean {Path(model).parent}?"
    return f"there is no such folder (looked for {folder.absolute()}).{_did_you_mean(neighbour(folder))}"


def without(folder: Path, wanted: str) -> str:
    """That a folder lacks the file that makes it what it is taken for, and where one like it lies inside."""
    if folder.is_file():
        return no_folder(str(folder))
    inside = [
        found.parent
        for pattern in ("model", "*", "snapshots/*", "*/model")
        for description in DESCRIPTIONS
        for found in sorted(folder.glob(f"{pattern}/{description}"))
    ]
    if inside:
        return f"the folder has no {wanted}.{_did_you_mean(inside[0])}"
    if next(folder.glob("*.gguf"), None):
        return f"the folder has no {wanted}, and GGUF files can't be trained: give the model that they were made from."
    return f"the folder has no {wanted}, so it is {_no_such_kind(wanted)}{'' if any(folder.iterdir()) else ' (it is empty)'}."


def without_remote(url: str, wanted: str) -> str:
    """`without` for the folder behind a URL: it is there, and lacks the file."""
    try:
        inside = any(description in model_files(f"{url}/model") for description in DESCRIPTIONS)
    except ValueError:
        inside = False
    meant = f" Did you mean {url}/model?" if inside else ""
    return f"the folder has no {wanted}, so it is {_no_such_kind(wanted)}.{meant}"


def _remote_files(url: str, named: str) -> Collection[str]:
    try:
        return model_files(url)
    except ValueError as error:
        raise ValueError(f"{named}{str(error).removeprefix(url)}") from None


def _no_such_kind(wanted: str) -> str:
    return "no adapter of peft" if wanted == DESCRIPTIONS[1] else "no model of transformers"


def neighbour(folder: Path) -> Path | None:
    """The folder that was probably meant: at the first part of the path that is missing, the part most like it; None where
    nothing is near."""
    folder = folder.absolute()
    missing = [folder]
    while not missing[-1].parent.is_dir() and missing[-1].parent != missing[-1]:
        missing.append(missing[-1].parent)
    first = missing[-1]
    try:
        names = [entry.name for entry in first.parent.iterdir() if entry.is_dir()]
    except OSError:
        return None
    near = difflib.get_close_matches(first.name, names, n=3, cutoff=0.7)
    whole = [first.parent / name / folder.relative_to(first) for name in near]
    return next((path for path in whole if path.is_dir()), None)


def _did_you_mean(folder: Path | None) -> str:
    if folder is None:
        return ""
    here = Path.cwd()
    return f" Did you mean {folder.relative_to(here) if folder.is_relative_to(here) else folder}?"


def _may_be_hub_id(model: str) -> bool:
    return not model.startswith((".", "/", "~")) and model.count("/") <= 1


def _no_hub_model(model: str, error: Exception, known: Iterable[str]) -> str:
    """Why a hub id could not be had, by what the hub's client says."""
    cause = error if error.__cause__ is None else error.__cause__
    near = neighbour(Path(model))
    alike = difflib.get_close_matches(model, list(known), n=1, cutoff=0.85)
    hint = _did_you_mean(near) if near else f" Did you mean {alike[0]}?" if alike and alike[0] != model else ""
    match cause:
        case GatedRepoError():
            return (
                f"the hub gives this model only to those who agreed to its terms. Agree on {constants.ENDPOINT}/{model}, then "
                "log in with `hf auth login`, or set HF_TOKEN on every node."
            )
        case RepositoryNotFoundError():
            return (
                f"there is no such folder here and no such model on {constants.ENDPOINT}.{hint} If it is a private one, log in "
                "with `hf auth login`, or set HF_TOKEN on every node."
            )
        case HFValidationError():
            return f"there is no such folder, and a hub id looks like OWNER/NAME.{hint}"
        case LocalEntryNotFoundError() if constants.HF_HUB_OFFLINE:
            why = "HF_HUB_OFFLINE is set, so the hub was not asked"
        case LocalEntryNotFoundError():
            why = f"{constants.ENDPOINT} can't be reached"
        case EntryNotFoundError():
            return f"the hub's model has no config.json, so it is no model of transformers.{hint}"
        case _:
            why = str(error).splitlines()[0].rstrip(".") or type(error).__name__
    return (
        f"there is no such folder here and no such model in {constants.HF_HUB_CACHE}, and {why}.{hint} Where there is no "
        f"connection, give a folder with the model's files, or run `hf download {model}` where there is one, copy that cache "
        "to every node, and set HF_HUB_OFFLINE=1."
    )
