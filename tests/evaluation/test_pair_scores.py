"""Pairs under tiny models: the numbers of the training's forward, the reference's, and those of wrong pictures."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import rayalign
from rayalign.algorithms import RM, SFT
from rayalign.config.config import Config
from rayalign.config.sections import ModelConfig, OptimizerConfig, TunerConfig
from rayalign.data.encoder_spec import EncoderSpec
from rayalign.data.rows import Sources
from rayalign.evaluation.loaded_model import flags_around
from rayalign.evaluation.pair_scores import PairScorer, Scoring, make_work, without_common_end
from rayalign.evaluation.score_columns import View
from rayalign.formats.records import RecordError
from rayalign.models.source import ModelSource
from rayalign.policy.saving import save_policy
from tests.tiny_models import encode_pair, make_policy, noise_image, wake_adapters

NOWHERE = Sources((), None, False)
CHOSEN, REJECTED = "It is two.", "a cat on the mat"
ROWS: list[dict[str, Any]] = [
    {
        "id": f"r{n}",
        "folder": "/",
        "row": {"query": "Which digit?", "response": CHOSEN, "rejected_response": REJECTED}
        | ({"images": [{"bytes": noise_image(30 + n, 40, seed=n), "path": None}]} if n else {}),
    }
    for n in range(3)
]


def scorer(
    folder: Path,
    *,
    reference: Path | None = None,
    views: tuple[View, ...] = (),
    batch_size: int = 2,
    samples_kl: bool = False,
) -> PairScorer:
    model = ModelConfig(model=str(folder), gradient_checkpointing=False)
    config = Config(algorithm=SFT(), model=model, optimizer=OptimizerConfig(batch_size=batch_size))
    start = None if reference is None else ModelConfig(model=str(reference), gradient_checkpointing=False)
    return make_work(Scoring(config, NOWHERE, start, views, samples_kl))


def trained(folder: Path, run: Path, needs: Any = None) -> Path:
    """An adapter, or a reward model, as a run leaves it."""
    options = {} if needs is None else {"needs": needs}
    policy = wake_adapters(make_policy(folder, tuner=TunerConfig(lora_target_modules=("ALL",), lora_rank=4), **options))
    if policy.value_head is not None:
        torch.nn.init.normal_(policy.value_head.summary.weight)
    save_policy(policy, run)
    EncoderSpec(str(folder), responses="both").processor.save_pretrained(run)
    return run


def lines_of(work: PairScorer, rows: list[dict[str, Any]]) -> list[Mapping[str, Any]]:
    """The one line of each row."""
    lines = []
    for result in work(rows):
        assert not isinstance(result, RecordError), str(result)
        (line,) = result
        lines.append(line)
    return lines


def test_pairs_are_scored_as_in_training_and_by_the_base_model_as_reference(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = model_folder("llava")
    run = trained(folder, tmp_path / "model")
    lines = lines_of(scorer(run, reference=folder), ROWS)
    for name, place in (("", run), ("reference_", folder)):
        expected = rayalign.load_policy(place, device="cpu").logps([row["row"] for row in ROWS])
        for side in ("chosen", "rejected"):
            total = getattr(expected, side).total
            found = torch.tensor([line[f"{name}{side}"] for line in lines])
            torch.testing.assert_close(found, total, atol=1e-4, rtol=1e-5)  # float32 in batches of another shape
    assert lines[0]["chosen"] != pytest.approx(lines[0]["reference_chosen"], abs=1e-3)
    assert [line["num_images"] for line in lines] == [0, 1, 1]


def test_wrong_pictures_change_the_pairs_that_have_pictures_and_no_others(model_folder: Callable[..., Path]) -> None:
    lines = lines_of(scorer(model_folder("llava"), views=("shuffled", "ablated")), ROWS)
    assert "shuffled_chosen" not in lines[0]
    assert "ablated_chosen" not in lines[0]
    for line in lines[1:]:
        for view in ("shuffled", "ablated"):
            assert abs(line[f"{view}_chosen"] - line["chosen"]) > 1e-4
    # The two records with pictures have each other's.
    swapped = [ROWS[1] | {"row": ROWS[1]["row"] | {"images": ROWS[2]["row"]["images"]}}]
    other = lines_of(scorer(model_folder("llava")), swapped)
    assert lines[1]["shuffled_chosen"] == pytest.approx(other[0]["chosen"], abs=0.5)  # scaled to the size of its own


def test_the_cut_into_batches_changes_nothing(model_folder: Callable[..., Path]) -> None:
    folder = model_folder("llava")
    one, three = (lines_of(scorer(folder, views=("ablated",), batch_size=size), ROWS) for size in (1, 3))
    for alone, together in zip(one, three, strict=True):
        for name in ("chosen", "rejected"):
            assert alone[name] == pytest.approx(together[name], abs=1e-3)  # float32 in batches of another shape


def test_a_reward_model_gives_its_scores_and_no_reference(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = model_folder("llava")
    run = trained(folder, tmp_path / "model", RM().needs)
    lines = lines_of(scorer(run, reference=folder), ROWS)
    expected = rayalign.load_policy(run, device="cpu").rewards([row["row"] for row in ROWS])
    for side, values in zip(("chosen", "rejected"), expected, strict=True):
        assert [line[side] for line in lines] == pytest.approx(values.tolist(), abs=1e-4)  # float32 in other batches
    assert "reference_chosen" not in lines[0]
    assert lines[0]["is_reward_model"]
    (asked,) = scorer(run, reference=folder)([ROWS[0] | {"scores": "", "asks": 4}])
    assert isinstance(asked, RecordError)
    assert str(asked) == "asks for a text, and a reward model scores responses and writes none"


def test_a_row_that_can_not_be_scored_is_said_and_costs_no_other(model_folder: Callable[..., Path]) -> None:
    single = {"id": "single", "folder": "/", "row": {"query": "Which?", "response": CHOSEN}}
    first, second = scorer(model_folder("llava"))([single, ROWS[0]])
    assert isinstance(first, RecordError)
    assert first.reason == "missing field"
    assert not isinstance(second, RecordError)


def test_options_are_compared_without_the_end_that_they_share(model_folder: Callable[..., Path]) -> None:
    folder = model_folder("llava")
    pair = encode_pair(folder, "p", "Is it a cat?", "yes", "no")
    cut = without_common_end(pair)
    assert pair.chosen_ids[len(cut.chosen_ids) :] == pair.rejected_ids[len(cut.rejected_ids) :]
    assert len(cut.chosen_ids) < len(pair.chosen_ids)
    assert cut.chosen_ids[-1] != cut.rejected_ids[-1]
    row = {"id": "q#0", "folder": "/", "row": {"query": "Is it a cat?", "response": "yes", "rejected_response": "no"}}
    (line,) = lines_of(scorer(folder), [row | {"scores": "options", "asks": 3}])
    (whole,) = lines_of(scorer(folder), [row])
    assert line["chosen"] > whole["chosen"]  # fewer factors
    assert line["chosen_tokens"] == len(cut.chosen_ids)
    assert isinstance(line["text"], str)


def test_an_open_question_is_only_written_to(model_folder: Callable[..., Path]) -> None:
    row = {"id": "o#0", "folder": "/", "row": {"query": "Describe it.", "response": "."}, "scores": "", "asks": 4}
    (line,) = lines_of(scorer(model_folder("llava")), [row])
    assert "chosen" not in line
    assert isinstance(line["text"], str)


def test_the_divergence_is_of_responses_that_the_model_itself_gives(
    model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rayalign.evaluation.pair_scores.MOST_SAMPLED", 6)
    folder = model_folder("llava")
    run = trained(folder, tmp_path / "model")
    rows = [ROWS[0] | {"id": f"k{n}"} for n in range(24)]  # each draws with numbers of its own
    lines = lines_of(scorer(run, reference=folder, samples_kl=True, batch_size=8), rows)
    values = [line["kl"] for line in lines]
    assert len(set(values)) > 12
    assert sum(values) > 0  # a divergence is, and on the chosen responses log p need not be the higher one
    assert "kl" not in lines_of(scorer(folder, samples_kl=True), ROWS[:1])[0]


def test_a_reference_of_another_family_is_refused(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is of another type than the model, or has other tokens"):
        scorer(trained(model_folder("llava"), tmp_path / "run"), reference=model_folder("qwen2_vl"))


def test_the_flags_around_a_model_are_its_runs_or_none(tmp_path: Path) -> None:
    source, file = ModelSource(str(tmp_path / "model")), tmp_path / "config.yaml"
    assert flags_around(source) == {}
    file.write_text("lr: 1\n")  # another tool's
    assert flags_around(source) == {}
    file.write_text("rlhf_type: dpo\nbeta: 0.3\n")
    assert flags_around(source) == {"rlhf_type": "dpo", "beta": 0.3}
    file.write_text("- a\n")
    with pytest.raises(ValueError, match=f"^{file}: must hold lines of `flag: value`. It stands where a run has its flags"):
        flags_around(source)
