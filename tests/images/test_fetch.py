"""Images from every kind of reference, and the hostile ones: escapes, bombs, halves, garbage."""

import base64
import contextlib
import io
import os
import random
import re
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

from rayalign.formats.records import RecordError
from rayalign.images import fetch as fetching
from rayalign.images.fetch import check_pixels, decoded_size, fetch_images, image_hash, image_size, open_image
from rayalign.retries import StorageFailed
from rayalign.storage import Store
from tests.hostile.pictures import hostile_pictures, photo, sound_pictures

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def encode(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def two_pixels() -> Image.Image:
    """2 x 1: red, blue."""
    image = Image.new("RGB", (2, 1), RED)
    image.putpixel((1, 0), BLUE)
    return image


PNG = encode(Image.radial_gradient("L").resize((32, 32)))
PNG_BASE64 = base64.b64encode(PNG).decode()


def fetch(ref: str | bytes, folder: Path, *, image_root: Path | None = None) -> bytes:
    root = Store.at(str(image_root)) if image_root else None
    (content,) = fetch_images([ref], folder=Store.at(str(folder)), image_root=root, allow_urls=False)
    return content


def failure(ref: str | bytes, folder: Path, **options: Any) -> RecordError:
    with pytest.raises(RecordError) as caught:
        fetch(ref, folder, **options)
    assert caught.value.field == "images"
    return caught.value


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data" / "images").mkdir(parents=True)
    (tmp_path / "data" / "images" / "a.png").write_bytes(PNG)
    (tmp_path / "secret.png").write_bytes(PNG)
    return tmp_path / "data"


def test_every_kind_of_reference_gives_the_bytes(folder: Path) -> None:
    refs: list[str | bytes] = [
        PNG,
        "images/a.png",
        str(folder / "images" / "a.png"),
        f"file://{folder}/images/a.png",
        "images/../images/a.png",
        f"data:image/png;base64,{PNG_BASE64}",
        PNG_BASE64,
        PNG_BASE64.rstrip("="),
    ]
    assert [fetch(ref, folder) == PNG for ref in refs] == [True] * len(refs)


def test_relative_paths_start_from_image_root_and_absolute_ones_may_lie_in_either(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "b.png").write_bytes(b"b")
    assert fetch("b.png", folder, image_root=root) == b"b"
    assert fetch(str(root / "b.png"), folder, image_root=root) == b"b"
    assert fetch(str(folder / "images" / "a.png"), folder, image_root=root) == PNG
    assert failure("images/a.png", folder, image_root=root).reason == "image missing"


def test_links_inside_the_folder_are_followed(folder: Path) -> None:
    (folder / "link.png").symlink_to("images/a.png")
    assert fetch("link.png", folder) == PNG


def test_a_data_set_folder_that_is_a_link_holds_its_images(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(folder)
    assert fetch("images/a.png", tmp_path / "alias") == PNG


@pytest.mark.parametrize(
    "ref",
    [
        "../secret.png",
        "images/../../secret.png",
        "{}/secret.png",
        "file://{}/secret.png",
        "/etc/passwd",
        "~/x/../../../../etc/passwd",
    ],
)
def test_a_path_out_of_the_folder_is_refused(folder: Path, tmp_path: Path, ref: str) -> None:
    error = failure(ref.replace("{}", str(tmp_path)), folder)
    assert error.reason == "image outside root"
    assert str(error).endswith(f"leads out of {folder}; pass --image_root with the folder that holds the images")


def test_a_path_into_a_sibling_whose_name_starts_alike_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "data2").mkdir()
    (tmp_path / "data2" / "a.png").write_bytes(PNG)
    assert failure("../data2/a.png", folder).reason == "image outside root"


def test_a_deep_chain_of_links_can_not_escape(folder: Path, tmp_path: Path) -> None:
    deep = folder / "1" / "2" / "3"
    deep.mkdir(parents=True)
    (deep / "up").symlink_to("../../..")
    (deep / "out").symlink_to("up/..")
    (folder / "innocent.png").symlink_to("1/2/3/out/secret.png")
    assert failure("innocent.png", folder).reason == "image outside root"
    assert failure("1/2/3/out/secret.png", folder).reason == "image outside root"


def test_a_loop_of_links_is_a_missing_image(folder: Path) -> None:
    (folder / "loop.png").symlink_to("loop.png")
    assert failure("loop.png", folder).reason == "image missing"


@pytest.mark.parametrize(
    "ref", ["none.png", "images", "images/a.png/b.png", "", "a\0b.png", "\ud800.png", "x" * 5000, "x/" * 5000]
)
def test_what_is_no_file_is_a_missing_image(folder: Path, ref: str) -> None:
    assert failure(ref, folder).reason == "image missing"


def test_a_pipe_is_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "pipe.png")
    assert str(failure("pipe.png", folder)) == "images: pipe.png: not a file"


def test_a_missing_image_is_named(folder: Path) -> None:
    assert str(failure("none.png", folder)) == "images: none.png: No such file or directory"


def test_an_image_without_bytes_is_unreadable(folder: Path) -> None:
    (folder / "empty.png").touch()
    assert (
        failure("empty.png", folder).reason
        == failure(b"", folder).reason
        == failure("data:;base64,", folder).reason
        == "image unreadable"
    )


def test_images_of_too_many_bytes_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "MAX_IMAGE_BYTES", len(PNG) - 1)
    for ref in (PNG, "images/a.png", PNG_BASE64, f"data:image/png;base64,{PNG_BASE64}"):
        assert failure(ref, folder).reason == "image too large"


@pytest.mark.parametrize(
    "ref", ["data:image/png;base64,%%%", "data:image/png,abc", "data:", "data:image/png;base64,é", PNG_BASE64 + "!"]
)
def test_base64_garbage_is_unreadable(folder: Path, ref: str) -> None:
    assert failure(ref, folder).reason == "image unreadable"


def test_base64_of_no_image_is_a_missing_path(folder: Path) -> None:
    assert failure(base64.b64encode(b"x" * 500).decode(), folder).reason == "image missing"


@pytest.mark.parametrize(
    "ref", ["s3://bucket/a.png?endpoint_override=localhost:9", "gs://key@bucket/a.png", "ftp://host/a.png", "hf://x/a.png"]
)
def test_urls_with_options_credentials_or_unknown_schemes_are_refused(folder: Path, ref: str) -> None:
    assert failure(ref, folder).reason == "image URL refused"


@pytest.mark.parametrize("ref", ["../a.png", "x/../../a.png"])
def test_a_remote_folder_is_not_left(ref: str) -> None:
    with pytest.raises(RecordError) as caught:
        fetch_images([ref], folder=Store("s3://bucket/data"), image_root=None, allow_urls=False)
    assert caught.value.reason == "image outside root"


def test_web_urls_are_off_by_default(folder: Path) -> None:
    assert str(failure("http://host/a.png", folder)) == "images: http://host/a.png: pass --allow_image_urls true to fetch it"


def test_an_image_becomes_rgb() -> None:
    for image in (two_pixels(), two_pixels().convert("P"), two_pixels().convert("RGBA")):
        for format in ("PNG", "GIF", "TIFF", "WEBP") if image.mode != "P" else ("PNG", "GIF", "TIFF"):
            opened = open_image(encode(image, format, **({"lossless": True} if format == "WEBP" else {})))
            assert (opened.mode, opened.getpixel((0, 0)), opened.getpixel((1, 0))) == ("RGB", RED, BLUE)
    assert open_image(encode(two_pixels(), "BMP")).getpixel((1, 0)) == BLUE
    assert open_image(encode(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG")).getpixel((0, 0)) == WHITE


def test_transparency_shows_white() -> None:
    rgba = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    rgba.putpixel((1, 0), (*BLUE, 255))
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([*RED, *BLUE])
    palette.putpixel((1, 0), 1)
    for content in (
        encode(rgba),
        encode(palette, transparency=0),
        encode(palette, transparency=b"\0\xff"),
        encode(palette, "GIF", transparency=0),
    ):
        opened = open_image(content)
        assert (opened.getpixel((0, 0)), opened.getpixel((1, 0))) == (WHITE, BLUE)


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    image = Image.new("I;16", (2, 1), 0x8000)
    assert open_image(encode(image)).getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize(
    ("format", "options"), [("JPEG", {"quality": 95}), ("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})]
)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(format: str, options: dict[str, Any], orientation: int) -> None:
    upright = Image.new("RGB", (32, 16), "white")
    upright.paste((0, 0, 0), (0, 0, 8, 8))  # a black corner, top left
    back = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}.get(orientation, fetching.TURNS.get(orientation))
    stored = upright.transpose(back) if back is not None else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    opened = open_image(encode(stored, format, exif=exif, **options))
    assert opened.size == (32, 16) == decoded_size(encode(stored, format, exif=exif, **options))
    dark = [sum(opened.getpixel(corner)) < 100 for corner in ((2, 2), (29, 2), (2, 13), (29, 13))]  # type: ignore[arg-type]
    assert dark == [True, False, False, False]


def test_only_the_first_frame_of_an_animation_is_seen() -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in (RED, BLUE, WHITE)]
    for format, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})):
        opened = open_image(encode(frames[0], format, save_all=True, append_images=frames[1:], **options))
        assert (opened.size, opened.getpixel((0, 0))) == ((4, 4), RED)


def png_header(width: int, height: int) -> bytes:
    """The start of a PNG that claims to be large."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(bytes(1000))
    chunks = (struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in (header, data))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize(
    "size", [(1, 10**9), (10**9, 1), (2**31 - 1, 2**31 - 1), (10_000, 10_000), (fetching.MAX_IMAGE_PIXELS + 1, 1)]
)
def test_a_decompression_bomb_is_refused_by_its_header(size: tuple[int, int]) -> None:
    with pytest.raises(RecordError) as caught:
        open_image(png_header(*size))
    assert caught.value.reason == "image too large"


def test_what_is_costly_to_decode_is_refused_before_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for content, words in (
        (hostile_pictures()["scans.jpg"], "images: a JPEG of 3005 scans; the limit is 100"),
        (encode(Image.new("RGB", (8000, 5000)), "WEBP"), "images: 8000 x 5000 pixels; the limit is 33554432"),
    ):
        with pytest.raises(RecordError) as caught:
            image_size(content)
        assert (caught.value.reason, str(caught.value)) == ("image too large", words)
    assert open_image(encode(Image.new("RGB", (60, 50)), "JPEG", progressive=True)).size == (60, 50)


def test_the_images_of_a_record_are_bounded_together(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch_all(count: int) -> list[bytes]:
        return fetch_images(["images/a.png"] * count, folder=Store.at(str(folder)), image_root=None, allow_urls=False)

    assert len(fetch_all(128)) == 128
    with pytest.raises(RecordError) as caught:
        fetch_all(129)
    assert (caught.value.reason, str(caught.value)) == ("too many images", "images: 129 images; the limit is 128")
    monkeypatch.setattr(fetching, "MAX_RECORD_BYTES", 3 * len(PNG))
    assert len(fetch_all(3)) == 3
    with pytest.raises(RecordError) as caught:
        fetch_all(5)
    assert str(caught.value) == "images: the first 4 of 5 images have more than 0 MiB together"


def test_pixels_of_a_record_are_counted_as_they_are_scaled_down() -> None:
    photos = [(5000, 4000)] * 4
    check_pixels(photos, max_pixels=1_000_000)
    check_pixels(photos[:3])
    with pytest.raises(RecordError) as caught:
        check_pixels(photos)
    assert str(caught.value) == (
        "images: 4 pictures of 80000000 pixels together; the limit is 67108864. --max_pixels scales pictures down before they "
        "are counted"
    )


HALF = encode(Image.effect_noise((64, 64), 50))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 100,
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        HALF[: len(HALF) // 2],
        HALF[:20],
        encode(Image.effect_noise((64, 64), 50), "JPEG")[:900],
        encode(Image.effect_noise((64, 64), 50), "GIF")[:900],
        encode(Image.effect_noise((64, 64), 50).convert("RGB"), "WEBP")[:900],
        encode(Image.effect_noise((64, 64), 50), "BMP")[:900],
        encode(Image.new("F", (4, 4)), "TIFF"),
        encode(two_pixels(), "PPM"),
        encode(two_pixels(), "ICO", sizes=[(2, 1)]),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n",
    ],
)
def test_broken_bytes_and_other_formats_are_unreadable(content: bytes) -> None:
    with pytest.raises(
        RecordError, match=f"^images: {len(content)} bytes, not a whole PNG, JPEG, WEBP, GIF, BMP, TIFF image(: |$)"
    ) as caught:
        open_image(content)
    assert caught.value.reason == "image unreadable"
    assert outcome(decoded_size, content) == outcome(open_image, content)


def test_every_cut_of_a_png_is_an_error_of_its_record_or_an_image() -> None:
    for length in range(len(PNG)):
        with contextlib.suppress(RecordError):
            open_image(PNG[:length])


@pytest.mark.parametrize(
    ("size", "max_pixels", "shrunk"),
    [
        ((100, 50), None, (100, 50)),
        ((100, 50), 5000, (100, 50)),
        ((100, 50), 4999, (99, 49)),
        ((100, 50), 1250, (50, 25)),
        ((1000, 1), 100, (100, 1)),
        ((1, 1000), 100, (1, 100)),
        ((30, 40), 1, (1, 1)),
    ],
)
def test_max_pixels_shrinks_and_keeps_the_shape(size: tuple[int, int], max_pixels: int | None, shrunk: tuple[int, int]) -> None:
    content = encode(Image.new("RGB", size))
    assert open_image(content, max_pixels=max_pixels).size == shrunk == decoded_size(content, max_pixels=max_pixels)


def outcome(look: Callable[[bytes], Any], content: bytes) -> tuple[int, int] | str:
    """A picture's size, or the error in its place."""
    try:
        found = look(content)
    except RecordError as error:
        return re.sub(" at 0x[0-9a-f]+", "", f"{error.reason}: {error}")
    size: tuple[int, int] = found.size if isinstance(found, Image.Image) else found
    return size


@pytest.mark.filterwarnings("ignore")  # what Pillow says of odd files
def test_a_decoded_picture_has_the_size_that_it_is_opened_with_and_is_as_broken() -> None:
    pictures = {**sound_pictures(), **hostile_pictures()}
    found = {name: (outcome(decoded_size, content), outcome(open_image, content)) for name, content in pictures.items()}
    assert {name: pair for name, pair in found.items() if pair[0] != pair[1]} == {}
    assert {type(measured) for measured, _ in found.values()} == {tuple, str}


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "TIFF", "PNG", "GIF", "BMP"])
def test_a_cut_picture_is_found_by_decoding_it(format: str) -> None:
    content = encode(Image.effect_noise((64, 64), 50).convert("RGB"), format)
    assert decoded_size(content) == (64, 64)
    for share in (0.3, 0.6, 0.9):
        cut = content[: int(len(content) * share)]
        assert outcome(decoded_size, cut) == outcome(open_image, cut)
        if format != "GIF":
            assert isinstance(outcome(decoded_size, cut), str)


# 20 x 12 pixels of grey, each predicted from its neighbours: such pictures can't be decoded to a smaller size.
LOSSLESS_JPEG = base64.b64decode(
    "/9j/xAAVAAEBAAAAAAAAAAAAAAAAAAACCP/DAAsIAAwAFAEAEQD/2gAIAQAABgAAn9ttttttttttJJJJJJJJJNJJJJJJJJJNJJJJJJJJJNJJJJJJJJJN"
    "JJJJJJJJJNJJJJJJJJJNJJJJJJJJJNJJJJJJJJJNJJJJJJJJJNJJJJJJJJJNJJJJJJJJJP/Z"
)


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Some bytes cut off, changed, left out or put in between."""
    place = draw.randrange(2, len(content))
    match draw.randrange(4):
        case 0:
            return content[:place]
        case 1:
            return content[:place] + draw.randbytes(1) + content[place + 1 :]
        case 2:
            return content[:place] + content[place + draw.randrange(1, 50) :]
    return content[:place] + draw.randbytes(draw.randrange(1, 30)) + content[place:]


@pytest.mark.filterwarnings("ignore")  # what Pillow says of odd files
def test_a_damaged_jpeg_is_found_broken_or_sound_as_where_all_of_its_pixels_are_computed() -> None:
    kinds: list[tuple[Image.Image, dict[str, Any]]] = []
    for image in (photo(48, 36), photo(33, 17).convert("L"), photo(16, 65).convert("CMYK")):
        kinds += [(image, options) for options in ({}, {"progressive": True}, {"restart_marker_blocks": 2}, {"quality": 100})]
    kinds += [(photo(48, 36), {"subsampling": subsampling}) for subsampling in (0, 1, 2)]
    contents = [encode(image, "JPEG", **options) for image, options in kinds] + [LOSSLESS_JPEG]
    assert [outcome(decoded_size, content) for content in contents] == [image.size for image, _ in kinds] + [(20, 12)]
    draw = random.Random(0)
    found = []
    for content in contents:
        for broken in (damaged(content, draw) for _ in range(60)):
            found.append(outcome(open_image, broken))
            assert outcome(decoded_size, broken) == found[-1]
    assert {type(size) for size in found} == {tuple, str}


def test_the_hash_names_the_bytes() -> None:
    assert image_hash(b"abc") == "ba7816bf8f01cfea414140de5dae2223"
    assert image_hash(b"abd") != image_hash(b"abc")


PLACES = [
    # folder of the data set, --image_root, URL, whether it is read without --allow_image_urls
    ("/data", None, "s3://other/secret.png", False),
    ("/data", None, "gs://other/secret.png", False),
    ("s3://bucket/data", None, "s3://bucket/data/a.png", True),
    ("s3://bucket/data", None, "s3://bucket/data/x/a.png", True),
    ("s3://bucket/data", None, "s3://bucket/data2/a.png", False),
    ("s3://bucket/data", None, "s3://bucket/data/../secret.png", False),
    ("s3://bucket/data", None, "s3://bucket/other/a.png", False),
    ("s3://bucket/data", None, "s3://bucket2/data/a.png", False),
    ("s3://bucket/data", None, "gs://bucket/data/a.png", False),
    ("s3://bucket", None, "s3://bucket/a.png", True),
    ("s3://bucket/data", "s3://pictures/all", "s3://pictures/all/a.png", True),
    ("s3://bucket/data", "s3://pictures/all", "s3://pictures/a.png", False),
    ("/data", "gs://pictures", "gs://pictures/x/a.png", True),
]


@pytest.mark.parametrize(("folder", "image_root", "url", "is_read"), PLACES)
def test_a_remote_store_is_read_below_the_data_set_and_image_root_unless_urls_are_allowed(
    monkeypatch: pytest.MonkeyPatch, folder: str, image_root: str | None, url: str, is_read: bool
) -> None:
    monkeypatch.setattr(fetching, "_read_remote", lambda store, inner, **_: f"{store.location}{inner}".encode())
    root = Store(image_root) if image_root else None

    def fetched(*, allow_urls: bool) -> list[bytes]:
        return fetch_images([url], folder=Store(folder), image_root=root, allow_urls=allow_urls)

    assert fetched(allow_urls=True) == [url.encode()]
    if is_read:
        assert fetched(allow_urls=False) == [url.encode()]
        return
    with pytest.raises(RecordError) as caught:
        fetched(allow_urls=False)
    inside = f"{image_root} or {folder}" if image_root else folder
    assert (caught.value.reason, caught.value.words) == (
        "image outside root",
        f"{url} lies outside of {inside}; pass --image_root with the folder that holds the images, or --allow_image_urls true "
        "to fetch them from anywhere",
    )


@pytest.mark.parametrize(
    "url", ["s3://", "gs://", "s3://bucket", "s3://bucket/", "s3://bucket//", "s3:///a.png", "s3://bucket/x/"]
)
@pytest.mark.parametrize("allow_urls", [False, True])
def test_a_bucket_or_a_folder_is_no_image(url: str, allow_urls: bool) -> None:
    with pytest.raises(RecordError) as caught:
        fetch_images([url], folder=Store("s3://bucket"), image_root=None, allow_urls=allow_urls)
    assert (caught.value.reason, caught.value.words) == ("image missing", f"{url} names no object, but a bucket or a folder")


class FakeStore:
    """A file system whose files open as told."""

    def __init__(self, outcome: Any) -> None:
        self.outcome = outcome

    def open_input_file(self, path: str) -> Any:
        if isinstance(self.outcome, float):
            time.sleep(self.outcome)
            return pa.BufferReader(PNG)
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return pa.BufferReader(self.outcome)


def fetch_remote(outcome: Any, monkeypatch: pytest.MonkeyPatch, *, num_refs: int = 1) -> list[bytes]:
    monkeypatch.setattr(Store, "resolve", lambda store: (FakeStore(outcome), "bucket"))
    refs = [f"{i}.png" for i in range(num_refs)]
    return fetch_images(refs, folder=Store("s3://bucket"), image_root=None, allow_urls=False)


@pytest.mark.parametrize(
    "error",
    [
        OSError("Not a regular file: 'bucket/0.png'"),
        OSError("AWS Error NO_SUCH_BUCKET"),
        OSError("AWS Error ACCESS_DENIED"),
        FileNotFoundError("bucket/0.png"),
        ValueError("Empty path component"),
    ],
)
def test_what_is_no_object_of_a_store_drops_its_record(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    with pytest.raises(RecordError) as caught:
        fetch_remote(error, monkeypatch)
    assert (caught.value.reason, str(caught.value)) == ("image missing", f"images: 0.png: {error}")


@pytest.mark.parametrize("error", [OSError("AWS Error NETWORK_CONNECTION"), TimeoutError("timed out"), ConnectionResetError()])
def test_a_store_that_fails_is_no_fault_of_the_record(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    with pytest.raises(OSError) as caught:
        fetch_remote(error, monkeypatch)
    assert caught.value is error


@pytest.mark.parametrize("error", [OSError("AWS Error NETWORK_CONNECTION"), TimeoutError("timed out")])
def test_a_store_elsewhere_that_fails_drops_the_record_that_names_it(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(Store, "resolve", lambda store: (FakeStore(error), "bucket"))
    with pytest.raises(RecordError) as caught:
        fetch_images(["s3://elsewhere/a.png"], folder=Store("/data"), image_root=None, allow_urls=True)
    assert (caught.value.reason, str(caught.value)) == ("image missing", f"images: s3://elsewhere/a.png: {error}")
    with pytest.raises(OSError) as own:
        fetch_images(["s3://bucket/a.png"], folder=Store("s3://bucket"), image_root=None, allow_urls=True)
    assert own.value is error


def test_images_of_a_store_elsewhere_have_seconds_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "URL_SECONDS", 0.3)
    for seconds, num_refs in ((30.0, 1), (0.2, 5)):
        started = time.monotonic()
        monkeypatch.setattr(Store, "resolve", lambda store, outcome=seconds: (FakeStore(outcome), "bucket"))
        with pytest.raises(RecordError) as caught:
            fetch_images(["s3://elsewhere/a.png"] * num_refs, folder=Store("/data"), image_root=None, allow_urls=True)
        assert time.monotonic() - started < 5
        assert (caught.value.reason, caught.value.field) == ("image URL failed", "images")
        assert caught.value.words.endswith("the 0.3 seconds for a record's images are over")


def test_a_silent_store_of_the_data_set_is_failing_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    """However little time the record's other images have left; a slow one is not silent."""
    monkeypatch.setattr(fetching, "URL_SECONDS", 0.0)
    monkeypatch.setattr(fetching, "STORE_SECONDS", 0.5)
    assert fetch_remote(PNG, monkeypatch, num_refs=3) == [PNG] * 3
    assert len(fetch_remote(0.2, monkeypatch, num_refs=4)) == 4
    started = time.monotonic()
    with pytest.raises(StorageFailed, match=r"s3://bucket/.*: the storage gave no answer in 0\.5 s\."):
        fetch_remote(30.0, monkeypatch)
    assert time.monotonic() - started < 5
