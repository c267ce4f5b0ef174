"""What the rounds hand to their stages, and what they refuse before any work."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayalign.algorithms import DPO, RM
from rayalign.config.config import Config
from rayalign.config.inference_verbs import IterateConfig
from rayalign.config.sections import DataConfig, ModelConfig, RunConfig
from rayalign.evaluation.pool_folder import open_output
from rayalign.images.fetch import fetch_images
from rayalign.rounds import iterate
from rayalign.storage import Store
from tests.tiny_models import noise_image


@pytest.mark.parametrize(
    ("names", "given", "expected"),
    [
        (("a/x.jsonl",), None, "a"),
        (("a/x.jsonl", "a/b/y.jsonl"), None, "a"),
        (("a/x.jsonl", "b/y.jsonl"), None, ""),
        (("a/x.jsonl",), "/pictures", "/pictures"),
    ],
)
def test_images_are_looked_for_below_what_the_data_sets_folders_share(
    tmp_path: Path, names: tuple[str, ...], given: str | None, expected: str
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    data = DataConfig(dataset=tuple(str(tmp_path / name) for name in names), image_root=given)
    found = iterate._image_root(Config(DPO(), data))
    assert found == (given or str(tmp_path / expected).rstrip("/"))


def test_wrong_flags_and_another_command_in_the_folder_are_refused_before_any_work(tmp_path: Path, model_folder) -> None:  # type: ignore[no-untyped-def]  # as the fixture says
    (tmp_path / "prompts.jsonl").write_text('{"query": "Which?"}\n')
    config = Config(
        DPO(),
        DataConfig(dataset=(str(tmp_path / "prompts.jsonl"),)),
        ModelConfig(model=str(model_folder("llava"))),
        run=RunConfig(output_dir=str(tmp_path / "out")),
    )
    with pytest.raises(ValueError, match="No scorer given"):
        iterate.run(config, IterateConfig())
    with pytest.raises(ValueError, match="Write likelihood=FOLDER"):
        iterate.run(config, IterateConfig(scorer=("likelihood",)))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "settings.json").write_text('{"rlhf_type": "dpo", "n": 8}')
    with pytest.raises(ValueError, match="made with other settings"):
        iterate.run(config, IterateConfig(scorer=("python=math:sqrt",)))


def test_what_the_first_rounds_training_would_refuse_is_refused_before_any_work(tmp_path: Path, model_folder) -> None:  # type: ignore[no-untyped-def]  # as the fixture says
    (tmp_path / "prompts.jsonl").write_text('{"query": "Which?"}\n')
    (tmp_path / "file").write_text("")
    (tmp_path / "broken.py").write_text("def score(:\n")
    config = Config(
        DPO(),
        DataConfig(dataset=(str(tmp_path / "prompts.jsonl"),)),
        ModelConfig(model=str(model_folder("llava"))),
        run=RunConfig(output_dir=str(tmp_path / "out")),
    )
    own = IterateConfig(scorer=("python=math:sqrt",))
    refused: list[tuple[Config, IterateConfig, str]] = [
        (dataclasses.replace(config, algorithm=RM()), own, "--rlhf_type rm: a reward model writes no responses"),
        (config.replace({"dry_run": True}), own, "--dry_run: rounds have no plan of their own"),
        (config.replace({"num_workers": "1:2"}), own, "--num_workers 1:2: as many workers respond and score as train"),
        (config.replace({"val_dataset": ["gone.jsonl"]}), own, "Dataset 'gone.jsonl': there is no file or folder"),
        (config.replace({"val_dataset": list(config.data.dataset)}), own, "1 of its 1 records of files that --dataset reads"),
        (config.replace({"output_dir": str(tmp_path / "file")}), own, "is a file: pass a folder"),
        (config, IterateConfig(scorer=("reward_model=/gone",)), "--scorer reward_model=/gone: there is no such folder"),
        (
            config,
            IterateConfig(scorer=(f"python={tmp_path / 'broken.py'}:f",)),
            "--scorer python .*: fails when it is imported",
        ),
    ]
    for wrong, rounds, words in refused:
        with pytest.raises(ValueError, match=words):
            iterate.run(wrong, rounds)
    assert not (tmp_path / "out").exists()


class Started(Exception):
    """The command got so far as to start Ray."""


def test_another_scorer_under_the_same_name_is_refused(  # type: ignore[no-untyped-def]  # as the fixture says
    tmp_path: Path, model_folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(config: Config) -> None:
        raise Started

    monkeypatch.setattr(iterate, "start_ray", start)
    (tmp_path / "prompts.jsonl").write_text('{"query": "Which?"}\n')
    (tmp_path / "mine.py").write_text("def score(rows):\n    return [0 for row in rows]\n")
    config = Config(
        DPO(),
        DataConfig(dataset=(str(tmp_path / "prompts.jsonl"),)),
        ModelConfig(model=str(model_folder("llava"))),
        run=RunConfig(output_dir=str(tmp_path / "out")),
    )
    own = IterateConfig(scorer=(f"python={tmp_path / 'mine.py'}:score",))
    for _ in range(2):  # the same command goes on
        with pytest.raises(Started):
            iterate.run(config, own)
    with pytest.raises(Started):
        iterate.run(config, dataclasses.replace(own, num_rounds=5))
    (tmp_path / "mine.py").write_text("def score(rows):\n    return [1 for row in rows]\n")
    with pytest.raises(ValueError, match="other settings:\n  scorers"):
        iterate.run(config, own)


@pytest.fixture
def begun(tmp_path: Path, model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`begun(num_rounds)` is a command of rounds with held-out records, which raises Started where it would start Ray."""

    def start(config: Config) -> None:
        raise Started

    monkeypatch.setattr(iterate, "start_ray", start)
    (tmp_path / "prompts.jsonl").write_text('{"query": "Which?"}\n')
    (tmp_path / "held_out.jsonl").write_text('{"query": "Who?", "response": "I.", "rejected_response": "You."}\n')
    (tmp_path / "mine.py").write_text("def score(rows):\n    return [0 for row in rows]\n")
    config = Config(
        DPO(),
        DataConfig(dataset=(str(tmp_path / "prompts.jsonl"),), val_dataset=(str(tmp_path / "held_out.jsonl"),)),
        ModelConfig(model=str(model_folder("llava"))),
        run=RunConfig(output_dir=str(tmp_path / "out")),
    )
    scorer = (f"python={tmp_path / 'mine.py'}:score",)
    return lambda num_rounds=3, **flags: iterate.run(config.replace(flags), IterateConfig(num_rounds=num_rounds, scorer=scorer))


def test_other_held_out_records_under_the_same_name_are_refused(tmp_path: Path, begun: Callable[..., None]) -> None:
    for _ in range(2):
        with pytest.raises(Started):
            begun()
    (tmp_path / "held_out.jsonl").write_text('{"query": "Who?", "response": "You.", "rejected_response": "I, me."}\n')
    with pytest.raises(ValueError, match="other settings:\n  held-out files"):
        begun()


def test_fewer_rounds_than_are_done_are_refused_and_the_results_stay(tmp_path: Path, begun: Callable[..., None]) -> None:
    with pytest.raises(Started):
        begun()
    for number in (1, 2):
        (Store(str(tmp_path / "out")) / f"round_{number}" / "train" / "summary.json").write_json({})
    (tmp_path / "out" / "rounds.json").write_text("[1, 2]")
    with pytest.raises(ValueError) as caught:
        begun(num_rounds=1)
    assert str(caught.value) == (
        f"--num_rounds 1: 2 rounds are done in --output_dir {tmp_path}/out, and the results would tell of 1. Pass --num_rounds "
        "2 or more, or another --output_dir."
    )
    assert (tmp_path / "out" / "rounds.json").read_text() == "[1, 2]"
    for num_rounds in (2, 3):
        with pytest.raises(Started):
            begun(num_rounds=num_rounds)
    with pytest.raises(Started):
        begun(num_rounds=1, overwrite=True)
    assert not (tmp_path / "out" / "rounds.json").exists()


def test_a_round_without_pairs_is_drawn_anew_with_other_flags_and_earlier_rounds_stay(tmp_path: Path) -> None:
    folder = Store(str(tmp_path / "out"))
    before = {"rlhf_type": "dpo", "n": 4, "temperature": 0.8, "top_p": 1.0, "max_new_tokens": 64}
    now = {**before, "temperature": 1.2}
    done = folder / "round_1"
    (done / "train" / "summary.json").write_json({})
    (done / "responses" / "rows" / "000.parquet").write_bytes(b"")
    (done / "pairs" / "pairs.json").write_json({"pairs": 3})

    def given(settings: dict[str, Any], num_rounds: int = 2) -> None:
        iterate._allow_other_draws(folder, settings, num_rounds)
        open_output(folder, settings, overwrite=False)

    given(before)
    with pytest.raises(ValueError) as caught:
        given(now, num_rounds=1)
    assert str(caught.value) == (
        f"--output_dir {folder.location}: its rounds were drawn with other flags (--temperature 0.8 -> 1.2), and all 1 are "
        "done. A higher --num_rounds adds rounds with the new ones."
    )
    given(now)  # the second round has no responses yet
    second = folder / "round_2"
    (second / "responses" / "rows" / "000.parquet").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"round 2 has responses already\. Give these flags as before, or delete .*/round_2 to"
    ):
        given(before)
    (second / "pairs" / "pairs.json").write_json({"pairs": 1})
    with pytest.raises(ValueError, match="round 2 has responses already"):
        given(before)
    (second / "pairs" / "pairs.json").write_json({"pairs": 0})
    with pytest.raises(ValueError, match=r"made with other settings:\n  beta"):
        given({**before, "beta": 0.2})
    assert second.exists()
    given({**now, "n": 8})
    assert not second.exists()
    assert (done / "responses" / "rows" / "000.parquet").exists()
    given({**now, "n": 8})  # the same command goes on


def test_a_round_trains_from_the_round_before_or_from_the_start_on_all_pairs_so_far(tmp_path: Path) -> None:
    start, policy = ({"model": name, "model_type": None, "adapter": None} for name in ("first", "round 2"))
    folder = Store(str(tmp_path))

    def flags(reference: Literal["start", "previous"]) -> dict[str, Any]:
        return iterate.training_of(IterateConfig(reference=reference), folder, 3, start=start, policy=policy)

    previous, anew = flags("previous"), flags("start")
    assert (previous["model"], anew["model"]) == ("round 2", "first")
    assert previous["dataset"] == [f"{tmp_path}/round_3/pairs/rows"]
    assert anew["dataset"] == [f"{tmp_path}/round_{k}/pairs/rows" for k in (1, 2, 3)]
    assert previous["output_dir"] == anew["output_dir"] == f"{tmp_path}/round_3/train"


@pytest.mark.parametrize("names", [("data",), ("data", "other")])
def test_the_scoring_stage_finds_the_pictures_of_prompts_wherever_these_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
) -> None:
    """Of one folder, and of two that share none but the root."""
    if len(names) > 1:
        monkeypatch.setattr("os.path.commonpath", lambda folders: "/")
    places = [tmp_path / name for name in names]
    for folder in places:
        folder.mkdir()
        (folder / "a.png").write_bytes(noise_image(8, 8))
        (folder / "prompts.jsonl").write_text('{"query": "Which?"}\n')
    config = Config(DPO(), DataConfig(dataset=tuple(str(folder / "prompts.jsonl") for folder in places)))
    flags = iterate.scoring_flags(config, IterateConfig(), Store(str(tmp_path / "out" / "round_1")))
    root = None if flags.image_root is None else Store.at(flags.image_root)
    responses = Store(str(tmp_path / "out" / "round_1" / "responses" / "rows"))
    for folder in places:
        found = fetch_images([str(folder / "a.png")], folder=responses, image_root=root, allow_urls=flags.allow_image_urls)
        assert found == [(folder / "a.png").read_bytes()]
    assert flags.allow_image_urls == (len(names) > 1)


def test_a_prompt_whose_picture_is_gone_is_left_out_of_the_pairs_and_counted(tmp_path: Path) -> None:
    """Between the responses and the pairs a picture may go, or an address may no longer answer."""
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(noise_image(8, 8))
    (tmp_path / "prompts.jsonl").write_text('{"query": "Which?"}\n')
    config = Config(DPO(), DataConfig(dataset=(str(tmp_path / "prompts.jsonl"),)))
    place = Store(str(tmp_path / "out" / "round_1"))
    prompt = {"system": None, "query": "<image>Which?", "history": [], "is_ended": True}
    lines = [
        {**prompt, "prompt_id": f"p:{name}", "images": [{"bytes": None, "path": f"{tmp_path}/{name}.png"}], "sample": i}
        | {"response": "two"[: 3 - i], "score": float(i)}
        for name in "ab"
        for i in range(2)
    ]
    (place / "scores" / "rows" / "0.parquet").write_bytes(as_parquet(lines))

    def pairs() -> Mapping[str, Any]:
        return iterate._pairs(config, IterateConfig(scorer=("python=x:y",)), place, 1, policy="base", seed=1)

    (tmp_path / "a.png").rename(tmp_path / "a")
    (tmp_path / "b.png").rename(tmp_path / "b")
    with pytest.raises(ValueError) as caught:  # nothing is noted, so that the command goes on
        pairs()
    assert str(caught.value).startswith("Round 1: the pictures of all 2 prompts with pairs can't be read any more (first p:a: ")
    assert str(caught.value).endswith("). Bring them back to where they were; the same command goes on.")
    (tmp_path / "b").rename(tmp_path / "b.png")
    found = pairs()
    assert (found["prompts"], found["responses"], found["pairs"]) == (2, 4, 1)
    assert found["left_out"] == {"prompts whose pictures can't be read any more": 1}
    (row,) = pq.read_table(tmp_path / "out" / "round_1" / "pairs" / "rows").to_pylist()
    assert row["lineage"]["prompt"] == "p:b"


def as_parquet(lines: Sequence[Mapping[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(list(lines)), sink)
    return bytes(sink.getvalue().to_pybytes())
