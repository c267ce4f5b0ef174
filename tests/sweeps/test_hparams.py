"""What TensorBoard's HParams page reads of a sweep."""

from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

from rayalign.storage import Store
from rayalign.sweeps.hparams import write_hparams
from rayalign.sweeps.trials import Outcome, Trial


def flags_in(file: Path) -> tuple[dict[str, object], list[str]]:
    """The flags of the session and the metrics of the experiment that an event file tells."""
    content, place = file.read_bytes(), 0
    flags: dict[str, object] = {}
    metrics: list[str] = []
    while place < len(content):
        size = int.from_bytes(content[place : place + 8], "little")
        for value in Event.FromString(content[place + 12 : place + 12 + size]).summary.value:
            data = HParamsPluginData.FromString(value.metadata.plugin_data.content)
            metrics += [info.name.tag for info in data.experiment.metric_infos]
            for name, flag in data.session_start_info.hparams.items():
                flags[name] = getattr(flag, flag.WhichOneof("kind"))
        place += size + 16
    return flags, metrics


def test_a_trials_flags_lie_beside_its_curves_and_are_written_once(tmp_path: Path):
    trial = Trial(1, {"beta": 0.1, "loss_type": "ipo", "lora_target_modules": ["q", "v"]}, seed=43)
    outcomes = [Outcome(trial, "finished"), Outcome(Trial(2, {"beta": 0.2}), "unfinished")]
    for _ in range(2):
        write_hparams(Store.at(str(tmp_path)), outcomes, "eval_rewards/accuracies")
    (file,) = tmp_path.rglob("*.hparams")
    assert file.parent == tmp_path / "trials" / trial.name / "tensorboard"
    flags, metrics = flags_in(file)
    assert flags == {"beta": 0.1, "loss_type": "ipo", "lora_target_modules": "q+v", "seed": 43.0}
    assert metrics == ["eval/rewards/accuracies"]


def test_a_store_that_fails_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "trials").write_text("no folder")
    write_hparams(Store.at(str(tmp_path)), [Outcome(Trial(1, {"beta": 0.1}), "finished")], "eval_m")
    assert "TensorBoard gets no flags of Trial 1 (beta=0.1)" in caplog.text
