"""From a raw row to an encoded pair: what each algorithm makes of pairs and of labelled responses (Ray's part: integration)."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from rayalign.algorithms import ALGORITHMS
from rayalign.config.plugins import Plugin
from rayalign.config.sections import DataConfig
from rayalign.data.encode import EncoderSpec
from rayalign.data.prepare import Sources, _encode_row, cache_key
from rayalign.data.store import EncodedPair
from rayalign.formats.records import RecordError
from rayalign.storage import Store

IT_IS_TWO = [44, 87, 271, 305, 17, 2]  # "I", "t", " is", " two", ".", end
A_CAT = [68, 299, 2]  # "a", " cat", end
QUESTION = {"query": "Which digit?"}
RESPONSE = QUESTION | {"response": "It is two."}
PAIR = RESPONSE | {"rejected_response": "a cat"}


@pytest.fixture
def encode_row(model_folder: Callable[..., Path], tmp_path: Path) -> Callable[[str, Mapping[str, Any]], EncodedPair]:
    """`encode_row(algorithm, row)`."""

    def encode(algorithm: str, row: Mapping[str, Any]) -> EncodedPair:
        needs = ALGORITHMS[algorithm]().needs
        spec = EncoderSpec(str(model_folder("llava")), responses=needs.responses)
        return _encode_row(row, "a.jsonl:3", Store(str(tmp_path)), Sources((), None, False), spec)

    return encode


Encode = Callable[[str, Mapping[str, Any]], EncodedPair]


@pytest.mark.parametrize(
    ("row", "chosen_ids", "rejected_ids"),
    [
        (RESPONSE | {"label": True}, IT_IS_TWO, []),
        (RESPONSE | {"label": 1}, IT_IS_TWO, []),
        (RESPONSE | {"label": False}, [], IT_IS_TWO),
        (RESPONSE | {"label": 0}, [], IT_IS_TWO),
        (RESPONSE | {"label": 0, "rejected_response": None}, [], IT_IS_TWO),  # an empty cell counts as absent
        (PAIR, IT_IS_TWO, A_CAT),
        (PAIR | {"label": None}, IT_IS_TWO, A_CAT),
        (PAIR | {"label": True}, IT_IS_TWO, A_CAT),
        ({"prompt": "Which digit?", "completion": "It is two.", "label": False}, [], IT_IS_TWO),
    ],
)
def test_kto_takes_pairs_and_labelled_responses(
    encode_row: Encode, row: Mapping[str, Any], chosen_ids: list[int], rejected_ids: list[int]
) -> None:
    pair = encode_row("kto", row)
    assert (pair.id, pair.chosen_ids, pair.rejected_ids) == ("a.jsonl:3", chosen_ids, rejected_ids)


@pytest.mark.parametrize(
    ("row", "reason", "words"),
    [
        (
            RESPONSE,
            "missing field",
            "label: the record has one response and does not say whether it is good; add label (true or false), or a rejected "
            "response",
        ),
        (
            PAIR | {"label": False},
            "contradictory label",
            "label: the chosen response is labelled as bad, although there is a rejected one; remove the label, or keep one "
            "response",
        ),
        (RESPONSE | {"label": "true"}, "wrong type", "label: expected true or false, found 'true'"),
        (RESPONSE | {"label": -1}, "wrong type", "label: expected true or false, found -1"),
    ],
)
def test_kto_drops_what_does_not_say_which_response_is_good(
    encode_row: Encode, row: Mapping[str, Any], reason: str, words: str
) -> None:
    with pytest.raises(RecordError) as caught:
        encode_row("kto", row)
    assert (caught.value.reason, caught.value.field, str(caught.value)) == (reason, "label", words)


def test_sft_drops_what_is_labelled_as_bad_and_imitates_the_rest(encode_row: Encode) -> None:
    for row in (RESPONSE, RESPONSE | {"label": True}, PAIR):
        assert (encode_row("sft", row).chosen_ids, encode_row("sft", row).rejected_ids) == (IT_IS_TWO, [])
    with pytest.raises(RecordError) as caught:
        encode_row("sft", RESPONSE | {"label": False})
    assert (caught.value.reason, str(caught.value)) == (
        "undesirable response",
        "label: the response is labelled as bad, and sft imitates responses",
    )


COMPARING = [name for name, algorithm in ALGORITHMS.items() if algorithm().needs.responses == "both"]


@pytest.mark.parametrize("algorithm", COMPARING)
@pytest.mark.parametrize("label", [None, True, False])
def test_what_compares_two_responses_drops_single_ones(encode_row: Encode, algorithm: str, label: bool | None) -> None:
    assert encode_row(algorithm, PAIR).rejected_ids == A_CAT
    with pytest.raises(RecordError) as caught:
        encode_row(algorithm, RESPONSE | {"label": label})
    assert (caught.value.reason, caught.value.field) == ("missing field", "rejected_response")
    assert str(caught.value) == (
        "rejected_response: the record has one response only, and this algorithm compares a chosen with a rejected one; "
        "add the column, or train with sft (or kto, with a label)"
    )


def test_dpo_and_its_kin_compare_and_kto_and_sft_do_not() -> None:
    assert COMPARING == ["dpo", "mdpo", "rm", "cpo", "orpo", "simpo"]


def test_data_read_by_another_plugin_are_other_data(model_folder: Callable[..., Path]) -> None:
    spec = EncoderSpec(str(model_folder("llava")), responses="both")

    def key(*texts: str) -> str:
        plugins = tuple(Plugin("/anywhere/my_format.py", text) for text in texts)
        return cache_key(Sources((), None, False, plugins), spec, DataConfig())

    assert key("FORMATS = (1,)") == key("FORMATS = (1,)")
    assert len({key(), key("FORMATS = (1,)"), key("FORMATS = (2,)")}) == 3
