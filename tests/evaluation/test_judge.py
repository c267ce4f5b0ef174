"""A judge behind a URL: asked once for each prompt, its whole answers kept; a server of the test's own on loopback."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from urllib3.util import Retry

from rayalign.config.evaluate import EvaluateConfig
from rayalign.config.inference import InferenceConfig
from rayalign.evaluation import evaluate
from rayalign.evaluation import judge as judge_module
from rayalign.evaluation.judge import Judge, judge_all, read_judgements
from rayalign.evaluation.score_columns import SCHEMA
from rayalign.evaluation.scorers.by_judge import KEY_VARIABLE, judge_key
from rayalign.storage import Store
from tests.evaluation.benchmarks.twins import put_pictures


class Server(ThreadingHTTPServer):
    """Answers each prompt with its last word in capitals, or with a status of its own."""

    asked: list[dict[str, Any]]
    status = 200
    body: bytes | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
        said = body["messages"][0]["content"].split()[-1].upper()
        answer = self.server.body or json.dumps({"id": "x", "choices": [{"message": {"content": said}}]}).encode()
        answer = b'{"choices": []}' if said == "EMPTY" else answer
        statuses = {"REFUSED": 501, "LONG": 400, "FILTERED": 403, "CRASH": 500}
        self.send_response(statuses.get(said, self.server.status))
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as running:
        running.asked = []
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def test_each_prompt_is_asked_once_and_the_whole_answer_is_kept(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "secret\n")  # as files of secrets have it
    judge, kept = Judge(server.url, "gpt"), Store(str(tmp_path / "kept.jsonl"))
    prompts = {f"q{n}": f"please rate {n}x" for n in range(20)}
    first = judge_all(judge, prompts, kept)
    assert first == {f"q{n}": f"{n}X" for n in range(20)}
    assert len(server.asked) == 20
    one = server.asked[0]
    assert (one["path"], one["key"], one["model"], one["temperature"]) == ("/v1/chat/completions", "Bearer secret", "gpt", 0.0)
    lines = {line["id"]: line for line in read_judgements(kept)}
    assert lines["q3"]["answer"] == {"id": "x", "choices": [{"message": {"content": "3X"}}]}
    assert lines["q3"]["prompt"] == "please rate 3x"
    assert "secret" not in kept.read_bytes().decode()
    assert judge_all(judge, prompts | {"q3": "another rate y"}, kept) == first | {"q3": "Y"}
    assert len(server.asked) == 21


def test_what_another_server_said_by_the_same_models_name_is_no_judgement_of_this_one(server: Server, tmp_path: Path) -> None:
    kept = Store(str(tmp_path / "kept.jsonl"))
    other = server.url.replace("/v1", "/v2")
    for url in (server.url, other, f"{other}/", server.url):
        judge_all(Judge(url, "default"), {"a": "rate a"}, kept)
    assert [asked["path"] for asked in server.asked] == ["/v1/chat/completions", "/v2/chat/completions"]
    assert {line["url"] for line in read_judgements(kept)} == {server.url, other}


def test_a_judge_that_fails_is_told_and_what_it_said_is_kept(server: Server, tmp_path: Path) -> None:
    judge, kept = Judge(server.url, "gpt"), Store(str(tmp_path / "kept.jsonl"))
    judge_all(judge, {"a": "rate a"}, kept)
    server.status, server.body = 401, b"no such key"
    with pytest.raises(ValueError) as caught:
        judge_all(judge, {"a": "rate a", "b": "rate b"}, kept)
    assert str(caught.value) == f"--judge_url {server.url}: the judge answers 401: no such key"
    assert [line["id"] for line in read_judgements(kept)] == ["a"]


def test_what_was_paid_for_is_kept_whatever_else_fails_or_is_asked(server: Server, tmp_path: Path) -> None:
    kept = Store(str(tmp_path / "kept.jsonl"))
    judge_all(Judge(server.url, "other"), {"a": "rate x"}, kept)
    with pytest.raises(ValueError, match="the judge answers 501"):
        judge_all(Judge(server.url, "gpt"), {"a": "be refused", "b": "rate b", "c": "rate c"}, kept)
    assert [(line["judge"], line["id"]) for line in read_judgements(kept)] == [("other", "a"), ("gpt", "b"), ("gpt", "c")]
    assert judge_all(Judge(server.url, "other"), {"a": "rate x"}, kept) == {"a": "X"}
    assert len(server.asked) == 4


@pytest.mark.parametrize("word", ["long", "filtered", "crash", "empty"])
def test_a_prompt_that_the_judge_refuses_costs_itself(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    monkeypatch.setattr(judge_module, "RETRIES", Retry(total=0))
    judge, kept = Judge(server.url, "gpt"), Store(str(tmp_path / "kept.jsonl"))
    prompts = {"a": "rate a", "b": f"rate {word}", "c": "rate c"}
    assert judge_all(judge, prompts, kept) == {"a": "A", "b": None, "c": "C"}
    assert [line["id"] for line in read_judgements(kept)] == ["a", "c"]
    assert judge_all(judge, prompts, kept) == {"a": "A", "b": None, "c": "C"}  # it is asked once more, alone
    assert len(server.asked) == 5  # and with it a plain question


def test_a_judge_that_refuses_whatever_it_is_asked_is_told(server: Server, tmp_path: Path) -> None:
    judge, kept = Judge(server.url, "gpt"), Store(str(tmp_path / "kept.jsonl"))
    judge_all(judge, {"a": "rate a"}, kept)
    server.status, server.body = 400, b"temperature is not supported"
    with pytest.raises(ValueError) as caught:
        judge_all(judge, {"a": "rate a", "b": "rate b"}, kept)
    assert str(caught.value) == f"--judge_url {server.url}: the judge answers 400: temperature is not supported"
    server.status, server.body = 200, b"<html>"
    with pytest.raises(ValueError, match="the answer is no chat completion"):
        judge_all(judge, {"a": "rate a", "b": "rate b"}, kept)


def test_a_server_that_is_no_judge_is_told(server: Server, tmp_path: Path) -> None:
    server.body = b"<html>"
    with pytest.raises(ValueError) as caught:
        Judge(server.url, "gpt").ask("rate")
    assert str(caught.value) == (
        f"--judge_url {server.url}: the answer is no chat completion. Give the URL before /chat/completions, such as "
        "http://localhost:8000/v1."
    )


@pytest.mark.parametrize("key", ["sk-1 sk-2", "sk-1\nsk-2", "sk-\u00e9"])
def test_a_key_that_no_header_holds_is_refused_and_not_quoted(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv(KEY_VARIABLE, key)
    with pytest.raises(ValueError) as caught:
        judge_key()
    assert str(caught.value) == (
        "OPENAI_API_KEY: holds more than the key of the judge's server: a space, a line's end or a letter that no key has. Set "
        "it to the key alone."
    )


def test_a_judge_that_quotes_the_key_is_not_repeated(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "sk-secret")
    server.status, server.body = 401, b"x" * 280 + b": no such key: sk-secret"
    with pytest.raises(ValueError, match=r"the judge answers 401: x+: no such") as caught:
        Judge(server.url, "gpt").ask("rate")
    assert "sk-" not in str(caught.value)


def test_an_evaluation_keeps_judgements_and_begins_anew_with_overwrite(
    server: Server, model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a cluster: what the model writes is given."""
    row = {"question_type": "t", "image_src": "http://host/a.jpg", "image_content": ["Cat"], "gt_answer": "A cat."}
    rows = [row | {"image_id": own, "question": "Which?"} for own in ("0", "1")]
    (tmp_path / "response_template.json").write_text(json.dumps(rows))
    (tmp_path / "eval_gpt4.py").write_text("template = '{} {} {} {}'\n")
    put_pictures(tmp_path / "images", "a.jpg")
    lines = [{"id": "0/t#0", "position": 0, "text": "a cat"}, {"id": "1/t#0", "position": 1, "text": "too long"}]
    table = pa.Table.from_pylist(lines, schema=pa.schema([("id", pa.string()), ("position", pa.int64()), *SCHEMA]))
    monkeypatch.setattr(evaluate, "on_cluster", lambda config, model: contextlib.nullcontext(config))
    monkeypatch.setattr(evaluate, "_score", lambda *given, overwrite: evaluate.Scored(table))
    own = EvaluateConfig(benchmarks=(f"mmhal_bench:{tmp_path}",), judge_url=server.url, judge_model="gpt")
    scores = []
    for rating, overwrite in ((6, False), (2, False), (2, True)):
        server.body = json.dumps({"choices": [{"message": {"content": f"Rating: {rating}"}}]}).encode()
        out = str(tmp_path / "out")
        found = evaluate.run(InferenceConfig(str(model_folder("llava")), output_dir=out, overwrite=overwrite), own)
        metrics = found.metrics["model"]["benchmarks"]["mmhal_bench"]["metrics"]["text"]
        scores.append((metrics["score"]["value"], metrics["unrated"]))
    assert scores == [(3.0, 1.0), (3.0, 1.0), (1.0, 1.0)]
