"""Scores are what their scorers' formulas say; what has none is named; ensembles take the mean or the least."""

import base64
import http.server
import io
import json
import math
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from PIL import Image
from urllib3.util import Retry

from rayalign.algorithms import SFT, Needs
from rayalign.config.config import Config
from rayalign.config.inference_verbs import ScoreConfig
from rayalign.config.sections import ModelConfig, OptimizerConfig
from rayalign.data.pairs import rows_of_two
from rayalign.data.rows import Sources
from rayalign.evaluation.score import candidates_of, make_scoring, names_of, score_rows, score_schema, scorers_of
from rayalign.evaluation.scorers import by_judge
from rayalign.evaluation.scorers.scorer import Score
from rayalign.evaluation.work import results_of
from rayalign.formats.records import RecordError
from rayalign.policy.saving import save_policy
from rayalign.policy.scoring import load_for_scoring
from tests.tiny_models import make_policy, noise_image, wake_adapters

NOWHERE = Sources((), None, False)
HERE = Config(SFT(), optimizer=OptimizerConfig(batch_size=2))
ROWS: list[dict[str, Any]] = [
    {"query": "Which digit?", "response": "It is two.", "rejected_response": "a cat", "images": ["a.png"]},
    {"query": "Which digit is it?", "response": "a cat", "prompt_id": "p7", "sample": 3, "extra": '{"right": "a cat"}'},
    {"query": "Which digit?", "response": "It is two.", "extra": '{"right": "no"}'},
]


@pytest.fixture
def pictures(tmp_path: Path) -> str:
    (tmp_path / "a.png").write_bytes(noise_image(30, 40))
    return str(tmp_path)


def lines_of(own: ScoreConfig, folder: str, rows: list[dict[str, Any]], model: ModelConfig | None = None) -> list[Any]:
    """The results of some rows by the words of --scorer."""
    scorers = scorers_of(own, model or ModelConfig())
    assert all(json.dumps(dict(scorer.settings)) for scorer in scorers)
    work = make_scoring(HERE, NOWHERE, scorers, own.ensemble)
    return list(work([{"id": f"r{i}", "folder": folder, "row": row} for i, row in enumerate(rows)]))


def loaded(model: Path, folder: str) -> Any:
    whole: dict[str, Any] = {"device": "cpu", "dtype": "auto", "columns": (), "max_pixels": None, "trust_remote_code": False}
    return load_for_scoring(str(model), image_root=folder, **whole)


@pytest.fixture
def dpo_run(model_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """The folder of a run of dpo, with --beta 0.3, from the tiny model."""
    base = model_folder("llava")
    save_policy(wake_adapters(make_policy(base), scale=0.3), tmp_path / "dpo" / "model")
    (tmp_path / "dpo" / "config.yaml").write_text(yaml.safe_dump({"rlhf_type": "dpo", "model": str(base), "beta": 0.3}))
    return tmp_path / "dpo" / "model"


def test_likelihoods_are_those_of_the_training_forward(model_folder: Callable[..., Path], pictures: str) -> None:
    base = model_folder("llava")
    (both, one, other) = lines_of(ScoreConfig(scorer=(f"likelihood={base}", f"per_token={base}")), pictures, ROWS)
    logps = loaded(base, pictures).logps(ROWS[:1])
    assert [(line["side"], line["response"]) for line in both] == [("chosen", "It is two."), ("rejected", "a cat")]
    for line, response in zip(both, (logps.chosen, logps.rejected), strict=True):
        assert line["scores"]["likelihood"] == pytest.approx(float(response.total), rel=1e-5)
        assert line["scores"]["per_token"] == pytest.approx(float(response.average), rel=1e-5)
        assert line["score"] == pytest.approx(sum(line["scores"].values()) / 2)
    assert (one[0]["prompt_id"], one[0]["sample"], one[0]["side"]) == ("p7", 3, None)
    assert (other[0]["prompt_id"], other[0]["sample"]) == ("r2", 0)


def test_an_implicit_reward_is_beta_times_the_gain_over_what_the_run_started_from(
    model_folder: Callable[..., Path], dpo_run: Path, pictures: str
) -> None:
    base = model_folder("llava")
    policy, start = (loaded(model, pictures).logps(ROWS[:1]).chosen.total for model in (dpo_run, base))
    gain = float(policy - start)
    assert abs(gain) > 0.1
    (lines,) = lines_of(ScoreConfig(scorer=(f"implicit_reward={dpo_run}",)), pictures, ROWS[:1])
    assert lines[0]["score"] == pytest.approx(0.3 * gain, rel=1e-4)
    own = ScoreConfig(scorer=("implicit_reward",), beta=2.0)
    (lines,) = lines_of(own, pictures, ROWS[:1], ModelConfig(model=str(dpo_run)))
    assert lines[0]["score"] == pytest.approx(2 * gain, rel=1e-4)
    own = ScoreConfig(scorer=(f"implicit_reward={base}",), reference=str(dpo_run), beta=1.0)  # the other way round
    (lines,) = lines_of(own, pictures, ROWS[:1])
    assert lines[0]["score"] == pytest.approx(-gain, rel=1e-4)
    with pytest.raises(ValueError, match=r"^--reference .*: is the policy itself, whose rewards would all be 0\."):
        scorers_of(ScoreConfig(scorer=(f"implicit_reward={dpo_run}",), reference=str(dpo_run)), ModelConfig())
    with pytest.raises(ValueError, match=r"^--reference /gone: there is no such folder"):
        scorers_of(ScoreConfig(scorer=(f"implicit_reward={dpo_run}",), reference="/gone"), ModelConfig())
    with pytest.raises(ValueError, match=r"nothing tells what .* was trained from\. Pass --reference"):
        scorers_of(ScoreConfig(scorer=(f"implicit_reward={base}",)), ModelConfig())


def test_models_that_scorers_name_by_relative_paths_are_found_from_any_working_folder(
    model_folder: Callable[..., Path], dpo_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = str(model_folder("llava"))
    (dpo_run.parents[1] / "base").symlink_to(base)
    monkeypatch.chdir(dpo_run.parents[1])
    own = ScoreConfig(scorer=("likelihood=base", "implicit_reward=dpo/model"), reference="base")
    likelihood, reward = scorers_of(own, ModelConfig())
    assert (likelihood.model.model, reward.model.model, reward.reference.model) == (base, str(dpo_run), base)  # type: ignore[attr-defined]  # of a ModelScorer
    (dpo_run.parents[1] / "runs" / "empty").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"^--scorer reward_model=runs/empty: "):
        scorers_of(ScoreConfig(scorer=("reward_model=runs/empty",)), ModelConfig())
    with pytest.raises(ValueError, match=r"^--reference .*/runs/empty: "):
        scorers_of(ScoreConfig(scorer=("implicit_reward=dpo/model",), reference="runs/empty"), ModelConfig())


def test_responses_to_one_prompt_share_its_row_two_by_two_and_score_as_alone(
    model_folder: Callable[..., Path], tmp_path: Path, pictures: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rayalign.evaluation.scorers import by_model

    asked = {"query": "Which digit?", "images": ["a.png"]}
    texts = ("It is two.", "a cat", "It is three, or so.", "no", "It is two.")
    rows = [{**asked, "response": text} for text in texts] + [{"query": "Which digit?", "response": "a cat"}]
    (tmp_path / "b.png").write_bytes(noise_image(30, 40, seed=1))
    rows.append({**asked, "images": ["b.png"], "response": "a cat"})
    save_policy(wake_adapters(make_policy(model_folder("llava"), needs=Needs(head="value"))), tmp_path / "rm")
    made: list[int] = []

    def counted(pairs: Mapping[int, Any]) -> Any:
        found = rows_of_two(pairs)
        made.append(len(found))
        return found

    monkeypatch.setattr(by_model, "rows_of_two", counted)
    for scorer in (f"likelihood={model_folder('llava')}", f"per_token={model_folder('llava')}", f"reward_model={tmp_path}/rm"):
        own = ScoreConfig(scorer=(scorer,))
        together = [line["score"] for (line,) in lines_of(own, pictures, rows)]
        alone = [line["score"] for row in rows for ((line,),) in [lines_of(own, pictures, [row])]]
        assert together == pytest.approx(alone, rel=1e-5)
        assert len(set(together)) == len(rows) - 1  # one response stands there twice
        assert made == [5, *(1 for _ in rows)]
        made.clear()


@pytest.mark.parametrize("safe", [True, False])
def test_reward_models_score_by_their_value_head_in_either_file(
    model_folder: Callable[..., Path], tmp_path: Path, pictures: str, safe: bool
) -> None:
    heads = [tmp_path / "rm1", tmp_path / "rm2"]
    for seed, folder in enumerate(heads):
        policy = make_policy(model_folder("llava"), needs=Needs(head="value"))
        save_policy(wake_adapters(policy, scale=0.3, seed=seed), folder, safe_serialization=safe)
    expected = [[float(side) for side in loaded(folder, pictures).rewards(ROWS[:1])] for folder in heads]
    own = ScoreConfig(scorer=tuple(f"reward_model={folder}" for folder in heads), ensemble="min")
    (lines,) = lines_of(own, pictures, ROWS[:1])
    for i, line in enumerate(lines):
        assert line["scores"] == pytest.approx({"reward_model_1": expected[0][i], "reward_model_2": expected[1][i]}, rel=1e-4)
        assert line["score"] == min(line["scores"].values())
    for kind, model, words in (
        ("likelihood", heads[0], "has a value head, and so no likelihoods"),
        ("reward_model", model_folder("llava"), "has no value head"),
    ):
        with pytest.raises(ValueError, match=words):
            scorers_of(ScoreConfig(scorer=(f"{kind}={model}",)), ModelConfig())  # before any worker loads one


def test_a_function_scores_by_what_the_prompts_row_held(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def right(rows):\n"
        "    return [None if 'right' not in row['extra'] else row['response'] == row['extra']['right'] for row in rows]\n"
    )
    first, second, third = lines_of(ScoreConfig(scorer=(f"python={file}:right",)), str(tmp_path), ROWS)
    assert isinstance(first, RecordError)
    assert str(first) == "the scorer returned None"
    assert (second[0]["score"], third[0]["score"]) == (1.0, 0.0)
    with pytest.raises(ValueError, match="has no function wrong"):
        scorers_of(ScoreConfig(scorer=(f"python={file}:wrong",)), ModelConfig())


def test_a_score_that_is_no_number_is_no_score(tmp_path: Path) -> None:
    rows = [{"id": f"r{i}", "folder": str(tmp_path), "row": ROWS[1 + i]} for i in range(2)]
    first, second = score_rows([lambda some: [Score(math.nan), Score(1.0)]], ["likelihood"], NOWHERE, "mean", rows)
    assert (first.reason, str(first)) == ("no score", "the score is nan")
    assert second[0]["score"] == 1.0


FAILING = """
def fails(rows):
    return [open('/nowhere/answers.json') for row in rows]

def leaves(rows):
    raise SystemExit('no key')

def forgets(rows):
    return [1.0]

def writes(rows):
    return ['3' for row in rows]

def exceeds(rows):
    return [10**400 for row in rows]
"""


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fails", "the scorer raised FileNotFoundError: .* \\(mine.py, line 3\\)"),
        ("leaves", "the scorer raised SystemExit: no key \\(mine.py, line 6\\)"),
        ("forgets", "the scorer returned 1 scores for 2 responses"),
        ("writes", "the scorer returned 3"),
        ("exceeds", "the scorer returned 1000"),
    ],
)
def test_a_function_that_fails_is_told_as_such_and_ends_nothing(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "mine.py").write_text(FAILING)
    work = make_scoring(
        HERE, NOWHERE, scorers_of(ScoreConfig(scorer=(f"python={tmp_path / 'mine.py'}:{name}",)), ModelConfig()), "mean"
    )
    (result,) = results_of(work, [{"id": "r0", "folder": str(tmp_path), "row": ROWS[0]}])
    assert isinstance(result, RecordError)
    assert re.match(words, str(result))


@pytest.mark.parametrize(
    "column", [{"sample": "b"}, {"sample": 2**40}, {"is_ended": None}, {"extra": "a note"}, {"extra": "[1]"}]
)
def test_columns_of_the_users_own_with_our_names_cost_nothing(tmp_path: Path, column: dict[str, Any]) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def ones(rows):\n    return [len(row['extra']) for row in rows]\n")
    row = {"query": "Which digit?", "response": "It is two.", "right": 2} | column
    (lines,) = lines_of(ScoreConfig(scorer=(f"python={file}:ones",)), str(tmp_path), [row])
    assert (lines[0]["sample"], lines[0]["is_ended"]) == (0, True)
    assert json.loads(lines[0]["extra"])["right"] == 2
    assert pa.Table.from_pylist(
        [lines[0]], schema=score_schema(scorers_of(ScoreConfig(scorer=(f"python={file}:ones",)), ModelConfig()))
    )


STATUSES = {"too long": 400, "filtered": 403, "crash": 500, "busy": 503}
"""What the judge's server answers to texts that hold these words."""


@pytest.fixture
def judge() -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    """The URL of a server that judges by the response's length, and the requests that it gets."""
    asked: list[Mapping[str, Any]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append({**body, "key": self.headers.get("Authorization")})
            text = body["messages"][0]["content"][-1]["text"]
            said = "I can't say." if "a cat" in text else "Score: 9 would be for more. \ud800\nScore: 7.5"
            answer = json.dumps({"choices": [{"message": {"content": said}}]}).encode()
            self.send_response(next((status for mark, status in STATUSES.items() if mark in text), 200))
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *words: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1", asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_judge_is_shown_pictures_question_and_response_and_its_words_are_kept(
    judge: tuple[str, list[Mapping[str, Any]]], pictures: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, asked = judge
    monkeypatch.setenv("OPENAI_API_KEY", "secret\n")
    own = ScoreConfig(scorer=(f"judge={url}",), judge_model="big")
    first, second, third = lines_of(own, pictures, [dict(ROWS[0], rejected_response=None), ROWS[1], ROWS[2]])
    assert (first[0]["score"], first[0]["judgements"]) == (7.5, ["Score: 9 would be for more. ?\nScore: 7.5"])
    assert isinstance(second, RecordError)
    assert str(second) == "the judge wrote: I can't say."
    assert third[0]["score"] == 7.5
    shown = next(body for body in asked if len(body["messages"][0]["content"]) == 2)
    assert (shown["model"], shown["temperature"], shown["key"]) == ("big", 0, "Bearer secret")
    assert shown["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert "Question: Which digit?\n\nResponse: It is two." in shown["messages"][0]["content"][1]["text"]


@pytest.mark.parametrize(
    ("kind", "shown"),
    [("PNG", "PNG"), ("JPEG", "JPEG"), ("WEBP", "WEBP"), ("GIF", "PNG"), ("BMP", "PNG"), ("TIFF", "PNG"), ("PPM", None)],
)
def test_a_judge_is_shown_pictures_of_the_kinds_that_servers_take_under_their_names(
    tmp_path: Path, kind: str, shown: str | None
) -> None:
    Image.new("RGB", (8, 8), (200, 30, 30)).save(tmp_path / "a.picture", kind)
    content = content_of(tmp_path / "a.picture")
    if shown is None:
        assert isinstance(content, RecordError)  # of a kind that no model is trained on either
        return
    label, _, data = content[0]["image_url"]["url"].partition(";base64,")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (label, image.format) == (f"data:image/{shown.lower()}", shown)
    assert all(abs(a - b) < 8 for a, b in zip(image.convert("RGB").getpixel((4, 4)), (200, 30, 30), strict=True))
    if kind == shown:
        assert base64.b64decode(data) == (tmp_path / "a.picture").read_bytes()


def content_of(picture: Path) -> Any:
    """What a judge is shown of a response about a picture, or why it is not."""
    (scorer,) = scorers_of(ScoreConfig(scorer=("judge=http://host/v1",), judge_model="big"), ModelConfig())
    row = {"id": "r", "folder": str(picture.parent), "row": {**ROWS[2], "images": [picture.name]}}
    (candidate,) = candidates_of(row, NOWHERE)
    assert isinstance(scorer, by_judge.JudgeScorer)
    try:
        return scorer.content(NOWHERE, candidate)
    except RecordError as error:
        return error


@pytest.mark.parametrize(
    ("said", "score"),
    [
        ("Fine.\nScore: 8", 8),
        ("**Score:** 8", 8),
        ("**Score: 8.5**", 8.5),
        ("**Score**: 8/10", 8),
        ("- score: `8`", 8),
        ("SCORE:\n\n**-2**", -2),
        ("Score: 3 would be for lies.\n**Score:** 9", 9),
        ("Underscore: 8", None),
        ("A score of 8", None),
        ("Score: none", None),
    ],
)
def test_a_judges_last_score_is_read_however_it_is_set(said: str, score: float | None) -> None:
    (scorer,) = scorers_of(ScoreConfig(scorer=("judge=http://host/v1",), judge_model="big"), ModelConfig())
    (candidate,) = candidates_of({"id": "r", "folder": "/", "row": ROWS[2]}, NOWHERE)
    assert isinstance(scorer, by_judge.JudgeScorer)
    found = scorer._judge(lambda content: said, NOWHERE, candidate)
    assert (found.value if isinstance(found, Score) else None) == score


def test_a_judge_that_answers_nothing_ends_the_run(
    judge: tuple[str, list[Mapping[str, Any]]], pictures: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_judge, "RETRIES", Retry(total=0))
    monkeypatch.setattr(by_judge, "PLAIN_QUESTION", "busy")  # of a server that is busy whatever it is asked
    scorers = scorers_of(ScoreConfig(scorer=(f"judge={judge[0]}",), judge_model="big"), ModelConfig())
    rows = [{"id": f"r{i}", "folder": pictures, "row": {**ROWS[2], "response": "busy"}} for i in range(3)]
    with pytest.raises(by_judge.JudgeUnreachable, match=r"^the judge http://127.0.0.1:\d+/v1 answered 503"):
        results_of(make_scoring(HERE, NOWHERE, scorers, "mean"), rows)
    nowhere = ScoreConfig(scorer=("judge=http://127.0.0.1:9/v1",), judge_model="big")
    with pytest.raises(by_judge.JudgeUnreachable, match="can't be reached"):
        lines_of(nowhere, pictures, ROWS[2:])
    with pytest.raises(by_judge.JudgeUnreachable, match="can't be reached"):  # also beside a row that is not asked about
        lines_of(nowhere, pictures, [ROWS[2], {**ROWS[2], "images": ["gone.png"]}])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("too long", "judge failed"),
        ("filtered", "judge unreachable"),
        ("crash", "judge unreachable"),
        ("busy", "judge unreachable"),
    ],
)
def test_a_row_that_a_judge_fails_at_costs_itself_also_where_no_other_is_left(
    judge: tuple[str, list[Mapping[str, Any]]], pictures: str, monkeypatch: pytest.MonkeyPatch, text: str, reason: str
) -> None:
    monkeypatch.setattr(by_judge, "RETRIES", Retry(total=0))
    own = ScoreConfig(scorer=(f"judge={judge[0]}",), judge_model="big")
    bad = {**ROWS[2], "response": text}
    first, good = lines_of(own, pictures, [bad, ROWS[2]])
    assert (first.reason, good[0]["score"]) == (reason, 7.5)
    (alone,) = lines_of(own, pictures, [bad])
    assert (alone.reason, str(alone)) == (reason, str(first))


def test_a_key_is_checked_on_the_driver_and_is_in_no_rows_reason(
    judge: tuple[str, list[Mapping[str, Any]]], pictures: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = ScoreConfig(scorer=(f"judge={judge[0]}",), judge_model="big")
    monkeypatch.setenv("OPENAI_API_KEY", '{"choices":')  # what the test's server says
    (result,) = lines_of(own, pictures, [{**ROWS[2], "response": "too long"}])
    assert str(result).startswith(f"the judge {judge[0]} answered 400: '(the key) ")
    monkeypatch.setenv("OPENAI_API_KEY", "two lines\nof it")
    with pytest.raises(ValueError, match=r"^OPENAI_API_KEY: holds more than the key"):
        scorers_of(own, ModelConfig())


def test_a_judges_prompt_that_cant_be_read_is_told_with_its_flag(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("Jugé: {response}".encode("latin-1"))
    for name, words in (
        ("gone.txt", "there is no such file. Give a text file with the judge's instruction."),
        ("latin.txt", "is no text in UTF-8 (byte 3 is 0xe9). Save it as UTF-8."),
    ):
        own = ScoreConfig(scorer=("judge=http://host/v1",), judge_model="big", judge_prompt=str(tmp_path / name))
        with pytest.raises(ValueError) as caught:
            scorers_of(own, ModelConfig())
        assert str(caught.value) == f"--judge_prompt {tmp_path / name}: {words}"
    own = ScoreConfig(scorer=("judge=http://host/v1",), judge_model="big", judge_prompt=str(tmp_path))
    with pytest.raises(ValueError, match=r"^--judge_prompt .*: can't be read "):
        scorers_of(own, ModelConfig())


def test_a_question_that_shows_the_instructions_marks_is_judged_as_it_stands(
    judge: tuple[str, list[Mapping[str, Any]]], pictures: str
) -> None:
    row = {"query": "What does {response} mean?", "response": "A place for {query}."}
    lines_of(ScoreConfig(scorer=(f"judge={judge[0]}",), judge_model="big"), pictures, [row])
    text = judge[1][0]["messages"][0]["content"][-1]["text"]
    assert "Question: What does {response} mean?\n\nResponse: A place for {query}.\n" in text


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (ScoreConfig(), "No scorer given: pass --scorer with reward_model"),
        (ScoreConfig(scorer=("best",)), "--scorer best: must be one of reward_model"),
        (ScoreConfig(scorer=("likelihood",)), "--scorer likelihood: no model given. Write likelihood=FOLDER, or pass --model."),
        (ScoreConfig(scorer=("judge=host:8000",), judge_model="x"), "expected the URL"),
        (ScoreConfig(scorer=("judge=http://host/v1",)), "pass --judge_model"),
        (ScoreConfig(scorer=("judge=http://host/v1",), judge_model="x", judge_pattern="Score"), "has no group"),
        (ScoreConfig(scorer=("python=math",)), "expected MODULE:FUNCTION"),
        (ScoreConfig(scorer=("python=math:sqrt",), judge_pattern="N: (.)"), "--judge_pattern: no scorer of --scorer python"),
        (ScoreConfig(scorer=("python=math:sqrt",), ensemble="min"), "--ensemble min: --scorer python=math:sqrt is the only"),
        (ScoreConfig(scorer=("python=math:sqrt",), beta=1.0), "--beta: no scorer of --scorer python=math:sqrt uses it"),
    ],
)
def test_what_is_no_scorer_and_flags_without_one_are_refused(own: ScoreConfig, words: str) -> None:
    with pytest.raises(ValueError, match=words.replace(".", r"\.")):
        scorers_of(own, ModelConfig())


def test_several_scorers_of_a_kind_are_numbered() -> None:
    scorers = scorers_of(ScoreConfig(scorer=("python=math:sqrt", "python=math:exp")), ModelConfig())
    assert names_of(scorers) == ["python_1", "python_2"]
    (candidate,) = candidates_of({"id": "r", "folder": "/", "row": ROWS[2]}, NOWHERE)
    assert candidate.columns["is_ended"]
