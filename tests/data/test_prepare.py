"""What an encoded data set is kept under (Ray's part of the preparation: tests/integration)."""

from collections.abc import Callable
from pathlib import Path

from rayalign.config.plugins import Plugin
from rayalign.config.sections import DataConfig
from rayalign.data.encoder_spec import EncoderSpec
from rayalign.data.prepare import cache_key
from rayalign.data.rows import Sources


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
