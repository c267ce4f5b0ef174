"""Which models ask for GPUs by themselves."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rayalign.models.size import MOST_ON_CPUS, reason_for_gpus


def make_weights(folder: Path, gigabytes: dict[str, float], **settings: str) -> str:
    """A folder with files of these sizes, which take no room on the disk."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llava", **settings}))
    for name, size in gigabytes.items():
        with (folder / name).open("wb") as file:
            file.truncate(int(size * 1e9))
    return str(folder)


@pytest.mark.parametrize(
    ("gigabytes", "settings", "billions"),
    [
        ({"model.safetensors": 0.9}, {}, None),
        ({"model.safetensors": 1.9}, {"dtype": "bfloat16"}, None),
        ({"model.safetensors": 2.0}, {"dtype": "bfloat16"}, "1.0"),
        ({"model.safetensors": 3.9}, {"torch_dtype": "float32"}, None),
        ({"model.safetensors": 4.0}, {"torch_dtype": "float32"}, "1.0"),
        ({"a.safetensors": 5.0, "b.safetensors": 9.0, "c.bin": 14.0, "d.bin": 14.0}, {}, "7.0"),
        ({"pytorch_model.bin": 14.0, "model.bin.index.json": 0.001}, {}, "7.0"),
    ],
)
def test_a_folder_of_a_billion_parameters_asks_for_gpus(
    tmp_path: Path, gigabytes: dict[str, float], settings: dict[str, str], billions: str | None
) -> None:
    model = make_weights(tmp_path, gigabytes, **settings)
    reason = f"{model} has about {billions} billion parameters" if billions else None
    assert reason_for_gpus(model, trust_remote_code=False) == reason


def test_a_remote_model_is_judged_by_its_listing(bucket: Path, reads: list[str]) -> None:
    make_weights(bucket / "large", {"model.safetensors": 14.0})
    assert reason_for_gpus("s3://bucket/large", trust_remote_code=False) == (
        "s3://bucket/large has about 7.0 billion parameters"
    )
    assert [Path(file).name for file in reads] == ["config.json"]


def test_a_model_of_the_hub_is_judged_by_its_config(model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder's name without a slash, below the working folder, is as good as a hub id to transformers."""
    folder = model_folder("llava")
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr("rayalign.models.size._file_sizes", lambda model: None)
    assert reason_for_gpus(folder.name, trust_remote_code=False) is None
    monkeypatch.setattr("rayalign.models.size.MOST_ON_CPUS", 1000)
    assert reason_for_gpus(folder.name, trust_remote_code=False) == f"{folder.name} has about 0.0 billion parameters"
    assert MOST_ON_CPUS == 1e9
