"""The upload of an export: what is sent to the hub, and what is told before any work is done."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HTTPError as ClientError

import rayalign
from rayalign.main import main
from rayalign.serving.hub import check_push, push
from rayalign.storage import Store
from tests.serving.test_merge import TUNERS, trained


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """The address of a hub on loopback that takes small files, and what it was sent; its only token is `good`."""
    requests: list[tuple[str, Any]] = []

    class Hub(BaseHTTPRequestHandler):
        def answer(self, status: int, body: Any) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            known = self.headers.get("authorization") == "Bearer good"
            self.answer(200 if known else 401, {"name": "me"} if known else {"error": "Invalid credentials"})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            requests.append((self.path, body))
            if self.path.endswith("/preupload/main"):
                files = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
                self.answer(200, {"files": files})
            elif "/commit/" in self.path:
                oid = "a" * 40
                self.answer(200, {"success": True, "commitOid": oid, "commitUrl": f"{address}/me/vlm/commit/{oid}"})
            elif self.path == "/api/repos/create":
                self.answer(200, {"url": f"{address}/me/vlm"})
            else:
                self.answer(200, {})

        def log_message(self, *words: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield address, requests
    server.shutdown()
    server.server_close()
    thread.join()


def test_an_export_is_sent_as_one_commit_into_a_repository_that_is_made(
    hub: tuple[str, list[tuple[str, Any]]], tmp_path: Path
) -> None:
    address, requests = hub
    (tmp_path / "README.md").write_text("# A model\n")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "exported_checkpoint.json").write_text('{"run": {"model": "/home/me/sft"}}')  # stays here
    api = HfApi(endpoint=address, token="good")
    check_push("me/vlm", api=api)
    assert push(Store.at(str(tmp_path)), "me/vlm", private=True, api=api) == f"{address}/me/vlm"
    created = json.loads(dict(requests)["/api/repos/create"])
    assert (created["name"], created["organization"], created.get("private", created.get("visibility"))) in (
        ("vlm", "me", True),
        ("vlm", "me", "private"),
    )
    (commit,) = [body for path, body in requests if "/commit/" in path]
    lines = [json.loads(line) for line in commit.splitlines()]
    assert {line["value"]["path"] for line in lines if line["key"] == "file"} == {"README.md", "config.json"}


@pytest.mark.parametrize("caller", ["python", "command"])
def test_an_export_with_a_repository_is_uploaded_from_python_as_from_the_command(
    hub: tuple[str, list[tuple[str, Any]]],
    model_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caller: str,
) -> None:
    address, requests = hub
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setenv("HF_TOKEN", "good")
    trained(model_folder("llava_next"), tmp_path / "model", TUNERS["LoRA"])
    out = tmp_path / "out"
    if caller == "python":
        assert rayalign.export(tmp_path / "model", out, push_to_hub="me/vlm", hub_private=False) == str(out)
    else:
        words = f"export --model {tmp_path}/model --output_dir {out} --push_to_hub me/vlm --hub_private false"
        main(words.split())
    created = json.loads(dict(requests)["/api/repos/create"])
    assert created["name"] == "vlm"
    assert (created.get("private") or created.get("visibility")) != "private"
    (commit,) = [body for path, body in requests if "/commit/" in path]
    lines = [json.loads(line) for line in commit.splitlines()]
    assert {line["value"]["path"] for line in lines if line["key"] == "file"} == {file.name for file in out.iterdir()}


@pytest.mark.parametrize("caller", ["python", "command"])
def test_an_upload_that_can_t_be_made_is_told_before_anything_is_written(
    hub: tuple[str, list[tuple[str, Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caller: str,
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    told = "--push_to_hub me/vlm: HF_HUB_OFFLINE is set, so that nothing is sent to the hub. Unset it, or leave the flag out."
    if caller == "python":
        with pytest.raises(ValueError) as caught:
            rayalign.export(tmp_path / "gone", tmp_path / "out", push_to_hub="me/vlm")
        assert str(caught.value) == told
    else:
        with pytest.raises(SystemExit):
            main(f"export --model {tmp_path}/gone --output_dir {tmp_path}/out --push_to_hub me/vlm".split())
        assert told in capsys.readouterr().err


def test_what_can_t_be_uploaded_is_told_first(hub: tuple[str, list[tuple[str, Any]]], monkeypatch: pytest.MonkeyPatch) -> None:
    address, _ = hub
    with pytest.raises(ValueError, match=r"^--push_to_hub me/vlm: the hub does not let us in \("):
        check_push("me/vlm", api=HfApi(endpoint=address, token="bad"))
    with pytest.raises(ValueError, match=r"^--push_to_hub a/b/c: must be OWNER/NAME, or NAME for a repository of your own\.$"):
        check_push("a/b/c")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"^--push_to_hub me/vlm: HF_HUB_OFFLINE is set"):
        check_push("me/vlm")


def test_a_hub_that_is_not_reached_is_told(
    hub: tuple[str, list[tuple[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing listens on port 9; an upload may break off at any time."""
    api = HfApi(endpoint="http://127.0.0.1:9", token="good")
    with pytest.raises(ValueError) as caught:
        check_push("me/vlm", api=api)
    assert str(caught.value) == (
        "--push_to_hub me/vlm: the hub can't be reached ([Errno 111] Connection refused). Leave the flag out, or try again "
        "with a network."
    )
    (tmp_path / "config.json").write_text("{}")
    output = Store.at(str(tmp_path))
    with pytest.raises(ValueError) as caught:
        push(output, "me/vlm", private=True, api=api)
    assert str(caught.value) == (
        f"--push_to_hub me/vlm: the upload broke off ([Errno 111] Connection refused). The export is in {tmp_path}: pass "
        "--overwrite true to make and upload it again, or send that folder with `hf upload`."
    )
    api = HfApi(endpoint=hub[0], token="good")
    for error, words in (
        (ClientError("timed out"), "timed out"),
        (ClientError(""), "HTTPError"),
        (RuntimeError("Error while uploading\nmodel"), "Error while uploading"),
    ):
        monkeypatch.setattr(api, "upload_folder", raising(error))
        with pytest.raises(ValueError) as caught:
            push(output, "me/vlm", private=True, api=api)
        assert str(caught.value).startswith(
            f"--push_to_hub me/vlm: the upload broke off ({words}). The export is in {tmp_path}:"
        )


def raising(error: Exception) -> Callable[..., None]:
    def call(*_: Any, **__: Any) -> None:
        raise error

    return call
