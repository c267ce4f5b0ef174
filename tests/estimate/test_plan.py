"""What planning tells offline: models by their configs alone, lengths by characters, GPUs, hours and cost."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor

from rayalign import main
from rayalign.algorithms import ALGORITHMS
from rayalign.config import command_line
from rayalign.config.config import Config
from rayalign.config.plan import PlanConfig
from rayalign.config.sections import ClusterConfig, DataConfig, ModelConfig, OptimizerConfig, RunConfig, TunerConfig
from rayalign.estimate import advice
from rayalign.estimate.architecture import Blueprint
from rayalign.estimate.catalogue import shipped_configs
from rayalign.estimate.lengths import ImageLook, estimated, estimated_tokens, measured
from rayalign.estimate.memory import GB, Memory, MicroBatch
from rayalign.estimate.plan import estimate_run, plan_run
from rayalign.estimate.shapes import DataShapes, PairShape
from rayalign.estimate.vision import ImageLoad, VisionCosts
from rayalign.models.source import ModelSource
from tests.tiny_models import noise_image

if TYPE_CHECKING:
    from rayalign.data.store import EncodedPair, PreparedData

LLAVA, INTERNVL, QWEN = "llava1_6-mistral-7b-instruct", "internvl2-2b", "qwen2_5-vl-7b-instruct"
DPO = ALGORITHMS["dpo"]()


def blueprint_of(name: str, **tuner: Any) -> Blueprint:
    folder = str(shipped_configs()[name])
    return Blueprint(AutoConfig.from_pretrained(folder), ModelSource(folder), ModelConfig(), TunerConfig(**tuner), DPO.needs)


def write_pairs(folder: Path, *, answer: str = "A cat." * 20) -> str:
    """Three pairs with an image of 640 x 480 each, and one without."""
    Image.new("RGB", (640, 480), "red").save(folder / "red.png")
    row = {"query": "What is it?", "response": answer, "rejected_response": "A dog." * 10}
    rows = [{**row, "images": ["red.png"]}] * 3 + [row]
    (folder / "prefs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
    return str(folder / "prefs.jsonl")


@pytest.mark.parametrize(
    ("name", "vision", "aligner", "embeddings", "language", "head"),
    [
        (LLAVA, 303_507_456, 20_983_808, 131_334_144, 6_979_588_096, 131_334_144),  # 7,566,747,648 in all
        (INTERNVL, 304_012_288, 12_595_200, 189_548_544, 1_510_049_792, 189_548_544),  # 2,205,754,368
        (QWEN, 631_975_680, 44_574_464, 544_997_376, 6_525_621_760, 544_997_376),  # 8,292,166,656
    ],
)
def test_models_of_shipped_configs_have_the_published_sizes(
    name: str, vision: int, aligner: int, embeddings: int, language: int, head: int
):
    assert list(blueprint_of(name).build().sizes.values()) == [vision, aligner, embeddings, language, head]


@pytest.mark.parametrize(("modules", "learning"), [("DEFAULT", 4_718_592), ("ALL", 20_971_520)])
def test_adapters_of_the_shipped_llava_have_as_many_weights_as_its_layers_say(modules: str, learning: int):
    # 32 layers of rank 8: q 8 x (4096 + 4096), k and v 8 x (4096 + 1024) each; ALL: o as q, and three of 8 x (4096 + 14336).
    skeleton = blueprint_of(LLAVA, lora_target_modules=(modules,)).build()
    assert sum(p.numel() for p in skeleton.trainable) == learning


@pytest.mark.parametrize(
    ("name", "size", "tokens", "patches"),
    [
        (LLAVA, (640, 480), 576 + 36 * 49, 5 * 577),  # 36 rows of 48 and a newline; four tiles and a thumbnail
        (LLAVA, (300, 300), 576 + 24 * 25, 3 * 577),  # two tiles, one of them padding
        (INTERNVL, (640, 480), 13 * 256, 13 * 1025),  # 4 x 3 tiles and a thumbnail
        (INTERNVL, (448, 448), 256, 1025),
        (QWEN, (640, 480), 17 * 23, 34 * 46),
    ],
)
def test_images_cost_what_the_processors_rules_make_of_their_size(name: str, size: tuple[int, int], tokens: int, patches: int):
    load = look_of(name)(noise_image(*size))
    assert (load.features, load.patches) == (tokens, patches)


def look_of(name: str) -> ImageLook:
    blueprint = blueprint_of(name)
    processor: Any = AutoImageProcessor.from_pretrained(blueprint.source.base)
    return ImageLook(
        lambda image: processor([image], return_tensors="pt"),
        blueprint.family,
        blueprint.config,
        VisionCosts(blueprint.build(), blueprint.config),
        max_pixels=None,
    )


def test_a_dry_run_tells_everything_offline_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = f"--model_type {INTERNVL} --lora_target_modules ALL --dry_run --max_length 4096 --output_dir {tmp_path}/out"
    words += f" --dataset {write_pairs(tmp_path)}"
    main.run(command_line.parse(ALGORITHMS, words.split(), prog="pipelines/rm.py", description="", algorithm="rm"))
    told = capsys.readouterr().out
    for line in (
        "Plan: RM of internvl2-2b (config that comes with rayalign; the model's files are not at hand)",
        "  vision tower                304.01 M  frozen",
        "  language model            1,510.05 M  frozen, with adapters",
        "  output head                 189.55 M  frozen; a value head is trained beside it",
        "  total                     2,205.75 M",
        "  trained in this run           8.65 M  0.39%; LoRA of rank 8 on ALL of: language model",
        "  LoRA DEFAULT would train      1.97 M",
        "Tokens per pair (4 pairs, 0 of them held out)",
        "    of it images                    2,496   3,328  3,328  3,328",
        "  strategy: ddp, one GPU per worker (6.84 of 80 GB used)",
        "  40% of the GPUs' peak is reached (--mfu), data and checkpoints never wait;",
    ):
        assert line in told.splitlines()
    assert not (tmp_path / "out").exists()


def test_a_gpu_that_is_too_small_is_answered_with_what_would_fit(tmp_path: Path):
    config = Config(
        DPO,
        data=DataConfig(dataset=(write_pairs(tmp_path),), max_length=4096),
        model=ModelConfig(model_type=LLAVA, gradient_checkpointing=False),
    )
    told = plan_run(config, PlanConfig(gpu_memory_gb=20, gpu_tflops=30, price_per_hour=2.0)).splitlines()
    start = told.index("On GPUs of 20 GB, 30 TFLOPS")
    assert told[start + 1 : start + 4] == [
        "  a worker needs 29.59 GB, more than one GPU has",
        "  strategy: device_map, 2 GPUs per worker (--gpus_per_worker 2); they take turns",
        "  it would fit one GPU with --gradient_checkpointing true (17.64 GB)",
    ]
    assert told[-6] == "  time: 0.5 min on 2 GPUs, 1 at work at a time; 0.03 at 2 per GPU and hour"


def test_a_model_that_nothing_is_known_of_is_named():
    config = Config(DPO, data=DataConfig(dataset=("x",)), model=ModelConfig(model="some/model"))
    with pytest.raises(ValueError) as error:
        plan_run(config)
    told = str(error.value)
    assert told.startswith("--model some/model: there is no such folder here and no such model in ")
    assert told.endswith(
        "(A plan needs no files of internvl2-2b, llava1_6-mistral-7b-instruct, qwen2_5-vl-7b-instruct, whose configs come with "
        "rayalign.)"
    )


def test_a_plan_without_data_is_refused():
    with pytest.raises(ValueError, match="No data given: pass --dataset"):
        plan_run(Config(DPO, model=ModelConfig(model_type=LLAVA)))


def test_tokens_are_estimated_by_characters():
    assert estimated_tokens("two cats") == 2
    assert estimated_tokens("猫が二匹") == 4


def estimate(folder: Path, lines: Sequence[dict[str, Any]], **data: Any) -> Any:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return estimated(Config(DPO, data=DataConfig(dataset=(str(path),), dataset_test_ratio=0.0, **data)), None)


PAIR = {"query": "q" * 40, "response": "c" * 40, "rejected_response": "r" * 80}
"""10, 10 and 20 tokens; with what templates add 16, 11 and 21."""


def test_records_that_can_not_be_used_are_left_out_and_counted(tmp_path: Path):
    found = estimate(
        tmp_path, [PAIR, {"query": "q", "response": "no other"}, PAIR, {**PAIR, "query": "q" * 400}], max_length=50
    )
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in found.pairs] == [(16, 11, 21)] * 2
    assert found.total == 2
    assert found.origin.endswith("; 1 of 4 left out as unusable; 1 of 4 left out as too long")


OLD_ROUNDS = {**PAIR, "history": [["a" * 40, "b" * 40], ["d" * 80, "e" * 80]]}
"""Two older rounds of 16 + 16 and 26 + 26 tokens."""


@pytest.mark.parametrize(
    ("strategy", "record", "max_length", "lengths"),
    [
        ("left", OLD_ROUNDS, 121, (100, 11, 21)),
        ("left", OLD_ROUNDS, 120, (68, 11, 21)),  # without the oldest round
        ("left", OLD_ROUNDS, 88, (16, 11, 21)),  # without both
        ("right", PAIR, 30, (16, 11, 14)),
    ],
)
def test_records_that_are_too_long_are_cut_as_in_the_run(
    tmp_path: Path, strategy: str, record: dict[str, Any], max_length: int, lengths: tuple[int, int, int]
):
    (pair,) = estimate(tmp_path, [record], max_length=max_length, truncation_strategy=strategy).pairs
    assert (pair.prompt, pair.chosen, pair.rejected) == lengths


@pytest.mark.parametrize("strategy", ["delete", "left", "raise"])
def test_a_record_of_one_round_is_left_out_where_the_run_would_not_cut_it(tmp_path: Path, strategy: str):
    found = estimate(tmp_path, [PAIR, {**PAIR, "query": "q" * 400}], max_length=50, truncation_strategy=strategy)
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in found.pairs] == [(16, 11, 21)]
    assert found.origin.endswith("; 1 of 2 left out as too long")


def test_a_data_set_without_a_usable_record_is_refused(tmp_path: Path):
    with pytest.raises(ValueError) as error:
        estimate(tmp_path, [PAIR], max_length=20)
    assert str(error.value) == (
        f"--dataset {tmp_path}/rows.jsonl: none of the records looked at can be used (0 are unusable, 1 longer than "
        "--max_length 20)."
    )


def test_a_data_set_of_its_own_is_evaluated_and_nothing_held_out(tmp_path: Path):
    found = estimate(tmp_path, [PAIR] * 3, val_dataset=(f"{tmp_path}/rows.jsonl#2",))
    assert (found.total, found.held_out, found.evaluated) == (3, 0, 2)


def test_a_config_without_image_settings_is_told_what_lacks(tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_bytes((shipped_configs()[INTERNVL] / "config.json").read_bytes())
    config = Config(
        DPO,
        data=DataConfig(dataset=(write_pairs(tmp_path),), max_length=4096),
        model=ModelConfig(model=f"{tmp_path}/model/config.json"),
    )
    with pytest.raises(ValueError) as error:
        plan_run(config)
    assert str(error.value) == (
        f"{tmp_path}/model: has no preprocessor_config.json, which says how many tokens an image becomes. Put the "
        "model's beside its config.json."
    )


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        (LLAVA, (1, 8000), "image too long (images: a picture of 1 x 8000 pixels would be resized to 336 x 2688000; crop it)"),
        (QWEN, (1, 250), "unusable record (ValueError: absolute aspect ratio must be smaller than 200, got 250.0)"),
    ],
)
def test_a_picture_that_no_processor_takes_is_left_out_of_a_plan_as_of_a_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, size: tuple[int, int], words: str
):
    file = write_pairs(tmp_path)
    (tmp_path / "thin.png").write_bytes(noise_image(*size))
    with Path(file).open("a") as rows:
        rows.write(json.dumps({**PAIR, "images": ["thin.png"]}) + "\n")
    config = Config(DPO, data=DataConfig(dataset=(file,), dataset_test_ratio=0), model=ModelConfig(model_type=name))
    found = estimate_run(config).data
    assert (found.total, found.origin.partition("rules; ")[2]) == (4, "1 of 5 left out as unusable")
    (said,) = (line for line in caplog.messages if line.startswith("A record"))
    assert said == f"A record that can't be used: prefs.jsonl, row 4: {words}"


def test_pictures_that_are_too_many_pixels_together_are_left_out_of_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = write_pairs(tmp_path)
    with Path(file).open("a") as rows:
        rows.write(json.dumps({**PAIR, "images": ["red.png", "red.png"]}) + "\n")
    monkeypatch.setattr("rayalign.images.fetch.MAX_RECORD_PIXELS", 500_000)
    found = estimated(Config(DPO, data=DataConfig(dataset=(file,))), look_of(LLAVA))
    assert found.origin.endswith("; 1 of 5 left out as unusable")


def test_a_data_set_without_records_has_no_plan(tmp_path: Path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match="holds no records"):
        estimate(tmp_path, [])
    with pytest.raises(ValueError) as error:
        estimated(Config(DPO, data=DataConfig(dataset=(write_pairs(tmp_path), f"{tmp_path}/empty.jsonl"))), None)
    assert str(error.value) == f"Dataset '{tmp_path}/empty.jsonl' holds no records. Name another, or leave it out."


def test_more_records_are_asked_for_than_there_are(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(PAIR))
    with pytest.raises(ValueError) as error:
        estimated(Config(DPO, data=DataConfig(dataset=(f"{tmp_path}/rows.jsonl#5",))), None)
    assert str(error.value) == f"--dataset {tmp_path}/rows.jsonl#5: 5 records are asked for, and there are 1."


def test_lengths_of_encoded_records_are_exact_and_the_longest_is_always_looked_at(
    prepare_pairs: "Callable[[Sequence[EncodedPair]], PreparedData]",
):
    from rayalign.data.store import EncodedPair

    rows = [EncodedPair(str(i), [7] * i + [1], [1] * 3, [1] * (9 if i == 2 else 2), [], []) for i in range(5)]
    found = measured(prepare_pairs(rows), 1, image_token_id=7, look=None, looked_at=2)
    assert [(p.prompt, p.chosen, p.rejected, p.image_tokens) for p in found.pairs] == [(1, 3, 2, 0), (3, 3, 9, 2), (5, 3, 2, 4)]
    assert (found.total, found.held_out) == (5, 1)
    assert found.origin == "encoded with the model's own processor; 3 of them looked at, among these the longest"


def memory_by(square: float) -> Callable[[MicroBatch], Memory]:
    """10 GB, and `square` GB for a million squared tokens."""
    return lambda batch: Memory(10 * GB, 0, 0, 0, 0, round(square * GB * batch.shape().tokens ** 2 / 1e6), 0)


@pytest.mark.parametrize(("gpu", "longest"), [(80, 8045), (24, 3380), (12.4, 617), (11, 0)])
def test_the_longest_row_nearly_fills_the_gpu(gpu: float, longest: int):
    """The literals solve 1.05 (10 + t^2) + 1.5 = gpu, with t in thousands."""
    pair = PairShape(800, 100, 100)
    found = advice.longest_row(memory_by(1.0), MicroBatch(1, pair, pair), int(gpu * GB))
    assert 0.95 * longest <= found <= longest


@pytest.mark.parametrize(("gpu", "number"), [(15, 1), (11.9, 2), (5, 4), (1.6, None)])
def test_a_worker_gets_the_fewest_gpus_that_hold_its_model(gpu: float, number: int | None):
    assert advice.gpus_per_worker(Memory(10 * GB, 0, 0, 0, 0, 0, 0), int(gpu * GB)) == number


def test_hours_and_cost_follow_from_operations():
    config = dataclasses.replace(Config(DPO), optimizer=OptimizerConfig(num_train_epochs=2, batch_size=2))
    schedule = advice.schedule_of(config, DataShapes((), 1000, 40, 40, ""))
    assert (schedule.steps, schedule.epochs, schedule.trained, schedule.evaluated) == (60, 2, 1920, 120)
    plan = PlanConfig(gpu_tflops=100, mfu=0.5, gpus=4, price_per_hour=3.0)
    time = advice.time_of(config, plan, flops=3.6e17, per_worker=2)
    assert (time.gpus, time.busy, time.hours, time.cost) == (4, 2, 1.0, 12.0)


WITH_PICTURE = PairShape(10, 5, 5, 4, (ImageLoad(4, 1, 1, 1.0, 1.0),))


@pytest.mark.parametrize(
    ("held_out", "pairs", "flags", "evaluated"),
    [
        (40, (), {}, 3 * 40),  # before the first step, at step 50 and at the end, step 60
        (40, (), {"eval_on_start": False}, 2 * 40),
        (20_000, (), {}, 3 * 1000),  # what --max_eval_records draws, each time
        (20_000, (), {"max_eval_records": 500, "eval_steps": 10}, 7 * 500),
        (20_000, (WITH_PICTURE,), {}, 4 * 1000),  # at the end on the pictures of others, too
        (40, (WITH_PICTURE, PairShape(10, 5, 5)), {}, 3 * 40 + 20),  # those that have some
    ],
)
def test_a_plan_counts_the_pairs_that_the_run_evaluates(
    held_out: int, pairs: tuple[PairShape, ...], flags: dict[str, Any], evaluated: int
):
    config = Config(DPO, optimizer=OptimizerConfig(num_train_epochs=2, batch_size=2), run=RunConfig(**flags))
    assert advice.schedule_of(config, DataShapes(pairs, 960, 0, held_out, "")).evaluated == evaluated


@pytest.mark.parametrize(
    ("flags", "per_worker", "message"),
    [
        ({}, 2, "--gpus 1: a worker needs 2 of 24 GB for its model. Pass --gpus 2 or more, or leave it out."),
        (
            {"strategy": "fsdp", "num_workers": 8},
            1,
            "--gpus 1: the model is sharded over 8 workers of a GPU each. Pass --gpus 8 or more, or leave it out.",
        ),
        (
            {"strategy": "fsdp", "num_workers": 8, "shard_group_size": 4},
            1,
            "--gpus 1: the model is sharded over 4 workers of a GPU each. Pass --gpus 4 or more, or leave it out.",
        ),
    ],
)
def test_fewer_gpus_than_a_model_needs_have_no_hours(flags: dict[str, Any], per_worker: int, message: str):
    config = Config(DPO, cluster=ClusterConfig(**flags))
    with pytest.raises(ValueError) as error:
        advice.time_of(config, PlanConfig(gpus=1, gpu_memory_gb=24), flops=1e15, per_worker=per_worker)
    assert str(error.value) == message
    assert advice.time_of(Config(DPO), PlanConfig(gpus=1), flops=1e15, per_worker=1).gpus == 1


def test_flags_of_the_plan_belong_to_its_pipeline(capsys: pytest.CaptureFixture[str]):
    config, plan = command_line.parse_plan(
        ALGORITHMS, ["--gpu_memory_gb", "24", "--rlhf_type", "rm"], prog="pipelines/plan.py", description=""
    )
    assert (config.algorithm.name, plan.gpu_memory_gb) == ("rm", 24)
    with pytest.raises(SystemExit):
        command_line.parse(ALGORITHMS, ["--mfu", "0.5"], prog="pipelines/dpo.py", description="", algorithm="dpo")
    assert capsys.readouterr().err.startswith(
        "pipelines/dpo.py: error: --mfu belongs to pipelines/plan.py, not pipelines/dpo.py."
    )


def test_training_itself_never_sees_a_dry_run():
    from rayalign.training import driver

    with pytest.raises(AssertionError):
        driver.run(Config(DPO, run=RunConfig(dry_run=True)))
