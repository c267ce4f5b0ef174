"""Models loaded from Python to score raw rows: the numbers of the training's forward and of transformers' own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

import rayalign
from rayalign.algorithms import RM
from rayalign.config.sections import TunerConfig
from rayalign.data.encode import Encoder
from rayalign.data.encoder_spec import EncoderSpec
from rayalign.formats.parse import parse_row
from rayalign.policy.policy import Policy
from rayalign.policy.saving import save_policy
from tests.tiny_models import encode_pair, make_batch, make_policy, noise_image, wake_adapters

QUESTION, CHOSEN, REJECTED = "Which digit is it?", "It is two.", "a cat"
PICTURES = {"a.png": noise_image(40, 30, seed=1), "b.png": noise_image(20, 60, seed=2)}
ROWS: list[dict[str, Any]] = [
    {"query": QUESTION, "images": [name], "response": CHOSEN, "rejected_response": REJECTED} for name in PICTURES
]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for name, content in PICTURES.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def trained(folder: Path, run: Path, needs: Any = None) -> Policy:
    """A policy whose model is saved as a run leaves it."""
    options = {} if needs is None else {"needs": needs}
    policy = wake_adapters(make_policy(folder, tuner=TunerConfig(lora_target_modules=("ALL",), lora_rank=4), **options))
    save_policy(policy, run)
    EncoderSpec(str(folder), responses="both").processor.save_pretrained(run)
    return policy


def batch_of(folder: Path) -> Any:
    pairs = [encode_pair(folder, name, QUESTION, CHOSEN, REJECTED, images=[content]) for name, content in PICTURES.items()]
    return make_batch(folder, pairs)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_runs_model_scores_rows_as_in_training(model_folder: Callable[..., Path], pictures: Path, family: str) -> None:
    folder = model_folder(family)
    policy = trained(folder, pictures / "model")
    batch = batch_of(folder)
    with torch.no_grad():
        expected = policy.logps(batch, policy.image_features(batch))
    for place in (str(pictures / "model"), f"file://{pictures}/model"):
        loaded = rayalign.load_policy(place, image_root=pictures, device="cpu")
        logps = loaded.logps(ROWS)
        assert torch.equal(logps.chosen.total, expected.chosen.total)
        assert torch.equal(logps.rejected.total, expected.rejected.total)
        assert not loaded.policy.trainable


def test_a_plain_model_scores_rows_as_transformers_does(model_folder: Callable[..., Path], pictures: Path) -> None:
    folder = model_folder("llava")
    logps = rayalign.load_policy(folder, image_root=pictures, device="cpu", dtype="float32").logps(ROWS)
    model: Any = AutoModelForImageTextToText.from_pretrained(folder)
    encoder = Encoder(EncoderSpec(str(folder), responses="both"))
    for i, (row, content) in enumerate(zip(ROWS, PICTURES.values(), strict=True)):
        inputs = encoder.plain_row(parse_row(row, id=""), [content], "chosen")
        tokens = int(logps.chosen.tokens[i])
        with torch.no_grad():
            logits = model(**inputs).logits[:, -tokens - 1 : -1].log_softmax(-1)
        expected = logits.gather(2, inputs["input_ids"][:, -tokens:, None]).sum()
        torch.testing.assert_close(logps.chosen.total[i], expected, atol=1e-4, rtol=0)  # float32 by other kernels


def test_a_row_may_have_one_response_only(model_folder: Callable[..., Path], pictures: Path) -> None:
    policy = rayalign.load_policy(model_folder("llava"), image_root=pictures, device="cpu")
    both = policy.logps(ROWS[:1])
    one = policy.logps([{name: cell for name, cell in ROWS[0].items() if name != "rejected_response"}])
    torch.testing.assert_close(one.chosen.total, both.chosen.total, atol=1e-5, rtol=0)  # float32 in another shape
    assert one.rejected.tokens.tolist() == [0]


def test_a_reward_model_gives_its_scores(model_folder: Callable[..., Path], pictures: Path) -> None:
    folder = model_folder("llava")
    policy = trained(folder, pictures / "model", RM().needs)
    batch = batch_of(folder)
    with torch.no_grad():
        expected = policy.values(batch, policy.image_features(batch))
    loaded = rayalign.load_policy(pictures / "model", image_root=pictures, device="cpu")
    for scores, side in zip(loaded.rewards(ROWS), expected, strict=True):
        assert torch.equal(scores, side)
    with pytest.raises(ValueError) as caught:
        loaded.rewards([ROWS[0] | {"rejected_response": None}])
    assert str(caught.value) == "Rewards are of pairs: give each row a rejected response, too."


def test_what_can_not_be_scored_is_said(model_folder: Callable[..., Path], pictures: Path) -> None:
    policy = rayalign.load_policy(model_folder("llava"), image_root=pictures, device="cpu")
    for rows, words in (
        ([], "No rows given."),
        ([ROWS[0], {"query": "Which?", "response": " "}], "Row 1: response: the response is empty"),
    ):
        with pytest.raises(ValueError) as caught:
            policy.logps(rows)
        assert str(caught.value) == words
    with pytest.raises(ValueError) as caught:
        policy.rewards(ROWS)
    assert str(caught.value) == "The model has no value head, so it is no reward model. Load the model/ folder of a run of rm."
    with pytest.raises(ValueError) as caught:
        rayalign.load_policy(pictures / "gone")
    assert str(caught.value) == f"--model {pictures}/gone: there is no such folder (looked for {pictures}/gone)."


def test_a_row_is_refused_for_what_drops_a_record_of_a_data_set(model_folder: Callable[..., Path], pictures: Path) -> None:
    policy = rayalign.load_policy(model_folder("llava"), image_root=pictures, device="cpu")
    row = {name: cell for name, cell in ROWS[0].items() if name != "images"}
    for wrong, words in (
        (
            {"image_path": "a.png"},
            "image_path: this looks like a picture, the record has no other, and no record format reads a column of this name; "
            "pass --columns image_path=images, or take the column out of the rows",
        ),
        ({"images": ["gone.png"]}, "images: gone.png: No such file or directory"),
        ({"images": ["http://localhost/a.png"]}, "images: http://localhost/a.png: pass --allow_image_urls true to fetch it"),
        ({"margin": {}}, "margin: expected a number, found {}"),
        ({"history": 3}, "history: expected a list of [query, response] pairs"),
    ):
        with pytest.raises(ValueError) as caught:
            policy.logps([ROWS[0], row | wrong])
        assert str(caught.value) == f"Row 1: {words}"


def test_columns_are_renamed_as_for_training(model_folder: Callable[..., Path], pictures: Path) -> None:
    folder = model_folder("llava")
    expected = rayalign.load_policy(folder, image_root=pictures, device="cpu").logps(ROWS)
    policy = rayalign.load_policy(folder, image_root=pictures, device="cpu", columns=["image_path=images"])
    rows = [{"image_path" if name == "images" else name: cell for name, cell in row.items()} for row in ROWS]
    assert torch.equal(policy.logps(rows).chosen.total, expected.chosen.total)
