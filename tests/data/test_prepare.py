"""What an encoded data set is kept under (Ray's part of the preparation: tests/integration)."""

from collections.abc import Callable
from pathlib import Path

import pytest

from rayalign.algorithms.dpo import DPO
from rayalign.config.config import Config
from rayalign.config.plugins import Plugin
from rayalign.config.sections import DataConfig, ModelConfig, RunConfig
from rayalign.data import prepare
from rayalign.data.encoder_spec import EncoderSpec
from rayalign.data.prepare import cache_key
from rayalign.data.rows import Sources
from rayalign.data.store import PreparedData
from rayalign.storage import Store


def test_data_read_by_another_plugin_are_other_data(model_folder: Callable[..., Path]) -> None:
    spec = EncoderSpec(str(model_folder("llava")), responses="both")

    def key(*texts: str) -> str:
        plugins = tuple(Plugin("/anywhere/my_format.py", text) for text in texts)
        return cache_key(Sources((), None, False, plugins), spec, DataConfig())

    assert key("FORMATS = (1,)") == key("FORMATS = (1,)")
    assert len({key(), key("FORMATS = (1,)"), key("FORMATS = (2,)")}) == 3


def test_renamed_columns_are_other_data_and_none_are_the_data_of_before(model_folder: Callable[..., Path]) -> None:
    spec = EncoderSpec(str(model_folder("llava")), responses="both")

    def key(*columns: tuple[str, str]) -> str:
        return cache_key(Sources((), None, False, (), columns), spec, DataConfig())

    assert key() == cache_key(Sources((), None, False), spec, DataConfig())
    assert key(("a", "images"), ("b", "query")) == key(("b", "query"), ("a", "images"))
    assert len({key(), key(("a", "images")), key(("a", "image")), key(("b", "images"))}) == 4


@pytest.mark.parametrize(("num_rows", "val_dataset", "said"), [(40, (), True), (40, ("b.jsonl",), False), (60, (), False)])
def test_a_run_that_holds_nothing_out_says_so(
    model_folder: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    num_rows: int,
    val_dataset: tuple[str, ...],
    said: bool,
) -> None:
    data = PreparedData(Store("/nowhere"), "attempt", num_rows)
    monkeypatch.setattr(prepare, "prepare", lambda *_: data)  # which would need a cluster
    flags = DataConfig(dataset=("a.jsonl",), val_dataset=val_dataset)
    prepare.prepare_run(
        Config(DPO(), model=ModelConfig(model=str(model_folder("llava"))), data=flags, run=RunConfig(output_dir="out"))
    )
    words = [record.getMessage() for record in caplog.records if "held out" in record.getMessage()]
    assert words == (
        [
            "Data: nothing is held out, so that nothing is evaluated: 0.01 of 40 records is less than one. Pass --val_dataset, "
            "or a larger --dataset_test_ratio such as 0.1."
        ]
        if said
        else []
    )
