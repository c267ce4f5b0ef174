"""Log-probabilities under the reference as data: the same numbers as on the fly, in their rows, under a key of what they depend
on, and none computed twice."""

import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers

from rayalign.algorithms import ALGORITHMS, DPO, KTO, MDPO, Algorithm
from rayalign.config.config import Config, config_from_mapping
from rayalign.config.sections import DataConfig, ModelConfig, OptimizerConfig, TunerConfig
from rayalign.data.attempts import MOST_LOST
from rayalign.data.batch import PairBatch
from rayalign.data.companions import Companion, Damaged
from rayalign.data.encoder_spec import EncoderSpec
from rayalign.data.prepare import RunData, cache_key
from rayalign.data.reference_store import SHARD_ROWS, ReferenceLogps, missing_shards, shard_name, write_reference_shard
from rayalign.data.rows import Sources
from rayalign.data.sampler import SamplerSettings, StepSampler, fetch_chunk, partners_in
from rayalign.data.store import EncodedPair, PreparedData, from_batch
from rayalign.data.stream import batch_maker, evaluated_rows, sampler_of
from rayalign.models.source import ModelSource
from rayalign.policy.policy import Policy
from rayalign.policy.saving import save_policy
from rayalign.reference.key import ReferenceKey, check_reference, reference_key
from rayalign.reference.precompute import ShardScorer, is_wanted, needed_rows
from rayalign.sources.files import resolve_dataset
from rayalign.storage import Store
from rayalign.training.held_out import HeldOut
from rayalign.training.loop import Trainer
from tests.tiny_data import write_rows
from tests.tiny_models import counts_of, encode_pair, make_batch, make_policy, noise_image, wake_adapters

# float32 sums of about ten terms, whose rows stand in batches of another size and order.
ROUNDING = {"atol": 1e-4, "rtol": 1e-5}
FULL = TunerConfig(sft_type="full")
REFERENCE = "reference_test"

Prepare = Callable[[Sequence[EncodedPair]], PreparedData]
TEXTS = (
    ("Which digit is it?", "The digit is two.", "a cat"),
    ("two?", "A cat sits on the mat.", "yes"),
    ("describe the image.", "It", "The digit is two, the cat sits."),
    ("Is it a cat on the mat?", "no", "A cat, it is on the mat."),
    ("it", "a", "The digit is not a cat on a mat, the digit is two."),
)


def pairs_of(folder: Path, algorithm: Algorithm) -> list[EncodedPair]:
    """Five pairs of different lengths with 0 to 2 images; for KTO two of them with a single response."""
    red, blue = noise_image(40, 30, seed=1), noise_image(20, 60, seed=2)
    images = ((red,), (), (blue, red), (red,), ())
    pairs = [
        encode_pair(folder, f"pair {i}", *texts, images=own) for i, (texts, own) in enumerate(zip(TEXTS, images, strict=True))
    ]
    if algorithm.needs.responses == "either":
        pairs[1] = dataclasses.replace(pairs[1], rejected_ids=[])
        pairs[3] = dataclasses.replace(pairs[3], chosen_ids=[])
    return pairs


def config_of(algorithm: Algorithm, **flags: Any) -> Config:
    values = {"batch_size": 2, "gpus_per_worker": 0.0, "gradient_checkpointing": False, **flags}
    return config_from_mapping(type(algorithm), values)


def scorer_of(source: ModelSource, algorithm: Algorithm, records: PreparedData, **flags: Any) -> ShardScorer:
    data = RunData(source, EncoderSpec(source.base, responses=algorithm.needs.responses), records, None)
    config = config_of(algorithm, output_dir=str(Path(records.folder.location).parent / "run"), **flags)
    return ShardScorer(config, data, records, REFERENCE)


def scored(
    source: ModelSource, algorithm: Algorithm, prepare: Prepare, pairs: Sequence[EncodedPair], **flags: Any
) -> PreparedData:
    """Prepared pairs with the reference's log-probs, as the pass leaves them."""
    records = prepare(pairs)
    scorer = scorer_of(source, algorithm, records, **flags)
    for part in missing_shards(records.folder / REFERENCE, np.arange(records.num_rows)):
        scorer.write(part)
    return dataclasses.replace(records, reference=REFERENCE)


def batch_of(records: PreparedData, rows: Sequence[int], folder: Path, algorithm: Algorithm) -> PairBatch:
    """The batch of some rows, as a train worker makes it."""
    spec = EncoderSpec(str(folder), responses=algorithm.needs.responses)
    pairs, partners = (from_batch(records.reader().read(some)) for some in (rows, [*rows[1:], rows[0]]))
    return batch_maker(spec, algorithm.needs.companion)(pairs, partners)


def both_batches(batch: PairBatch) -> list[PairBatch]:
    return [batch, *([batch.companion.batch] if batch.companion else [])]


@pytest.mark.parametrize("start", ["adapters off", "an SFT adapter", "an SFT adapter below"])
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
@pytest.mark.parametrize("algorithm", [DPO(), KTO(), MDPO()], ids=lambda algorithm: algorithm.name)
def test_stored_log_probs_are_those_that_the_reference_would_have_in_the_step(
    model_folder: Callable[..., Path], prepare_pairs: Prepare, tmp_path: Path, algorithm: Algorithm, family: str, start: str
) -> None:
    folder = model_folder(family)
    source, flags = ModelSource(str(folder)), {}
    if start != "adapters off":
        save_policy(wake_adapters(make_policy(folder)), tmp_path / "sft")
        source = ModelSource(str(folder), str(tmp_path / "sft"))
        flags = {"stack_adapter": start.endswith("below")}
    records = scored(source, algorithm, prepare_pairs, pairs_of(folder, algorithm), **flags)
    batch = batch_of(records, [3, 0, 4, 2, 1], folder, algorithm)
    policy = wake_adapters(make_policy(source, tuner=TunerConfig(**flags), needs=algorithm.needs), seed=5)
    stored = 0
    for one in both_batches(batch):
        images = policy.image_features(one) or policy.image_features(batch)
        now = policy.reference_logps(dataclasses.replace(one, reference_logps=None), images)
        if algorithm.name == "kto" and one is not batch:
            assert one.reference_logps is None  # it depends on the epoch, and is computed on the fly
            continue
        assert one.reference_logps is not None
        found = policy.reference_logps(one, images)
        for side in ("chosen", "rejected"):
            for what in ("total", "shared", "tokens"):
                ours, expected = getattr(getattr(found, side), what), getattr(getattr(now, side), what)
                torch.testing.assert_close(ours, expected, **ROUNDING)
        trained = policy.logps(one, images)
        assert (trained.chosen.total - now.chosen.total).abs().max() > 1e-2  # the policy is somewhere else
        stored += 1
    assert stored == (2 if algorithm.name == "mdpo" else 1)


AT_START: dict[str, tuple[Algorithm, float]] = {
    "dpo": (DPO(rpo_alpha=0.0), math.log(2)),
    # Preference and anchor for each of five pairs, the conditional preference for the three that have images.
    "mdpo": (MDPO(), math.log(2) * (2 + 3 / 5)),
    "kto": (KTO(), 0.5),
}


@pytest.mark.parametrize("name", AT_START)
@pytest.mark.parametrize("parts", ["llm", "all parts"])
def test_full_fine_tuning_starts_with_rewards_of_zero_and_keeps_the_start_as_its_reference(
    model_folder: Callable[..., Path], prepare_pairs: Prepare, name: str, parts: str
) -> None:
    folder = model_folder("llava")
    algorithm, loss = AT_START[name]
    frozen = {f"freeze_{part}": parts == "llm" for part in ("vit", "aligner")}
    tuner = TunerConfig(sft_type="full", **frozen)
    pairs = pairs_of(folder, algorithm)
    records = scored(ModelSource(str(folder)), algorithm, prepare_pairs, pairs, sft_type="full", **frozen)
    policy = make_policy(folder, tuner=tuner, needs=algorithm.needs)
    trainer = Trainer(policy, algorithm, OptimizerConfig(learning_rate=1e-2, warmup_ratio=0), num_steps=4)

    def batches() -> list[PairBatch]:
        return [batch_of(records, rows, folder, algorithm) for rows in ([0, 1, 2], [3, 4])]

    metrics, by_pair = trainer.evaluate(batches, counts_of(pairs))
    assert metrics["loss"] == pytest.approx(loss, rel=1e-4)
    rewards = [
        value for values in by_pair.values() for key, value in values.items() if key in ("rewards/chosen", "rewards/rejected")
    ]
    assert max(map(abs, rewards)) < ROUNDING["atol"]
    for step in range(2):
        trainer.step(step, batches(), counts_of(pairs))
    fresh = make_policy(folder)
    with torch.no_grad():
        for batch in batches():
            for one in both_batches(batch):
                images = fresh.image_features(one) or fresh.image_features(batch)
                expected = fresh.logps(one, images)
                found = policy.reference_logps(one, policy.image_features(one) or policy.image_features(batch))
                trained = policy.logps(one, policy.image_features(one) or policy.image_features(batch))
                torch.testing.assert_close(found.chosen.total, expected.chosen.total, **ROUNDING)
                torch.testing.assert_close(found.rejected.total, expected.rejected.total, **ROUNDING)
                assert (trained.chosen.total - expected.chosen.total).abs().max() > 0.1
    after, _ = trainer.evaluate(batches, counts_of(pairs))
    assert after["loss"] < metrics["loss"]


@pytest.mark.parametrize(("algorithm", "copies"), [(DPO(), 0), (MDPO(), 0), (KTO(), 1)], ids=["dpo", "mdpo", "kto"])
def test_only_mismatched_rows_take_a_copy_of_what_is_trained(
    model_folder: Callable[..., Path], prepare_pairs: Prepare, algorithm: Algorithm, copies: int
) -> None:
    folder = model_folder("llava")
    whole = make_policy(folder, tuner=FULL)
    one, trained = (sum(p.numel() for p in some) for some in (whole.model.parameters(), whole.trainable.values()))

    def held_by(policy: Policy) -> int:
        found = {p.data_ptr(): p.numel() for some in (policy, policy.start) if some for p in some.model.parameters()}
        return sum(found.values())

    assert held_by(make_policy(folder, tuner=FULL, needs=algorithm.needs)) == one + copies * trained
    records = prepare_pairs(pairs_of(folder, algorithm))
    assert held_by(scorer_of(ModelSource(str(folder)), algorithm, records, sft_type="full")._policy) == one


def test_full_fine_tuning_without_stored_log_probs_is_our_mistake(model_folder: Callable[..., Path]) -> None:
    folder = model_folder("llava")
    policy = make_policy(folder, tuner=FULL, needs=DPO().needs)
    batch = make_batch(folder, pairs_of(folder, DPO()))
    with pytest.raises(AssertionError, match="the weights of the reference are gone"):
        policy.reference_logps(batch, policy.image_features(batch))


def test_numbers_stay_with_their_rows_across_parts_and_in_any_order(prepare_pairs: Prepare, model_folder: Any) -> None:
    pairs = many_pairs(2 * SHARD_ROWS + 5)
    records = dataclasses.replace(prepare_pairs(pairs), reference=REFERENCE)
    write_all(records, pairs)
    settings = SamplerSettings(8, 2, 2, num_epochs=2, max_steps=None, seed=3, held_out_ratio=0.1)
    sampler = StepSampler(records.token_counts(), settings)
    chunk = pa.table({"first": [0], "last": [sampler.num_steps]})
    found = [pair for rank in (0, 1) for pair in from_batch(fetch_chunk(chunk, data=records, settings=settings, rank=rank))]
    assert len(found) == 2 * len(sampler.rows)
    by_id = {pair.id: pair for pair in pairs}
    assert [pair.reference for pair in found] == [logps_like(by_id[pair.id]) for pair in found]
    assert from_batch(records.reader().read([])) == []


def test_log_probs_of_another_row_are_refused(prepare_pairs: Prepare) -> None:
    pairs = many_pairs(3)
    records = dataclasses.replace(prepare_pairs(pairs), reference=REFERENCE)
    write_reference_shard(records.folder / REFERENCE / shard_name(0), ["0", "2", "1"], [logps_like(pair) for pair in pairs])
    assert records.reader().read([0])["reference_chosen"].to_pylist() == [[0.0, -0.5]]
    with pytest.raises(AssertionError, match="holds the log-probs of 2 where 1 stands"):
        records.reader().read([1])


def test_log_probs_that_are_not_one_for_each_token_are_refused(model_folder: Callable[..., Path]) -> None:
    folder = model_folder("llava")
    pair = encode_pair(folder, "a", "two?", "yes", "a cat")
    short = dataclasses.replace(
        pair, reference=ReferenceLogps([0.0] * (len(pair.chosen_ids) - 1), [0.0] * len(pair.rejected_ids), [])
    )
    with pytest.raises(AssertionError, match=r"a has \(\d+, \d+\) reference log-probs for \(\d+, \d+\) tokens"):
        make_batch(folder, [short])
    with pytest.raises(AssertionError, match="b has no reference log-probs, and others have"):
        make_batch(folder, [dataclasses.replace(pair, reference=logps_like(pair)), dataclasses.replace(pair, id="b")])


def test_a_batch_moves_with_its_reference_log_probs(model_folder: Callable[..., Path]) -> None:
    folder = model_folder("llava")
    pairs = [dataclasses.replace(pair, reference=logps_like(pair)) for pair in pairs_of(folder, MDPO())]
    batch = make_batch(folder, pairs, needs=MDPO().needs)
    expected = [logps for pair in pairs for logps in (*logps_like(pair).chosen, *logps_like(pair).rejected)]
    assert batch.reference_logps is not None
    assert batch.reference_logps.tolist() == expected
    assert batch.reference_logps.dtype == torch.float32
    for one in both_batches(batch.to(torch.device("meta"))):
        assert one.reference_logps is not None
        assert one.reference_logps.device.type == "meta"
        assert one.reference_logps.shape == one.targets.shape


@pytest.mark.parametrize("tuner", [TunerConfig(), FULL], ids=["lora", "full"])
def test_a_policy_takes_the_numbers_that_a_batch_brings(model_folder: Callable[..., Path], tuner: TunerConfig) -> None:
    folder = model_folder("llava")
    pairs = [dataclasses.replace(pair, reference=logps_like(pair)) for pair in pairs_of(folder, DPO())]
    policy = make_policy(folder, tuner=tuner, needs=DPO().needs)
    batch = make_batch(folder, pairs)
    found = policy.reference_logps(batch, ())
    assert found.chosen.total.tolist() == [sum(logps_like(pair).chosen) for pair in pairs]
    assert found.rejected.total.tolist() == [sum(logps_like(pair).rejected) for pair in pairs]
    firsts = [min(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs]
    assert found.chosen.shared.tolist() == [sum(logps_like(p).chosen[:n]) for p, n in zip(pairs, firsts, strict=True)]


def test_a_pass_that_was_cut_short_goes_on_with_the_missing_parts(
    prepare_pairs: Prepare, model_folder: Callable[..., Path]
) -> None:
    folder = model_folder("llava")
    texts = (f"{i}?" for i in range(2 * SHARD_ROWS + 1))
    pairs = [encode_pair(folder, question, question, "yes", "a cat") for question in texts]
    records = prepare_pairs(pairs)
    store, every = records.folder / REFERENCE, np.arange(len(pairs))
    assert missing_shards(store, every) == [0, 1, 2]
    scorer = scorer_of(ModelSource(str(folder)), DPO(), records, batch_size=32)
    assert scorer(pa.table({"item": [1]})).to_pylist() == [{"rows": SHARD_ROWS, "stopped": None}]
    (store / f".{shard_name(2)}.1.partial").write_bytes(b"what a kill leaves behind")
    assert missing_shards(store, every) == [0, 2]
    assert missing_shards(store, np.array([SHARD_ROWS])) == []  # a run that needs these rows only
    assert scorer(pa.table({"item": [2]})).to_pylist() == [{"rows": 1, "stopped": None}]
    assert missing_shards(store, every) == [0]


def test_what_keeps_the_model_from_loading_ends_the_run_in_words(
    prepare_pairs: Prepare, model_folder: Callable[..., Path]
) -> None:
    folder = model_folder("llava")
    records = prepare_pairs(pairs_of(folder, DPO()))
    scorer = scorer_of(ModelSource(str(folder)), DPO(), records, lora_target_modules=("nowhere",))
    (outcome,) = scorer(pa.table({"item": [0]})).to_pylist()
    assert outcome["rows"] is None
    assert outcome["stopped"].startswith("--lora_target_modules nowhere matches no linear of the language model. Its linears:")


def test_processes_that_end_over_and_over_end_the_run_in_words(
    prepare_pairs: Prepare, model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_folder("llava")
    scorer = scorer_of(ModelSource(str(folder)), DPO(), prepare_pairs(pairs_of(folder, DPO())))

    def ends(shard: int) -> int:
        raise SystemExit

    monkeypatch.setattr(scorer, "write", ends)
    for _ in range(MOST_LOST):
        with pytest.raises(SystemExit):
            scorer(pa.table({"item": [0]}))
    (outcome,) = scorer(pa.table({"item": [0]})).to_pylist()
    assert outcome["stopped"].startswith("A process ended 5 times over the same records, and whichever it came to:")


@pytest.mark.parametrize(
    ("flags", "trained"),
    [
        ({"num_train_epochs": 1}, 36),
        ({"num_train_epochs": 3}, 36),
        ({"max_steps": 50}, 36),
        # The first two of nine steps take eight rows.
        ({"max_steps": 2}, 8),
    ],
)
@pytest.mark.parametrize(("at_most", "evaluated"), [(1000, 4), (2, 2)])
def test_rows_that_a_run_never_sees_are_not_needed(
    prepare_pairs: Prepare, model_folder: Callable[..., Path], flags: dict[str, Any], trained: int, at_most: int, evaluated: int
) -> None:
    config, data, sampler = run_of_40(DPO, prepare_pairs, model_folder, max_eval_records=at_most, **flags)
    rows, of_held_out_data = needed_rows(config, data, sampler)
    seen = [sampler.rows_of_step(step) for step in range(sampler.num_steps)]
    assert set(rows.tolist()) == {*np.concatenate(seen).tolist(), *evaluated_rows(config, data, sampler).tolist()}
    assert len(rows) == trained + evaluated
    assert len(of_held_out_data) == 0
    # Of a held-out data set of its own, what is evaluated; and all others are trained on.
    data = dataclasses.replace(data, held_out=data.training)
    assert len(needed_rows(config, data, sampler_of(config, data))[1]) == min(at_most, 40)


@pytest.mark.parametrize("has_held_out_data", [False, True])
@pytest.mark.parametrize("algorithm", [DPO, KTO])
def test_a_short_run_finds_the_log_probs_of_all_that_it_reads(
    prepare_pairs: Prepare, model_folder: Callable[..., Path], algorithm: type[Any], has_held_out_data: bool
) -> None:
    """KTO's partners, too: of the last row of the last step that is the first row of the next one."""
    config, data, sampler = run_of_40(algorithm, prepare_pairs, model_folder, max_steps=2, max_eval_records=2)
    if has_held_out_data:
        held_out = prepare_pairs(many_pairs(20))
        data = dataclasses.replace(data, held_out=dataclasses.replace(held_out, reference=data.training.reference))
        sampler = sampler_of(config, data)
    for records, rows in zip((data.training, data.held_out), needed_rows(config, data, sampler), strict=True):
        for row in rows.tolist():
            assert records is not None
            pair = many_pairs(40)[row]
            file = records.folder / str(records.reference) / shard_name(row)
            write_reference_shard(file, [pair.id], [logps_like(pair)])
    fetched = fetch_chunk(
        {"first": pa.array([0]), "last": pa.array([2])}, data=data.training, settings=sampler.settings, rank=0
    )
    assert fetched.num_rows == (16 if algorithm is KTO else 8)
    held = HeldOut(config, data, sampler, rank=0, num_workers=1)
    partners = [partners_in(held._order, held.rows)] if held._order is not None else []
    assert held.data.reader().read(np.concatenate([held.rows, *partners])).num_rows == (4 if algorithm is KTO else 2)


def run_of_40(
    algorithm: type[Any], prepare_pairs: Prepare, model_folder: Callable[..., Path], **flags: Any
) -> tuple[Config, RunData, StepSampler]:
    """A run on 40 pairs with a reference that has a file for each row; 4 pairs make a step, 4 of 40 are held out."""
    records = dataclasses.replace(prepare_pairs(many_pairs(40)), reference="reference_by_1")
    model = str(model_folder("llava"))
    values = {"batch_size": 2, "gradient_accumulation_steps": 2, "dataset_test_ratio": 0.1, **flags}
    config = config_from_mapping(algorithm, values)
    data = RunData(ModelSource(model), EncoderSpec(model, algorithm().needs.responses), records, None)
    return config, data, sampler_of(config, data)


@pytest.mark.parametrize(
    ("algorithm", "flags", "several_runs", "wanted"),
    [
        (DPO, {}, False, False),
        (DPO, {"num_train_epochs": 1.5}, False, True),
        (DPO, {"num_train_epochs": 2, "max_steps": 3}, False, False),
        (DPO, {}, True, True),
        (DPO, {"sft_type": "full"}, False, True),
        (KTO, {"sft_type": "full"}, False, True),
        (DPO, {"num_train_epochs": 2, "precompute_ref_log_probs": "false"}, True, False),
        (DPO, {"precompute_ref_log_probs": "true"}, False, True),
        (DPO, {"sft_type": "full", "reference_free": "true"}, True, False),
        (ALGORITHMS["sft"], {"sft_type": "full", "num_train_epochs": 3}, True, False),
    ],
)
def test_log_probs_are_stored_where_they_are_needed_or_used_again(
    prepare_pairs: Prepare,
    model_folder: Callable[..., Path],
    algorithm: type[Any],
    flags: dict[str, Any],
    several_runs: bool,
    wanted: bool,
) -> None:
    records = prepare_pairs(many_pairs(40))
    model = str(model_folder("llava"))
    config = config_from_mapping(algorithm, {"gradient_accumulation_steps": 8, "dataset_test_ratio": 0, **flags})
    sampler = sampler_of(config, RunData(ModelSource(model), EncoderSpec(model, "both"), records, None))
    assert sampler.steps_per_epoch == 5
    assert is_wanted(config, sampler, several_runs=several_runs) is wanted


def many_pairs(count: int) -> list[EncodedPair]:
    return [EncodedPair(str(i), [1], [2] * (2 + i % 3), [3] * (1 + i % 2), [], []) for i in range(count)]


def logps_like(pair: EncodedPair) -> ReferenceLogps:
    """Numbers that tell pair, side and place, exact in float32."""
    number = sum(map(ord, pair.id)) - ord("0")
    sides = (pair.chosen_ids, pair.rejected_ids, pair.chosen_ids if pair.images else [])
    return ReferenceLogps(*([number + side / 8 - place / 2 for place in range(len(ids))] for side, ids in enumerate(sides)))


def write_all(records: PreparedData, pairs: Sequence[EncodedPair]) -> None:
    for start in range(0, len(pairs), SHARD_ROWS):
        some = pairs[start : start + SHARD_ROWS]
        write_reference_shard(
            records.folder / REFERENCE / shard_name(start // SHARD_ROWS), [p.id for p in some], [logps_like(p) for p in some]
        )


@pytest.fixture
def weights(tmp_path: Path) -> ModelSource:
    """A model's and an adapter's folder, as far as a key looks at them."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder, names in (
        (base, ("config.json", "model.safetensors")),
        (adapter, ("adapter_config.json", "adapter_model.safetensors")),
    ):
        folder.mkdir()
        for name in names:
            (folder / name).write_text(name)
    return ModelSource(str(base), str(adapter))


def key_of(source: ModelSource, **changes: Any) -> ReferenceKey:
    values = {"model": ModelConfig(), "tuner": TunerConfig(), "dtype": "float32", "device": "cpu", "companion": None, **changes}
    return reference_key(source, **values)


QUANTISED = TunerConfig(quant_bits=4)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"dtype": "bfloat16"}),
        ({}, {"device": "cuda"}),
        ({}, {"companion": Damaged()}),
        ({}, {"model": ModelConfig(attn_implementation="eager")}),
        ({}, {"tuner": QUANTISED}),
        ({"tuner": QUANTISED}, {"tuner": dataclasses.replace(QUANTISED, bnb_4bit_quant_type="fp4")}),
        ({"tuner": QUANTISED}, {"tuner": dataclasses.replace(QUANTISED, bnb_4bit_use_double_quant=False)}),
        ({}, {"tuner": FULL}),
        ({"tuner": FULL}, {"tuner": dataclasses.replace(FULL, freeze_vit=False)}),
        ({"tuner": FULL}, {"tuner": dataclasses.replace(FULL, freeze_aligner=False)}),
    ],
    ids=lambda changes: " ".join(changes),
)
def test_every_setting_that_the_numbers_depend_on_changes_the_key(
    weights: ModelSource, before: dict[str, Any], after: dict[str, Any]
) -> None:
    assert key_of(weights, **after).folder_name != key_of(weights, **before).folder_name
    assert key_of(weights, **after).folder_name == key_of(weights, **after).folder_name


@pytest.mark.parametrize(("companion", "is_damaged"), [(None, False), (Damaged(), True)])
def test_the_key_is_spelt_as_it_was_so_that_log_probs_of_before_are_found(
    tmp_path: Path, companion: Companion | None, is_damaged: bool
) -> None:
    (tmp_path / "config.json").write_text("{}")
    key = key_of(ModelSource(str(tmp_path)), companion=companion)
    assert key.settings == {
        "version": 2,
        "transformers": transformers.__version__,
        "dtype": "float32",
        "device": "cpu",
        "attn_implementation": ModelConfig().attn_implementation,
        "quantisation": None,
        "frozen": None,
        "damaged": is_damaged,
    }
    assert (key.weights, key.adapter) == ({"config.json": hashlib.sha256(b"{}").hexdigest()}, {})


def test_another_companion_whose_rows_are_stored_has_a_key_of_its_own(weights: ModelSource) -> None:
    class Blurred(Damaged):
        name = "blurred"

    names = {key_of(weights, companion=companion).folder_name for companion in (None, Damaged(), Blurred())}
    assert len(names) == 3


def test_a_changed_record_template_or_pixel_budget_moves_the_encoded_data_and_the_log_probs_beside_it(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder("llava"), folder)
    file = write_rows(tmp_path / "data", 3)

    def place(**settings: Any) -> str:
        sources = Sources((resolve_dataset(str(file)),), None, False)
        records = PreparedData(
            Store("/cache") / cache_key(sources, EncoderSpec(str(folder), "both", **settings), DataConfig()), "one", 3
        )
        return (records.folder / REFERENCE).location

    places = [place(), place(max_pixels=500)]
    assert place() == places[0]
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("USER", "PERSON") + " ")
    places.append(place())
    file.write_text(file.read_text().replace("picture 0?", "picture 9?"))
    os.utime(file, (1, 1))
    places.append(place())
    assert len(set(places)) == 4


def test_the_transformers_version_changes_the_key(weights: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key_of(weights).folder_name
    monkeypatch.setattr("rayalign.reference.key.transformers.__version__", "0.0")
    assert key_of(weights).folder_name != before


@pytest.mark.parametrize(
    "changes",
    [
        {"model": ModelConfig(gradient_checkpointing=False)},
        {"tuner": TunerConfig(lora_rank=64, use_dora=True, lora_target_modules=("ALL",), freeze_vit=False)},
        {"tuner": TunerConfig(stack_adapter=True)},
    ],
    ids=str,
)
def test_what_only_the_trained_weights_depend_on_does_not_change_the_key(weights: ModelSource, changes: dict[str, Any]) -> None:
    assert key_of(weights, **changes).folder_name == key_of(weights).folder_name


@pytest.mark.parametrize(
    "name", ["base/model.safetensors", "base/config.json", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"]
)
def test_changed_weights_change_the_key_and_touched_or_copied_ones_do_not(
    weights: ModelSource, tmp_path: Path, name: str
) -> None:
    before = key_of(weights).folder_name
    file = tmp_path / name
    (tmp_path / "base" / "README.md").write_text("Says nothing.")
    file.touch()
    shutil.copytree(tmp_path / "base", tmp_path / "copy")
    assert key_of(weights).folder_name == before
    assert key_of(ModelSource(str(tmp_path / "copy"), weights.adapter)).folder_name == before
    file.write_text(file.name[::-1])  # as many bytes
    changed = key_of(weights).folder_name
    assert changed != before
    file.rename(file.with_name("model-2.safetensors"))
    assert key_of(weights).folder_name not in (before, changed)


def test_without_the_adapter_and_with_more_code_the_key_is_another_one(weights: ModelSource, tmp_path: Path) -> None:
    keys = {key_of(weights).folder_name, key_of(ModelSource(weights.base)).folder_name}
    (tmp_path / "base" / "modeling.py").write_text("pass")
    keys.add(key_of(weights).folder_name)
    assert len(keys) == 3


def test_a_model_of_the_hub_is_known_by_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = set()
    for commit in ("a" * 40, "b" * 40):
        snapshot = tmp_path / "models--me--tiny" / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text("{}")
        (tmp_path / "models--me--tiny" / "refs").mkdir(exist_ok=True)
        (tmp_path / "models--me--tiny" / "refs" / "main").write_text(commit)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
        key = key_of(ModelSource("me/tiny"))
        assert key.weights == {"me/tiny": commit}
        keys.add(key.folder_name)
    assert len(keys) == 2


def test_the_key_is_the_same_in_another_process() -> None:
    key = ReferenceKey({"b": "2", "a": "1"}, {}, {"device": "cpu", "damaged": False})
    assert key.folder_name == "reference_9539458d06afb7131310aa555d78063e"
    assert key.folder_name == ReferenceKey({"a": "1", "b": "2"}, {}, {"damaged": False, "device": "cpu"}).folder_name


def test_an_unfinished_run_does_not_go_on_with_another_model(weights: ModelSource, tmp_path: Path) -> None:
    config = config_of(DPO(), output_dir=str(tmp_path / "run"))
    check_reference(config, key_of(weights))
    check_reference(config, key_of(weights, model=ModelConfig(attn_implementation="eager"), device="cuda"))
    note = json.loads((tmp_path / "run" / "reference.json").read_text())
    assert set(note["weights"]) == {"config.json", "model.safetensors"}
    (tmp_path / "base" / "model.safetensors").write_text("other")
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    with pytest.raises(ValueError) as caught:
        check_reference(config, key_of(weights))
    assert str(caught.value) == (
        f"The model that the unfinished run in {tmp_path}/run started from has changed since (adapter adapter_config.json, "
        "weights model.safetensors), and with it the reference. Bring it back as it was, or pass --overwrite true to start "
        "anew."
    )
    assert json.loads((tmp_path / "run" / "reference.json").read_text()) == note


@pytest.mark.parametrize("note", ["[]", "{}", '{"weights": {}, "adapter": "none"}', '{"weights": {', ""])
def test_a_damaged_note_of_the_reference_is_told_with_its_file(tmp_path: Path, note: str) -> None:
    file = tmp_path / "reference.json"
    file.write_text(note)
    config = config_of(DPO(), output_dir=str(tmp_path))
    with pytest.raises(ValueError) as caught:
        check_reference(config, ReferenceKey({}, {}, {}))
    assert str(caught.value).startswith(f"{file} is damaged: it ")
    assert str(caught.value).endswith(" Pass --overwrite true to start anew.")
    assert file.read_text() == note


@pytest.mark.parametrize("name", [name for name, algorithm in ALGORITHMS.items() if not algorithm().needs.reference])
def test_there_is_nothing_to_compute_without_a_reference(name: str) -> None:
    with pytest.raises(ValueError) as caught:
        config_from_mapping(ALGORITHMS[name], {"precompute_ref_log_probs": "true"})
    assert str(caught.value) == (
        f"--precompute_ref_log_probs true: {name} compares with no reference here, so there is nothing to compute. Leave the "
        "flag out."
    )


def test_full_fine_tuning_cannot_do_without_stored_log_probs() -> None:
    with pytest.raises(ValueError) as caught:
        config_from_mapping(DPO, {"precompute_ref_log_probs": "false", "sft_type": "full"})
    assert str(caught.value) == (
        "--precompute_ref_log_probs false with --sft_type full: the reference is the model at the start, and its weights are "
        "gone after the first step. Leave the flag out, or use --sft_type lora."
    )
    config_from_mapping(DPO, {"precompute_ref_log_probs": "false", "sft_type": "full", "reference_free": "true"})
