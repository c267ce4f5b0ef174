"""Locates, fetches, bounds and decodes an image of a record; nothing a record says can reach outside its data set's folder.

`fetch_images` gives the compressed bytes that travel with the record, `decoded_size` what its encoding needs, `open_image` the
picture next to the processor.
"""

import base64
import binascii
import errno
import hashlib
import io
import math
import os
import stat
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import TypeVar

from PIL import Image, UnidentifiedImageError

from rayalign.formats.pictures import SIGNATURES
from rayalign.formats.records import RecordError
from rayalign.images.rgb import require_rgb, to_rgb
from rayalign.images.urls import fetch_url
from rayalign.retries import StorageFailed
from rayalign.storage import Store, is_url

T = TypeVar("T")

MAX_IMAGE_BYTES = 64 * 2**20
MAX_IMAGE_PIXELS = 48 * 2**20
MAX_WEBP_PIXELS = 32 * 2**20
"""Of a WebP picture, which its decoder holds four times."""
MAX_RECORD_PIXELS = 64 * 2**20
"""Of all pictures of a record, scaled down as they will be: 250 MB once they are decoded, and 600 MB in a processor."""
MAX_RECORD_IMAGES = 128
MAX_RECORD_BYTES = 256 * 2**20
MAX_JPEG_SCANS = 100
"""Each is decoded over the whole picture, and has few bytes; a progressive photo has about ten."""
JPEG_SCAN = b"\xff\xda"
"""Begins a scan; among compressed pixels, other bytes follow 255."""
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
STORE_SCHEMES = ("s3://", "gs://")
URL_SECONDS = 60
"""For all that a record fetches from elsewhere together: web addresses, and stores that aren't the data set's own."""
STORE_SECONDS = 180
"""For each object of the data set's own store, or the image root's, its further attempts included."""

OF_THE_OBJECT = ("ACCESS_DENIED", "NO_SUCH_BUCKET", "NO_SUCH_KEY", "Not a regular file")
"""Words of a remote store's errors that are about the one object, and not about the storage."""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings an image of each EXIF orientation upright."""
SIDEWAYS = (Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90)
"""Those of them that make the width the height."""


def fetch_images(refs: Sequence[str | bytes], *, folder: Store, image_root: Store | None, allow_urls: bool) -> list[bytes]:
    """The compressed bytes of a record's images: from a path, URL, data: URI, base64 text, or given as they are.

    Relative paths start from `image_root`, or from `folder`, the data set's own; no path may lead out of both, nor may the URL
    of a remote store, unless `allow_urls`.
    Raises RecordError for what is wrong with a reference or its target, which any failure of a store elsewhere counts as; an
    OSError of failing storage of their own passes through.
    """
    deadline = time.monotonic() + URL_SECONDS
    if len(refs) > MAX_RECORD_IMAGES:
        raise RecordError("too many images", f"{len(refs)} images; the limit is {MAX_RECORD_IMAGES}", field="images")
    contents: list[bytes] = []
    for ref in refs:
        contents.append(_fetch(ref, folder=folder, image_root=image_root, allow_urls=allow_urls, deadline=deadline))
        if sum(map(len, contents)) > MAX_RECORD_BYTES:
            words = f"the first {len(contents)} of {len(refs)} images have more than {MAX_RECORD_BYTES // 2**20} MiB together"
            raise RecordError("images too large", words, field="images")
    return contents


def _fetch(ref: str | bytes, *, folder: Store, image_root: Store | None, allow_urls: bool, deadline: float) -> bytes:
    if isinstance(ref, bytes):
        content = ref
    elif ref.startswith("data:"):
        content = _data_uri(ref)
    elif ref.startswith(("http://", "https://")):
        if not allow_urls:
            raise RecordError("image URLs are off", f"{_short(ref)}: pass --allow_image_urls true to fetch it", field="images")
        content = fetch_url(ref, max_bytes=MAX_IMAGE_BYTES, deadline=deadline)
    elif ref.startswith(STORE_SCHEMES):
        store, inner = _place_of(ref, folder=folder, image_root=image_root, allow_urls=allow_urls)
        try:
            content = _read_remote(store, inner, ref=ref, deadline=deadline)
        except OSError as error:
            if inner:  # below the data set's own folder, or the image root: no other record fares better
                raise
            raise RecordError("image missing", f"{_short(ref)}: {error}", field="images") from None
    elif is_url(ref) and not ref.startswith("file://"):
        known = ", ".join(("http://", "https://", "file://", *STORE_SCHEMES))
        raise RecordError("image URL refused", f"{_short(ref)}: known are {known}", field="images")
    elif looks_like_base64(ref):
        content = _decode_base64(ref)
    else:
        content = _read_path(ref.removeprefix("file://"), folder=folder, image_root=image_root, deadline=deadline)
    if not content:
        raise RecordError("image unreadable", "the image has no bytes", field="images")
    if len(content) > MAX_IMAGE_BYTES:
        raise _too_many_bytes(_short(ref))
    return content


def open_image(content: bytes, *, max_pixels: int | None = None) -> Image.Image:
    """The picture in RGB, upright, on white where it is transparent, scaled down to at most `max_pixels`.

    Only the first frame of an animation is decoded. Raises RecordError for what can't be decoded or is too large to.
    """
    flat, upright = _decoded(content, _opened(content), to_rgb)
    if upright is not None:
        flat = flat.transpose(upright)
    size = _shrunk(*flat.size, max_pixels=max_pixels)
    return flat if size == flat.size else flat.resize(size, Image.Resampling.LANCZOS)


def decoded_size(content: bytes, *, max_pixels: int | None = None) -> tuple[int, int]:
    """Width and height of what `open_image` gives, and the same errors: the picture is decoded whole, and then dropped.

    A JPEG is decoded to an eighth of each side, in half the time: its decoder reads and checks every coefficient all the same,
    and computes one pixel of 64. What can't be decoded so, as lossless and broken ones, is decoded as the others are.
    """
    image = _opened(content)
    size = image.size
    is_scaled = image.draft(None, (1, 1)) is not None
    try:
        decoded, upright = _decoded(content, image, _rgb_size)
    except RecordError:
        if not is_scaled:
            raise
        is_scaled = False
        decoded, upright = _decoded(content, _opened(content), _rgb_size)
    width, height = size if is_scaled else decoded
    if upright in SIDEWAYS:
        width, height = height, width
    return _shrunk(width, height, max_pixels=max_pixels)


def _rgb_size(image: Image.Image) -> tuple[int, int]:
    require_rgb(image)
    return image.size


def _decoded(content: bytes, image: Image.Image, use: Callable[[Image.Image], T]) -> tuple[T, Image.Transpose | None]:
    """What is made of the opened picture once it is decoded, and what brings it upright."""
    try:
        image.load()
        upright = TURNS.get(image.getexif().get(0x0112, 1))
        return use(image), upright
    except MemoryError:
        raise
    except Exception as error:  # decoders of hostile bytes raise whatever they like
        raise _unreadable(content, error) from error


def image_size(content: bytes) -> tuple[int, int]:
    """Width and height in pixels, from the head of the file. Raises RecordError for what is no image, or too large."""
    image = _opened(content)
    return image.width, image.height


def check_pixels(sizes: Sequence[tuple[int, int]], *, max_pixels: int | None = None) -> None:
    """Raises RecordError where the pictures of one record (width, height), each scaled down to at most `max_pixels`, have too
    many pixels together."""
    total = sum(min(width * height, max_pixels or MAX_IMAGE_PIXELS) for width, height in sizes)
    if total > MAX_RECORD_PIXELS:
        words = (
            f"{len(sizes)} pictures of {total} pixels together; the limit is {MAX_RECORD_PIXELS}. --max_pixels scales pictures "
            "down before they are counted"
        )
        raise RecordError("images too large", words, field="images")


def _opened(content: bytes) -> Image.Image:
    """The picture, its pixels not yet decoded."""
    try:
        image = Image.open(io.BytesIO(content), formats=IMAGE_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RecordError("image too large", f"{error}", field="images") from None
    except MemoryError:
        raise
    except Exception as error:  # as above
        raise _unreadable(content, error) from error
    limit = MAX_WEBP_PIXELS if image.format == "WEBP" else MAX_IMAGE_PIXELS
    if image.width * image.height > limit:
        size = f"{image.width} x {image.height} pixels; the limit is {limit}"
        raise RecordError("image too large", size, field="images")
    scans = content.count(JPEG_SCAN) if image.format in ("JPEG", "MPO") else 0
    if scans > MAX_JPEG_SCANS:
        raise RecordError("image too large", f"a JPEG of {scans} scans; the limit is {MAX_JPEG_SCANS}", field="images")
    return image


def image_hash(content: bytes) -> str:
    """32 hex digits that name an image by its bytes."""
    return hashlib.sha256(content).hexdigest()[:32]


def _shrunk(width: int, height: int, *, max_pixels: int | None) -> tuple[int, int]:
    if max_pixels is None or width * height <= max_pixels:
        return width, height
    scale = math.sqrt(max_pixels / (width * height))
    new_width = min(max(1, int(width * scale)), max_pixels)
    return new_width, max(1, min(int(height * scale), max_pixels // new_width))


def _data_uri(ref: str) -> bytes:
    header, comma, payload = ref.partition(",")
    if not comma or not header.endswith(";base64"):
        raise RecordError("image unreadable", f"{_short(ref)}: a data: URI must read data:<type>;base64,<text>", field="images")
    return _decode_base64(payload)


def looks_like_base64(ref: str) -> bool:
    if len(ref) <= 64 or "." in ref:
        return False
    try:
        start = base64.b64decode(ref[:24], validate=True)
    except ValueError:
        return False
    return start.startswith(SIGNATURES)


def _decode_base64(payload: str) -> bytes:
    if len(payload) > MAX_IMAGE_BYTES * 4 / 3 + 4:
        raise _too_many_bytes("base64 text")
    packed = "".join(payload.split())
    try:
        return base64.b64decode(packed + "=" * (-len(packed) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RecordError("image unreadable", f"broken base64 text: {error}", field="images") from None


def _place_of(url: str, *, folder: Store, image_root: Store | None, allow_urls: bool) -> tuple[Store, str]:
    """The store that the URL of a remote one is read from, and the path inside of it: the store that it lies below, or itself.

    The cluster's credentials may open more than the record's author may see, so that what lies elsewhere needs `allow_urls`.
    """
    if any(sign in url for sign in "?#@"):
        raise RecordError(
            "image URL refused", f"{_short(url)}: options and credentials don't belong in a record", field="images"
        )
    bucket, _, key = url.partition("://")[2].partition("/")
    if not bucket or not key.strip("/") or key.endswith("/"):
        raise RecordError("image missing", f"{_short(url)} names no object, but a bucket or a folder", field="images")
    roots = [root for root in (image_root, folder) if root is not None]
    if ".." not in key.split("/"):
        for root in roots:
            base = root.location.partition("?")[0].rstrip("/")
            if url.startswith(f"{base}/"):
                return root, url[len(base) :]
    if allow_urls:
        return Store(url), ""
    inside = " or ".join(root.location for root in roots)
    words = (
        f"{_short(url)} lies outside of {inside}; pass --image_root with the folder that holds the images, or "
        "--allow_image_urls true to fetch them from anywhere"
    )
    raise RecordError("image outside root", words, field="images")


def _read_path(path: str, *, folder: Store, image_root: Store | None, deadline: float) -> bytes:
    start = image_root or folder
    if start.local_path is None and not path.startswith("/"):
        if ".." in path.split("/"):
            raise _outside(path, [start])
        if path.endswith("/"):
            raise RecordError("image missing", f"{_short(path)} is a folder", field="images")
        return _read_remote(start, f"/{path}", ref=path, deadline=deadline)
    roots = [store for store in (image_root, folder) if store is not None and store.local_path is not None]
    try:
        real = Path(os.path.realpath(Path(start.local_path or "/") / path))
        if not any(real.is_relative_to(os.path.realpath(root.local_path or "/")) for root in roots):
            raise _outside(path, roots)
        info = os.stat(real)
    except RecordError:
        raise
    except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
        raise RecordError("image missing", f"{_short(path)}: {error.strerror}", field="images") from None
    except ValueError:
        raise RecordError("image missing", f"{path[:80]!r} is no path", field="images") from None
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise RecordError("image missing", f"{_short(path)}: {error.strerror}", field="images") from None
        raise
    if not stat.S_ISREG(info.st_mode):
        raise RecordError("image missing", f"{_short(path)}: not a file", field="images")
    if info.st_size > MAX_IMAGE_BYTES:
        raise _too_many_bytes(_short(path))
    try:
        return real.read_bytes()
    except PermissionError as error:
        raise RecordError("image missing", f"{_short(path)}: {error.strerror}", field="images") from None


def _read_remote(store: Store, inner: str, *, ref: str, deadline: float) -> bytes:
    """An object at or below a remote store; `inner` stays a plain path, so that it can't hold URL options. Without it the store
    is one elsewhere, which has the time of the record; one that is the run's own, and silent, is failing storage."""

    def read() -> bytes:
        filesystem, path = store.resolve()
        with filesystem.open_input_file(path + inner) as file:
            if file.size() > MAX_IMAGE_BYTES:
                raise _too_many_bytes(_short(ref))
            return bytes(file.read())

    try:
        if inner:
            late: Exception = StorageFailed(f"{store.location}{inner}: the storage gave no answer in {STORE_SECONDS} s.")
            return _until(time.monotonic() + STORE_SECONDS, read, late=late)
        words = f"{_short(ref)}: the {URL_SECONDS} seconds for a record's images are over"
        return _until(deadline, read, late=RecordError("image URL failed", words, field="images"))
    except (RecordError, StorageFailed):
        raise
    except (FileNotFoundError, IsADirectoryError, PermissionError, ValueError) as error:
        raise RecordError("image missing", f"{_short(ref)}: {error}", field="images") from None
    except OSError as error:
        if any(cause in str(error) for cause in OF_THE_OBJECT):
            raise RecordError("image missing", f"{_short(ref)}: {error}", field="images") from None
        raise


def _until(deadline: float, work: Callable[[], bytes], *, late: Exception) -> bytes:
    """The result of some work, waited for until `deadline` (of time.monotonic, seconds); raises `late` after it.

    The clients of object stores try again for minutes, and can't be told to stop: the thread is left to end by itself, and does
    not keep the process.
    """
    result: Future[bytes] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:  # noqa: BLE001 - for the thread that waits
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    wait([result], timeout=max(0.0, deadline - time.monotonic()))
    if not result.done():
        raise late
    return result.result()


def _outside(path: str, roots: list[Store]) -> RecordError:
    inside = " or ".join(root.location for root in roots)
    words = f"{_short(path)} leads out of {inside}; pass --image_root with the folder that holds the images"
    return RecordError("image outside root", words, field="images")


def _unreadable(content: bytes, error: Exception) -> RecordError:
    why = "" if isinstance(error, UnidentifiedImageError) else f": {error}"  # which has nothing to add but an address in memory
    words = f"{len(content)} bytes, not a whole {', '.join(IMAGE_FORMATS)} image{why}"
    return RecordError("image unreadable", words, field="images")


def _too_many_bytes(name: str) -> RecordError:
    return RecordError("image too large", f"{name}: more than {MAX_IMAGE_BYTES // 2**20} MiB", field="images")


def _short(ref: str | bytes) -> str:
    return f"{len(ref)} bytes" if isinstance(ref, bytes) else ref if len(ref) <= 80 else f"{ref[:80]}..."
