"""Models of URLs: what is copied, once, whole, and found again; files of web servers."""

import datetime
import errno
import http.server
import ipaddress
import os
import ssl
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from rayalign import downloads, storage
from rayalign.downloads import model_files, model_folder, read_file, versions
from rayalign.storage import Store

MODEL = "s3://bucket/runs/sft/model"


@pytest.fixture
def copies(bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """`copies()`: what lies in the folder of copies, apart from locks. The bucket holds a model."""
    folder = bucket / "runs" / "sft" / "model"
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer.model", "chat_template.jinja"):
        (folder / name).write_text(name)
    return lambda: sorted(path.name for path in (tmp_path / "downloads").glob("*") if path.suffix != ".lock")


def test_a_model_is_copied_once_and_found_again(copies: Callable[[], list[str]], reads: list[str]) -> None:
    folder = Path(model_folder(MODEL, weights=True))
    assert {file.name: file.read_text() for file in folder.iterdir()} == {name: name for name in model_files(MODEL)}
    assert len(reads) == 5
    assert model_folder(f"{MODEL}/", weights=True) == str(folder)
    assert model_folder(MODEL, weights=False) == str(folder)  # the whole is there already
    assert (len(reads), copies()) == (5, [folder.name])
    assert folder.name.startswith("runs_sft_model-")


def test_a_description_is_copied_without_the_weights(copies: Callable[[], list[str]]) -> None:
    folder = Path(model_folder(MODEL, weights=False))
    names = {"config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja"}
    assert {file.name for file in folder.iterdir()} == names
    whole = Path(model_folder(MODEL, weights=True))
    assert whole != folder
    assert {file.name for file in whole.iterdir()} == {*names, "model.safetensors"}


@pytest.mark.parametrize(
    ("there", "taken"),
    [
        (("a.safetensors", "b.bin", "pytorch_model.bin.index.json"), ("a.safetensors",)),
        (("a.bin", "pytorch_model.bin.index.json"), ("a.bin", "pytorch_model.bin.index.json")),
        (("adapter_model.safetensors", "value_head.bin"), ("adapter_model.safetensors", "value_head.bin")),
        (("a.safetensors", "consolidated.safetensors", "optimizer.safetensors"), ("a.safetensors",)),
        (("a.bin", "optimizer.bin", "training_args.bin", "scheduler.bin"), ("a.bin",)),
        (("a.safetensors", "optimizer.pt", "rng_state_0.pth", "a.gguf", "a.msgpack", "README.md", "a.png"), ("a.safetensors",)),
        (("modeling_own.py", "tokenizer.tiktoken", "vocab.txt"), ("modeling_own.py", "tokenizer.tiktoken", "vocab.txt")),
        (("additional_chat_templates/tools.jinja",), ("additional_chat_templates/tools.jinja",)),
        (("checkpoints/step_1/model.safetensors", "runs/a.json"), ()),
    ],
)
def test_only_what_a_model_is_loaded_from_is_copied(bucket: Path, there: tuple[str, ...], taken: tuple[str, ...]) -> None:
    for name in ("config.json", *there):
        (bucket / name).parent.mkdir(parents=True, exist_ok=True)
        (bucket / name).write_text("content")
    folder = Path(model_folder("s3://bucket", weights=True))
    assert {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()} == {"config.json", *taken}


def test_a_folder_that_changed_is_copied_anew(bucket: Path, copies: Callable[[], list[str]]) -> None:
    before, known = model_folder(MODEL, weights=True), versions(MODEL)
    weights = bucket / "runs/sft/model/model.safetensors"
    os.utime(weights, ns=(0, 10**9))  # of the same size
    after = model_folder(MODEL, weights=True)
    assert before != after
    assert {name for name, version in versions(MODEL).items() if known[name] != version} == {"model.safetensors"}
    assert versions(MODEL)["model.safetensors"] == "17 bytes, version 1000000000"
    assert len(copies()) == 2


def test_folders_of_the_same_content_at_different_urls_are_told_apart(bucket: Path, copies: Callable[[], list[str]]) -> None:
    (bucket / "other").mkdir()
    (bucket / "runs" / "sft" / "model").rename(bucket / "other" / "model")
    (bucket / "runs" / "sft" / "model").symlink_to(bucket / "other" / "model")
    assert model_folder("s3://bucket/other/model", weights=True) != model_folder(MODEL, weights=True)


def test_several_that_ask_at_once_make_one_copy(copies: Callable[[], list[str]], reads: list[str]) -> None:
    with ThreadPoolExecutor(6) as askers:
        folders = set(askers.map(lambda _: model_folder(MODEL, weights=True), range(6)))
    assert (len(folders), len(reads), len(copies())) == (1, 5, 1)


def test_a_copy_that_was_cut_short_is_never_used(
    copies: Callable[[], list[str]], reads: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = storage._copy

    def killed(source: Store, target: Path) -> None:
        if source.name == "model.safetensors":
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(storage, "_copy", killed)
    with pytest.raises(KeyboardInterrupt):
        model_folder(MODEL, weights=True)
    assert copies() == []
    monkeypatch.setattr(storage, "_copy", real)
    folder = Path(model_folder(MODEL, weights=True))
    assert (folder / "model.safetensors").read_text() == "model.safetensors"
    # One that was killed with SIGKILL leaves its part, which the next to make a copy takes away.
    (left := folder.with_name(f".{folder.name}.partial-0")).mkdir()
    folder.rename(folder.with_name("away"))
    model_folder(MODEL, weights=True)
    assert not left.exists()


def test_a_file_that_changes_while_it_is_copied_ends_in_words(
    bucket: Path, copies: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = storage._copy

    def cut(source: Store, target: Path) -> None:
        real(source, target)
        target.write_bytes(b"")

    monkeypatch.setattr(storage, "_copy", cut)
    with pytest.raises(ValueError) as caught:
        model_folder(MODEL, weights=True)
    assert str(caught.value).startswith(f"{MODEL}: changed while it was downloaded (")
    assert copies() == []


def test_a_disk_without_room_is_told_with_the_variable_that_names_another(
    copies: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(source: Store, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "_copy", full)
    with pytest.raises(ValueError) as caught:
        model_folder(MODEL, weights=True)
    said = (
        f"{tmp_path}/downloads, where models of URLs are copied to: can't be written ({{}}). Make room there, or name another "
        "folder in the variable RAYALIGN_DOWNLOADS on every node."
    )
    assert str(caught.value) == said.format("No space left on device")
    monkeypatch.setenv("RAYALIGN_DOWNLOADS", "/proc/downloads")
    with pytest.raises(ValueError, match=r"^/proc/downloads, where models of URLs are copied to: can't be written"):
        model_folder(MODEL, weights=True)


@pytest.mark.parametrize("folder", ["/models/llava", "owner/name", "file:///models/llava"])
def test_what_is_no_remote_folder_is_left_where_it_is(folder: str) -> None:
    assert model_folder(folder, weights=True) == folder.removeprefix("file://")


ACCESS = "When listing objects under key 'x' in bucket 'b': AWS Error ACCESS_DENIED during ListObjectsV2 operation"


@pytest.mark.parametrize(
    ("url", "error", "words"),
    [
        ("s3://bucket/nowhere", None, "there is no such folder, or nothing in it."),
        ("s3://", None, "names no bucket."),
        ("s3://b/x", OSError("AWS Error NO_SUCH_BUCKET during ListObjectsV2 operation"), "there is no such bucket."),
        (
            "s3://b/x",
            OSError(ACCESS),
            f"this machine may not read it ({ACCESS}). Give every node credentials: a role of the machine, or the variables of "
            "its environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS).",
        ),
        ("s3://b/x", OSError("AWS Error INTERNAL_FAILURE"), "can't be listed (AWS Error INTERNAL_FAILURE)."),
        (
            "s3://b/x",
            TimeoutError(),
            "no answer within 60 s. Is the store's address right, and has this machine credentials?",
        ),
    ],
)
def test_a_folder_that_can_not_be_read_is_told_with_what_helps(
    bucket: Path, monkeypatch: pytest.MonkeyPatch, url: str, error: Exception | None, words: str
) -> None:
    def fail(store: Store) -> Any:
        raise error  # type: ignore[misc]

    if error is not None:
        monkeypatch.setattr(downloads, "_list", fail)
    with pytest.raises(ValueError) as caught:
        model_folder(url, weights=True)
    assert str(caught.value) == f"{url}: {words}"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        (
            "ftp://host/model",
            "ftp:// is no file system that can be read. Give a folder, an s3://, gs:// or file:// URL, or a hub id.",
        ),
        ("https://host/model", "is a web page, and a model is a folder, s3:// or gs:// URL or a hub id."),
        (
            "https://huggingface.co/owner/name/tree/main",
            "is a web page, and a model is a folder, s3:// or gs:// URL or a hub id. Did you mean owner/name?",
        ),
    ],
)
def test_a_url_that_no_model_can_have_is_refused(url: str, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        model_folder(url, weights=True)
    assert str(caught.value) == f"{url}: {words}"


def test_a_store_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "ANSWER_SECONDS", 0.05)
    answered = threading.Event()
    monkeypatch.setattr(downloads, "_list", lambda store: answered.wait(10))
    with pytest.raises(ValueError, match=r"^gs://b/model: no answer within"):
        model_folder("gs://b/model", weights=False)
    answered.set()


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A web server of loopback whose certificate is trusted; /run.yaml is a file, /away leads to http."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response({"/run.yaml": 200, "/large": 200, "/away": 302}.get(self.path, 404))
            if self.path == "/away":
                self.send_header("Location", f"http://127.0.0.1:{self.server.server_address[1]}/run.yaml")
            self.end_headers()
            self.wfile.write(b"beta: 0.2\n" if self.path == "/run.yaml" else b"x" * 100)

        def log_message(self, *args: Any) -> None:
            pass

    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=True)
        .sign(key, hashes.SHA256())
    )
    form = serialization.Encoding.PEM
    plain = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (tmp_path / "tls.pem").write_bytes(certificate.public_bytes(form) + key.private_bytes(form, *plain))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "tls.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "tls.pem"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"https://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_file_of_a_web_server_is_read(web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_file(f"{web}/run.yaml") == b"beta: 0.2\n"
    for path, words in (("/none", "the server answers 404 Not Found"), ("/away", "leads to http://")):
        with pytest.raises(OSError, match=f"^{words}"):
            read_file(web + path)
    monkeypatch.setattr(downloads, "MAX_FILE_BYTES", 50)
    with pytest.raises(OSError, match="is larger than"):
        read_file(f"{web}/large")


def test_a_file_that_others_could_change_on_its_way_is_not_read() -> None:
    with pytest.raises(OSError) as caught:
        read_file("http://127.0.0.1:1/run.yaml")
    assert str(caught.value) == "http:// can be changed on its way; use https://"


def test_without_locks_the_first_copy_stays_and_nobody_deletes_anothers_part(
    copies: Callable[[], list[str]], reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unlocked(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(downloads.fcntl, "flock", unlocked)
    with ThreadPoolExecutor(4) as askers:
        folders = set(askers.map(lambda _: model_folder(MODEL, weights=True), range(4)))
    assert (len(folders), len(copies())) == (1, 1)
    assert len(list(Path(folders.pop()).iterdir())) == 5
