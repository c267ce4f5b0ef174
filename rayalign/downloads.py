"""Folders and files that a flag names by URL, on this machine: a model's folder is downloaded once, for all processes and runs.

A copy is called after the URL and the listing behind it (names, sizes, times of change), so that a folder that has changed is
fetched anew. What a run notes of a model (cache keys, configurations) is the URL and that listing, never the copy's path.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from rayalign.storage import COPIES, Store, is_url

logger = logging.getLogger(__name__)

T = TypeVar("T")

FOLDER_VARIABLE = "RAYALIGN_DOWNLOADS"
"""Names the folder of the copies; default: rayalign/downloads in XDG_CACHE_HOME, or in ~/.cache."""

DESCRIPTIONS = (".json", ".txt", ".jinja", ".model", ".tiktoken", ".py")
"""Files that say how a model is built and how its texts and images are encoded; a megabyte or a few."""

SAFE_WEIGHTS, OTHER_WEIGHTS = ".safetensors", ".bin"
VALUE_HEAD = "value_head.bin"
NO_WEIGHTS = re.compile(r"(optimizer|scheduler|training_args|rng_state|trainer_state|consolidated)\b.*")
"""Files that training programs leave beside the weights, and weights in a layout of their own that stand beside those of
transformers."""

FOLDERS = ("additional_chat_templates",)
"""The folders inside of a model's that belong to it."""

ANSWER_SECONDS = 60
"""How long a store may take to list a folder. Clients without credentials ask for them for many minutes."""

REFUSED = re.compile(r"ACCESS_DENIED|[Cc]redentials|INVALID_ACCESS_KEY_ID|INVALID_CLIENT_TOKEN_ID|SIGNATURE_DOES_NOT_MATCH")
"""In what object stores say to those without the right credentials."""

OF_THIS_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

MAX_FILE_BYTES = 2**24
"""Bytes of a file that is read from a web server."""


def model_folder(model: str, *, weights: bool) -> str:
    """A model's or adapter's folder as this machine sees it: where `model` is a URL, the copy of its folder that is here or is
    made now, without `weights` only of the files that describe the model; else `model`, as it is.

    Raises ValueError where there is no such folder, or it can't be read.
    """
    model = local_where_it_is(model)
    if not is_url(model):
        return model
    listing = model_files(model)
    folders = [_folder_of(model, listing)]
    if not weights:
        listing = {name: file for name, file in listing.items() if name.endswith(DESCRIPTIONS)}
        folders.append(folders[0].with_name(folders[0].name + "-described"))
    found = next((folder for folder in folders if folder.is_dir()), None)
    return str(found or _download(Store.at(model), listing, folders[-1]))


def local_where_it_is(place: str) -> str:
    """A file:// URL as the path that it is; anything else as given."""
    return str(Store.at(place).local_path) if place.startswith("file://") else place


def model_files(model: str) -> dict[str, tuple[int, int]]:
    """The files of a remote folder that a model or adapter is loaded from: size in bytes and time of change (ns) by name.

    Raises ValueError, which says why, where the folder can't be listed or isn't there.
    """
    if not model.partition("://")[2].strip("/"):
        raise ValueError(f"{model}: names no bucket.")
    store = Store.at(model)
    infos = _explained(model, lambda: _within(ANSWER_SECONDS, lambda: _list(store)))
    files = {name: (info.size, info.mtime_ns or 0) for name, info in infos.items()}
    names = {name for name in files if not NO_WEIGHTS.fullmatch(name) or name.endswith(DESCRIPTIONS)}
    safe = {name for name in names if name.endswith(SAFE_WEIGHTS)}
    other = {name for name in names if name.endswith(OTHER_WEIGHTS) and (not safe or name == VALUE_HEAD)}
    described = {name for name in names if name.endswith(DESCRIPTIONS)}
    if safe:  # an index of weights that are left here
        described = {name for name in described if not name.endswith(".bin.index.json")}
    return {name: files[name] for name in sorted(safe | other | described)}


def versions(model: str) -> dict[str, str]:
    """What tells a remote model from an earlier version of it: size and time of change of each file, by name."""
    return {name: f"{size} bytes, version {modified}" for name, (size, modified) in model_files(model).items()}


def read_file(location: str) -> bytes:
    """A file's bytes, from a path, an s3:// gs:// file:// URL or a web server. Raises OSError where it can't be read."""
    if not location.startswith(("http://", "https://")):
        return Store.at(location).read_bytes()
    if location.startswith("http://"):
        raise OSError("http:// can be changed on its way; use https://")
    try:
        with urllib.request.build_opener(_HttpsOnly).open(location, timeout=ANSWER_SECONDS) as answer:
            content = bytes(answer.read(MAX_FILE_BYTES + 1))
    except urllib.error.HTTPError as error:
        raise OSError(f"the server answers {error.code} {error.reason}") from None
    except urllib.error.URLError as error:
        raise OSError(str(error.reason)) from None
    if len(content) > MAX_FILE_BYTES:
        raise OSError(f"is larger than {MAX_FILE_BYTES // 2**20} MiB")
    return content


class _HttpsOnly(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if not newurl.startswith("https://"):
            raise urllib.error.URLError(f"leads to {newurl}, which is no https://")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _list(store: Store) -> dict[str, pafs.FileInfo]:
    """The files in a folder, and in those of FOLDERS inside of it, by name."""
    filesystem, path = store.resolve()
    files = {}
    for folder in ("", *(f"{name}/" for name in FOLDERS)):
        selector = pafs.FileSelector(f"{path}/{folder}".rstrip("/"), allow_not_found=bool(folder))
        for info in filesystem.get_file_info(selector):
            if info.type == pafs.FileType.File:
                files[folder + info.base_name] = info
    return files


def _explained(model: str, work: Callable[[], dict[str, pafs.FileInfo]]) -> dict[str, pafs.FileInfo]:
    """The result of listing a model's folder; raises ValueError, without the flag's name, that says why there is none."""
    try:
        found = work()
    except FileNotFoundError:
        found = {}
    except TimeoutError:
        raise ValueError(
            f"{model}: no answer within {ANSWER_SECONDS} s. Is the store's address right, and has this machine credentials?"
        ) from None
    except (OSError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(f"{model}: {_why(model, error)}") from None
    if not found:
        raise ValueError(f"{model}: there is no such folder, or nothing in it.")
    return found


def _why(model: str, error: Exception) -> str:
    words = " ".join(str(error).split())
    scheme = model.partition("://")[0]
    if scheme in ("http", "https"):
        hub = re.fullmatch(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([^/]+/[^/]+)/?.*", model)
        return "is a web page, and a model is a folder, s3:// or gs:// URL or a hub id." + (
            f" Did you mean {hub[1]}?" if hub else ""
        )
    if isinstance(error, pa.ArrowInvalid | pa.ArrowNotImplementedError) and "nrecognized" in words:
        return f"{scheme}:// is no file system that can be read. Give a folder, an s3://, gs:// or file:// URL, or a hub id."
    if isinstance(error, PermissionError) or REFUSED.search(words):
        return (
            f"this machine may not read it ({words[:300]}). Give every node credentials: a role of the machine, or the "
            "variables of its environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS)."
        )
    if "NO_SUCH_BUCKET" in words:
        return "there is no such bucket."
    return f"can't be listed ({words[:300]})."


def _within(seconds: float, work: Callable[[], T]) -> T:
    """The result of some work; raises TimeoutError where it takes longer. A client that can't be stopped is left behind."""
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:  # noqa: BLE001  # raised again below
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    if not wait([result], timeout=seconds).done:
        raise TimeoutError
    return result.result()


def _folder_of(model: str, listing: Mapping[str, tuple[int, int]]) -> Path:
    """The folder of the copy of what is listed: the last words of the URL, to be told by a person, and a hash of all of it."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    downloads = Path(os.environ.get(FOLDER_VARIABLE) or f"{cache}/rayalign/downloads").expanduser().absolute()
    url = Store.at(model).location
    shown = re.sub(r"[^\w.-]+", "_", "/".join(url.partition("?")[0].partition("://")[2].split("/")[-3:]))[-80:]
    digest = hashlib.sha256(json.dumps([url, listing], sort_keys=True).encode()).hexdigest()[:16]
    return downloads / f"{shown}-{digest}"


def _download(store: Store, listing: Mapping[str, tuple[int, int]], folder: Path) -> Path:
    """Makes the copy, or waits for the process that is making it. It takes its name when it is whole."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.parent.joinpath(f".{folder.name}.lock").touch()
    except OSError as error:
        raise _no_room(folder.parent, error) from None
    with _locked(folder.with_name(f".{folder.name}.lock")) as is_alone:
        if folder.is_dir():
            return folder
        for left in folder.parent.glob(f".{folder.name}.partial-*") if is_alone else ():  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        partial = folder.with_name(f".{folder.name}.partial-{uuid.uuid4().hex[:8]}")
        size = sum(size for size, _ in listing.values())
        logger.info("Downloading %s (%d files, %.1f MB) into %s", store.location, len(listing), size / 1e6, folder)
        try:
            _copy(store, listing, partial)
            with contextlib.suppress(OSError):  # the first one's copy is there
                partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    assert folder.is_dir()
    return folder


def _copy(store: Store, listing: Mapping[str, tuple[int, int]], folder: Path) -> None:
    """Copies what is listed; raises ValueError where the folder changes meanwhile, may not be read, or fills the disk."""

    def copy(name: str) -> None:
        try:
            store.download(folder, [name])
        except OSError as error:
            if error.errno in OF_THIS_DISK:
                raise _no_room(folder.parent, error) from None
            raise
        if (folder / name).stat().st_size != listing[name][0]:
            raise FileNotFoundError(f"{name} has another size")

    folder.mkdir()
    try:
        with ThreadPoolExecutor(COPIES) as threads:
            for _ in threads.map(copy, listing):
                pass
    except FileNotFoundError as error:
        raise ValueError(f"{store.location}: changed while it was downloaded ({error}). Run the same command again.") from None
    except OSError as error:
        if isinstance(error, PermissionError) or REFUSED.search(str(error)):
            raise ValueError(f"{store.location}: {_why(store.location, error)}") from None
        raise


def _no_room(folder: Path, error: OSError) -> ValueError:
    return ValueError(
        f"{folder}, where models of URLs are copied to: can't be written ({error.strerror}). Make room there, or name another "
        f"folder in the variable {FOLDER_VARIABLE} on every node."
    )


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[bool]:
    """Within it, no other process of the machine is, which it says; the lock goes with a process that is killed. On a file
    system without locks several may be: each downloads, and the first one's copy stays."""
    with file.open("w") as lock:
        is_alone, started = True, time.monotonic()
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fcntl.flock(lock, fcntl.LOCK_EX)
            logger.info("Waited %.0f s for a download by another process", time.monotonic() - started)
        except OSError:
            is_alone = False
        yield is_alone
