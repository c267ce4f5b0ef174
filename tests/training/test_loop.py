import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from rayalign.algorithms import DPO, KTO, MDPO, RM, SFT, Algorithm
from rayalign.config.sections import ModelConfig, OptimizerConfig, RunConfig, TunerConfig
from rayalign.data.batch import PairBatch
from rayalign.data.sampler import SamplerSettings, StepSampler
from rayalign.data.store import EncodedPair, TokenCounts
from rayalign.policy.policy import Policy
from rayalign.storage import Store
from rayalign.training import distributed
from rayalign.training.best import GOES_ON, Verdict
from rayalign.training.checkpoint import Snapshot, load_checkpoint, load_unlogged, write_checkpoint
from rayalign.training.checkpoint_folder import FetchedCheckpoint
from rayalign.training.distributed import start_alike, sum_over_workers
from rayalign.training.loop import LoopEvents, Trainer, run_steps
from rayalign.training.metrics import MetricSums, Unlogged
from tests.tiny_models import counts_of, encode_pair, in_float64, make_batch, make_policy, wake_adapters

SHORT = ("two", "a cat", "yes", "no", "The digit is two.", "A cat sits on the mat.", "the mat")


@pytest.fixture(scope="module")
def folder(model_folder: Callable[..., Path]) -> Path:
    return model_folder("llava")


def pairs_of(folder: Path, algorithm: Algorithm | None = None) -> list[EncodedPair]:
    """Seven pairs, of which an algorithm that takes single responses gets three as such."""
    pairs = [encode_pair(folder, str(i), f"Which {i}?", SHORT[i], SHORT[i - 1]) for i in range(7)]
    if algorithm is not None and algorithm.needs.responses == "either":
        for i in (1, 4):
            pairs[i] = dataclasses.replace(pairs[i], rejected_ids=[])
        pairs[5] = dataclasses.replace(pairs[5], chosen_ids=[])
    return pairs


def sampler_of(pairs: list[EncodedPair], *, num_workers: int = 1, max_steps: int = 6, batch_size: int = 2) -> StepSampler:
    counts = ([len(vars(p)[f"{part}_ids"]) for p in pairs] for part in ("prompt", "chosen", "rejected"))
    settings = SamplerSettings(
        global_batch_size=4, batch_size=batch_size, num_workers=num_workers, num_epochs=1, max_steps=max_steps, seed=0
    )
    return StepSampler(TokenCounts(*(np.array(c) for c in counts)), settings)


def stream_of(
    folder: Path, sampler: StepSampler, start: int, algorithm: Algorithm, rank: int = 0
) -> Iterator[tuple[int, PairBatch]]:
    pairs = pairs_of(folder, algorithm)
    for step in range(start, sampler.num_steps):
        for rows in sampler.micro_batches(step, rank):
            partners = [pairs[row] for row in sampler.partners(step, rows)]
            yield step, make_batch(folder, [pairs[row] for row in rows], needs=algorithm.needs, partners=partners)


def trainer_of(
    folder: Path, algorithm: Algorithm, *, num_steps: int = 6, seed: int = 42, dtype: Any = "float32", **config: Any
) -> Trainer:
    policy = make_policy(
        folder,
        model=ModelConfig(gradient_checkpointing=True, dtype=dtype),
        tuner=TunerConfig(lora_dropout=0.3),
        needs=algorithm.needs,
        seed=seed,
    )
    return Trainer(policy, algorithm, OptimizerConfig(**{"learning_rate": 1e-2, **config}), num_steps=num_steps)


def weights_of(policy: Policy) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in policy.trainable.items()}


def equal(some: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return some.keys() == other.keys() and all(torch.equal(some[name], other[name]) for name in some)


def events(**functions: Callable[..., Any]) -> LoopEvents:
    return LoopEvents(
        **{"log": lambda line: None, "evaluate": lambda step: None, "save": lambda step, unlogged: None, **functions}
    )


def test_gradients_are_clipped_to_the_norm_and_the_norm_before_is_reported(folder: Path) -> None:
    sampler = sampler_of(pairs_of(folder))
    norms, after = [], []
    for max_norm in (0.0, 0.01):
        trainer = trainer_of(folder, DPO(), max_grad_norm=max_norm)
        wake_adapters(trainer.policy)
        batches = [batch for step, batch in stream_of(folder, sampler, 0, DPO()) if step == 0]
        result = trainer.step(0, batches, sampler.counts(0))
        assert result.num_tokens == sum(batch.num_tokens for batch in batches)
        gradients = torch.cat([p.grad.flatten() for p in trainer.policy.trainable.values() if p.grad is not None])
        norms.append(float(result.grad_norm))
        after.append(float(gradients.norm()))
    assert norms[0] == norms[1] == pytest.approx(after[0])  # 0 turns clipping off
    assert norms[0] > 0.02
    assert after[1] == pytest.approx(0.01, rel=1e-3)  # torch adds 1e-6 to the norm it divides by


@pytest.mark.parametrize(
    ("logging_steps", "save_steps", "words"),
    [(2, 3, "The loss is nan at step 2."), (3, 2, "The gradient norm is nan at step 2, so no checkpoint is written.")],
)
def test_a_run_that_is_no_longer_finite_stops_before_it_saves(
    folder: Path, logging_steps: int, save_steps: int, words: str
) -> None:
    trainer = trainer_of(folder, SFT())
    with torch.no_grad():
        next(iter(trainer.policy.trainable.values())).fill_(math.nan)
    sampler = sampler_of(pairs_of(folder))
    run = RunConfig(logging_steps=logging_steps, save_steps=save_steps)
    lines: list[Any] = []
    with pytest.raises(FloatingPointError) as caught:
        run_steps(trainer, sampler, stream_of(folder, sampler, 0, SFT()), run, events(log=lines.append), start_step=0)
    assert [line["step"] for line in lines] == [2]  # what the run ends by is told
    assert math.isnan(lines[0]["loss"])
    assert math.isnan(lines[0]["grad_norm"])
    assert str(caught.value) == f"{words} Lower --learning_rate, or use --dtype float32 or bfloat16."


def test_an_evaluation_may_ask_for_a_checkpoint_or_for_the_end(folder: Path) -> None:
    sampler, run = sampler_of(pairs_of(folder), max_steps=6), RunConfig(logging_steps=1, eval_steps=2, save_steps=5)
    verdicts = {2: Verdict(saves=True), 4: Verdict(saves=True, stops=True)}
    for judged, (end, evaluated, saved) in (
        ({}, (6, [2, 4, 6], [5, 6])),
        (verdicts, (4, [2, 4], [2, 4])),
    ):
        calls: dict[str, list[int]] = {"evaluate": [], "save": []}
        trainer = trainer_of(folder, DPO(), num_steps=6)
        told = events(
            evaluate=calls["evaluate"].append,
            save=lambda step, unlogged, of=calls: of["save"].append(step),
            judge=lambda step, of=judged: of.get(step, GOES_ON),
        )
        assert run_steps(trainer, sampler, stream_of(folder, sampler, 0, DPO()), run, told, start_step=0) == end
        assert calls == {"evaluate": evaluated, "save": saved}


@pytest.mark.parametrize("logging_steps", [1, 2])
@pytest.mark.parametrize("algorithm", [SFT(), DPO(), KTO(), RM()], ids=lambda a: a.name)
def test_a_resumed_run_ends_with_the_weights_and_lines_of_an_undisturbed_one(
    folder: Path, tmp_path: Path, algorithm: Algorithm, logging_steps: int
) -> None:
    """A line may be of steps before the checkpoint, too."""
    sampler = sampler_of(pairs_of(folder, algorithm))
    run = RunConfig(logging_steps=logging_steps, save_steps=3)
    lines: dict[str, list[Any]] = {"undisturbed": [], "resumed": []}
    undisturbed = trainer_of(folder, algorithm)

    def save(step: int, unlogged: Sequence[Unlogged]) -> None:
        if step == 3:
            assert len(unlogged) == logging_steps - 1
            snapshot = Snapshot.of(undisturbed.policy, undisturbed.optimizer, step=step, unlogged=unlogged)
            write_checkpoint(Store(str(tmp_path)), snapshot)

    stream = stream_of(folder, sampler, 0, algorithm)
    run_steps(undisturbed, sampler, stream, run, events(log=lines["undisturbed"].append, save=save), start_step=0)
    torch.manual_seed(1234)  # whatever the process did before it resumed
    resumed = trainer_of(folder, algorithm, seed=7)
    checkpoint = FetchedCheckpoint(Store(str(tmp_path)), 3, tmp_path)
    load_checkpoint(checkpoint, resumed.policy, resumed.optimizer)
    stream = stream_of(folder, sampler, 3, algorithm)
    logged = [line for line in lines["undisturbed"] if line["step"] <= 3]
    run_steps(
        resumed,
        sampler,
        stream,
        run,
        events(log=lines["resumed"].append),
        start_step=3,
        tokens_before=logged[-1]["num_tokens"],
        unlogged=Unlogged.of(load_unlogged(checkpoint), 0, 1),
    )
    assert equal(weights_of(resumed.policy), weights_of(undisturbed.policy))
    timing = {"pairs_per_second", "tokens_per_second", "data_wait_fraction"}
    expected, again = ([{k: v for k, v in line.items() if k not in timing} for line in lines[run]] for run in lines)
    assert again == expected[len(logged) :]
    # A reward model's head has learned, and stands in the checkpoint beside the adapters.
    saved = load_file(tmp_path / "trainable.safetensors")
    assert ("v_head.summary.weight" in saved and bool(saved["v_head.summary.weight"].any())) == (
        algorithm.needs.head == "value"
    )
    # Dropout is part of what was resumed: without it the run would have ended elsewhere.
    assert any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in resumed.policy.model.modules()) == algorithm.needs.dropout


def set_loss_scale(trainer: Trainer, scale: float, *, growth_interval: int = 2000) -> None:
    state = {**trainer.scaler.state_dict(), "scale": scale, "growth_interval": growth_interval}
    trainer.scaler.load_state_dict(state)


TOO_LARGE = 2.0**40
"""A loss scale at which the gradients of every step below overflow float16."""


@pytest.mark.parametrize("algorithm", [SFT(), RM(), DPO(), KTO(), MDPO()], ids=lambda a: a.name)
def test_the_result_of_a_step_holds_no_graph(folder: Path, algorithm: Algorithm) -> None:
    sampler = sampler_of(pairs_of(folder, algorithm), max_steps=1)
    batches = [batch for _, batch in stream_of(folder, sampler, 0, algorithm)]
    result = trainer_of(folder, algorithm).step(0, batches, sampler.counts(0))
    assert len(result.outputs) == len(batches) == 2
    for output in result.outputs:
        tensors = [output.loss, *output.pair_metrics.values(), *itertools.chain(*output.mean_metrics.values())]
        assert not any(tensor.requires_grad for tensor in tensors)
        assert all(len(values) == 2 for values in output.pair_metrics.values())


def test_a_step_that_overflows_float16_changes_no_weight_and_halves_the_scale(folder: Path) -> None:
    trainer = trainer_of(folder, DPO(), dtype="float16")
    set_loss_scale(trainer, TOO_LARGE)
    before = weights_of(trainer.policy)
    sampler = sampler_of(pairs_of(folder))
    batches = [batch for step, batch in stream_of(folder, sampler, 0, DPO()) if step == 0]
    result = trainer.step(0, batches, sampler.counts(0))
    assert result.is_skipped
    assert not math.isfinite(float(result.grad_norm))
    assert equal(weights_of(trainer.policy), before)
    assert not trainer.optimizer.state
    assert trainer.scaler.get_scale() == TOO_LARGE / 2
    set_loss_scale(trainer, 2.0**10)
    result = trainer.step(0, batches, sampler.counts(0))
    assert not result.is_skipped
    assert not equal(weights_of(trainer.policy), before)
    exact = trainer_of(folder, DPO()).step(0, batches, sampler.counts(0))
    assert float(result.grad_norm) == pytest.approx(
        float(exact.grad_norm), rel=1e-2
    )  # of the loss, not of the scaled one; float16 has 11 bits


def test_steps_that_float16_skips_are_counted_and_do_not_stop_the_run(folder: Path) -> None:
    sampler = sampler_of(pairs_of(folder), max_steps=5)
    lines: list[Any] = []
    saved: list[int] = []
    trainer = trainer_of(folder, DPO(), num_steps=5, dtype="float16")
    set_loss_scale(trainer, TOO_LARGE)

    def log(line: Mapping[str, float]) -> None:
        lines.append(line)
        if line["step"] == 4:
            set_loss_scale(trainer, 2.0**10)

    run = RunConfig(logging_steps=2, save_steps=3)
    run_steps(
        trainer,
        sampler,
        stream_of(folder, sampler, 0, DPO()),
        run,
        events(log=log, save=lambda step, unlogged: saved.append(step)),
        start_step=0,
    )
    assert [(line["step"], line["skipped_steps"], "grad_norm" in line) for line in lines] == [
        (2, 2, False),
        (4, 2, False),
        (5, 0, True),
    ]
    assert saved == [3, 5]
    assert all(math.isfinite(line["loss"]) for line in lines)


def test_gradients_too_large_for_float16_at_any_scale_stop_the_run(folder: Path) -> None:
    trainer = trainer_of(folder, SFT(), dtype="float16")
    set_loss_scale(trainer, 1.0)
    with torch.no_grad():
        next(iter(trainer.policy.trainable.values())).fill_(math.inf)
    sampler = sampler_of(pairs_of(folder))
    with pytest.raises(FloatingPointError) as caught:
        run_steps(trainer, sampler, stream_of(folder, sampler, 0, SFT()), RunConfig(), events(), start_step=0)
    assert str(caught.value) == (
        "The gradients of step 1 overflow float16 even where the loss is not scaled up. "
        "Lower --learning_rate, or use --dtype float32 or bfloat16."
    )


def test_a_float16_run_resumes_with_its_loss_scale(folder: Path, tmp_path: Path) -> None:
    sampler = sampler_of(pairs_of(folder), max_steps=8)
    run = RunConfig(logging_steps=1, save_steps=4)
    undisturbed = trainer_of(folder, DPO(), num_steps=8, dtype="float16")
    set_loss_scale(undisturbed, 2.0**17, growth_interval=1)  # doubles after every step until one overflows
    skipped: list[float] = []

    def save(step: int, unlogged: Sequence[Unlogged]) -> None:
        if step == 4:
            write_checkpoint(
                Store(str(tmp_path)),
                Snapshot.of(undisturbed.policy, undisturbed.optimizer, step=step, scaler=undisturbed.scaler),
            )

    stream = stream_of(folder, sampler, 0, DPO())
    calls = events(log=lambda line: skipped.append(line["skipped_steps"]), save=save)
    run_steps(undisturbed, sampler, stream, run, calls, start_step=0)
    resumed = trainer_of(folder, DPO(), num_steps=8, seed=7, dtype="float16")
    checkpoint = FetchedCheckpoint(Store(str(tmp_path)), 4, tmp_path)
    load_checkpoint(checkpoint, resumed.policy, resumed.optimizer, scaler=resumed.scaler)
    run_steps(resumed, sampler, stream_of(folder, sampler, 4, DPO()), run, events(), start_step=4)
    assert equal(weights_of(resumed.policy), weights_of(undisturbed.policy))
    assert resumed.scaler.state_dict() == undisturbed.scaler.state_dict()
    assert set(skipped[:4]) == set(skipped[4:]) == {0, 1}


@pytest.mark.parametrize("algorithm", [SFT(), DPO()], ids=lambda a: a.name)
def test_evaluating_leaves_the_training_as_it_was(folder: Path, algorithm: Algorithm) -> None:
    sampler = sampler_of(pairs_of(folder), max_steps=3)
    ended, evaluations = [], []
    for eval_steps in (1, 100):
        trainer = trainer_of(folder, algorithm, num_steps=3)
        held_out = [batch for _, batch in stream_of(folder, sampler, 0, algorithm)][:2]

        def evaluate(step: int, trainer: Trainer = trainer, held_out: list[PairBatch] = held_out) -> None:
            torch.manual_seed(step)
            evaluations.append(trainer.evaluate(lambda: held_out, sampler.counts(0)))
            again = trainer.evaluate(lambda: held_out, sampler.counts(0))
            assert again == evaluations[-1]  # no dropout, or its masks would differ

        stream = stream_of(folder, sampler, 0, algorithm)
        run_steps(trainer, sampler, stream, RunConfig(eval_steps=eval_steps), events(evaluate=evaluate), start_step=0)
        assert trainer.policy.base.get_decoder().training
        ended.append(weights_of(trainer.policy))
    assert equal(*ended)
    assert len(evaluations) == 3 + 1
    assert evaluations[2] == evaluations[3]
    metrics, by_pair = evaluations[3]
    assert by_pair.keys() == {pair_id for batch in held_out for pair_id in batch.ids}
    mean = sum(values["logps/chosen"] for values in by_pair.values()) / len(by_pair)
    assert metrics["logps/chosen"] == pytest.approx(mean)


def test_an_evaluation_gives_a_single_response_the_values_of_its_own_side(folder: Path) -> None:
    pairs = pairs_of(folder, KTO())
    trainer = trainer_of(folder, KTO())
    batches = [make_batch(folder, pairs[start : start + 3], needs=KTO().needs) for start in (0, 3)]
    metrics, by_pair = trainer.evaluate(lambda: batches, counts_of(pairs[:6]))
    both = {f"{kind}/{side}" for kind in ("rewards", "logps", "tokens") for side in ("chosen", "rejected")}
    keys = {pair_id: set(values) for pair_id, values in by_pair.items()}
    whole = both | {"rewards/margins", "rewards/accuracies", "accuracy/likelihood", "accuracy/per_token"}
    whole |= {"drift", "exact_match"}
    tokens = {"tokens/chosen", "tokens/rejected"}
    good, bad = (
        {"rewards/chosen", "logps/chosen", "drift", "exact_match"} | tokens,
        {"rewards/rejected", "logps/rejected"} | tokens,
    )
    assert keys == {"0": whole, "1": good, "2": whole, "3": whole, "4": good, "5": bad}
    for name in whole - tokens:
        values = [values[name] for values in by_pair.values() if name in values]
        assert metrics[name] == pytest.approx(sum(values) / len(values))


def test_lines_evaluations_and_checkpoints_come_at_their_steps_and_at_the_end(folder: Path) -> None:
    sampler = sampler_of(pairs_of(folder), max_steps=5)
    seen: dict[str, list[Any]] = {"log": [], "evaluate": [], "save": []}
    trainer = trainer_of(folder, SFT(), num_steps=5)
    run = RunConfig(logging_steps=2, eval_steps=3, save_steps=4)
    calls = events(**{name: lambda first, *rest, of=told: of.append(first) for name, told in seen.items()})
    run_steps(trainer, sampler, stream_of(folder, sampler, 0, SFT()), run, calls, start_step=0, tokens_before=1000)
    assert [line["step"] for line in seen["log"]] == [2, 4, 5]
    assert (seen["evaluate"], seen["save"]) == ([3, 5], [4, 5])
    assert [line["epoch"] for line in seen["log"]] == [1.0, 2.0, 2.5]  # seven pairs are two steps of four
    tokens = sum(batch.num_tokens for _, batch in stream_of(folder, sampler, 0, SFT()))
    assert seen["log"][-1]["num_tokens"] == 1000 + tokens


def test_a_stream_out_of_step_with_the_sampler_is_our_own_mistake(folder: Path) -> None:
    sampler = sampler_of(pairs_of(folder))
    trainer = trainer_of(folder, SFT())
    with pytest.raises(AssertionError, match="the stream is at step 1, the sampler at 0"):
        run_steps(trainer, sampler, stream_of(folder, sampler, 1, SFT()), RunConfig(), events(), start_step=0)


def test_the_largest_seed_that_python_users_pass_is_accepted(folder: Path) -> None:
    sampler = sampler_of(pairs_of(folder))
    trainer = trainer_of(folder, SFT(), seed=0)
    seeded = Trainer(trainer.policy, SFT(), OptimizerConfig(seed=2**32 - 1), num_steps=6, rank=3)
    seeded.step(5, [batch for step, batch in stream_of(folder, sampler, 0, SFT()) if step == 0], sampler.counts(0))


def one_of_two_workers(rank: int, folder: str, out: str) -> None:
    """One of two processes: sums tensors, for each case starts alike, evaluates and takes a step, and trains on with a changing
    number of workers."""
    torch.set_num_threads(1)
    with workers_of(2, rank, Path(out) / "meeting"):
        results = work_of(rank, Path(folder))
    for case, algorithm in ELASTIC.items():
        for name, parts in PARTS.items():
            trained = weights_after(parts, algorithm, Path(folder), Path(out) / f"{case} {name}", rank)
            results |= {f"{case} {name}: {weight}": value for weight, value in trained.items()}
    save_file(results, f"{out}/{rank}.safetensors")


@contextlib.contextmanager
def workers_of(count: int, rank: int, meeting: Path) -> Iterator[None]:
    """Within it, this process is one of so many workers."""
    if count == 1:
        yield
        return
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=count, timeout=timedelta(minutes=5))
    try:
        yield
    finally:
        dist.destroy_process_group()


ELASTIC: dict[str, Algorithm] = {"sft": SFT(), "kto": KTO()}
"""With dropout, and with statistics over the pairs of all workers."""

PARTS: dict[str, Sequence[tuple[int, range]]] = {
    "undisturbed": [(2, range(6))],
    "restarted": [(2, range(3)), (2, range(3, 6))],
    "elastic": [(2, range(2)), (1, range(2, 4)), (2, range(4, 6))],
}
"""Runs of six steps in parts: how many workers take which steps. Each part goes on from the checkpoint of the one before."""


def weights_after(
    parts: Sequence[tuple[int, range]], algorithm: Algorithm, folder: Path, out: Path, rank: int
) -> dict[str, Tensor]:
    """The weights that a worker has after its last part."""
    weights: dict[str, Tensor] = {}
    for number, (num_workers, steps) in enumerate(parts):
        if rank >= num_workers:
            continue
        before, after = (Path(f"{out} {n}") for n in (number - 1, number))
        with workers_of(num_workers, rank, Path(f"{out} {number} meeting")):
            policy = policy_of_rank(0, folder, algorithm, dropout=0.3)
            trainer = Trainer(policy, algorithm, OptimizerConfig(learning_rate=1e-2), num_steps=6, rank=rank)
            if number:
                load_checkpoint(FetchedCheckpoint(Store(str(before)), steps.start, before), policy, trainer.optimizer)
            sampler = sampler_of(pairs_of(folder, algorithm), num_workers=num_workers, batch_size=1)
            stream = list(stream_of(folder, sampler, steps.start, algorithm, rank))
            for step in steps:
                trainer.step(step, [batch for of_step, batch in stream if of_step == step], sampler.counts(step))
            if rank == 0:
                after.mkdir()
                write_checkpoint(Store(str(after)), Snapshot.of(policy, trainer.optimizer, step=steps.stop))
        weights = weights_of(policy)
    return weights


CASES: dict[str, tuple[Algorithm, bool]] = {
    "dpo, one worker idle": (DPO(), True),
    "kto, one worker idle": (KTO(), True),
    "kto": (KTO(), False),
    "aot": (DPO(loss_type=("aot", "aot_unpaired"), rpo_alpha=0.0), False),
}
"""Steps that two workers take together, and whether one of them does all the work."""


def work_of(rank: int, folder: Path) -> dict[str, Tensor]:
    tensors = [
        torch.full((n,), rank + 1.0, dtype=dtype) for n, dtype in ((3, torch.float64), (7, torch.float64), (2, torch.float32))
    ]
    tensors.append(torch.tensor(10.0 * rank))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "BUCKET_ELEMENTS", 5)
        sum_over_workers(iter(tensors))
    results = {f"sum {i}": tensor for i, tensor in enumerate(tensors)}
    for case, (algorithm, one_is_idle) in CASES.items():
        ranks = range(2 * (rank == 0)) if one_is_idle else (rank,)
        step = evaluate_and_step(folder, algorithm, ranks, rank=rank, num_workers=2)
        results |= {f"{case}: {name}": tensor for name, tensor in step.items()}
    return results | {f"float16 {name}": tensor for name, tensor in float16_steps(rank, folder).items()}


def float16_steps(rank: int, folder: Path) -> dict[str, Tensor]:
    """What a worker has of two steps of which rank 0 does all the work: the gradients of the first overflow, those of the
    second do not."""
    trainer = trainer_of(folder, DPO(), seed=rank, dtype="float16")
    start_alike(trainer.policy)
    sampler = sampler_of(pairs_of(folder), max_steps=1)
    batches = [batch for _, batch in stream_of(folder, sampler, 0, DPO())] if rank == 0 else []
    results = {}
    for step, scale in enumerate((TOO_LARGE, 2.0**10)):
        set_loss_scale(trainer, scale)
        result = trainer.step(step, batches, sampler.counts(0))
        values = {"skipped": torch.tensor(result.is_skipped), "scale": torch.tensor(trainer.scaler.get_scale())}
        results |= {f"{step} {name}": value for name, value in (values | weights_of(trainer.policy)).items()}
    return results


def policy_of_rank(rank: int, folder: Path, algorithm: Algorithm, *, dropout: float = 0.0) -> Policy:
    """Another one for each rank; that of rank 0 has a KL estimate above 0 (else KTO would clamp it, and could not tell one
    worker's from all workers')."""
    policy = make_policy(folder, needs=algorithm.needs, tuner=TunerConfig(lora_dropout=dropout), seed=rank)
    return wake_adapters(in_float64(policy), scale=0.3, seed=6 + rank)


def evaluate_and_step(
    folder: Path, algorithm: Algorithm, ranks: Sequence[int], *, rank: int = 0, num_workers: int = 1
) -> dict[str, Tensor]:
    """Evaluates the pairs of a step and takes it; the worker has the micro-batches of `ranks`. Together workers have two of two
    pairs, one alone has all four in one."""
    policy = policy_of_rank(rank, folder, algorithm)
    start_alike(policy)
    started = weights_of(policy)
    batch_size = 4 // num_workers
    sampler = sampler_of(pairs_of(folder, algorithm), num_workers=num_workers, max_steps=1, batch_size=batch_size)
    trainer = Trainer(policy, algorithm, OptimizerConfig(learning_rate=1e-2), num_steps=1, rank=rank)
    batches = [batch for other in ranks for _, batch in stream_of(folder, sampler, 0, algorithm, rank=other)]
    held_out, by_pair = trainer.evaluate(lambda: iter(batches), sampler.counts(0))
    result = trainer.step(0, iter(batches), sampler.counts(0))
    metrics = {
        **{f"eval_{name}": value for name, value in held_out.items()},
        **MetricSums(result.outputs).reduce(steps=1),
        **{f"{name} of {pair_id}": value for pair_id, values in by_pair.items() for name, value in values.items()},
    }
    return {
        **{f"start {name}": value for name, value in started.items()},
        **{f"end {name}": value for name, value in weights_of(policy).items()},
        **{f"metric {name}": torch.tensor(value, dtype=torch.float64) for name, value in metrics.items()},
        "norm": result.grad_norm,
    }


@pytest.fixture(scope="module")
def workers(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    out = tmp_path_factory.mktemp("workers")
    other = torch.multiprocessing.get_context("spawn").Process(target=one_of_two_workers, args=(1, str(folder), str(out)))
    other.start()
    one_of_two_workers(0, str(folder), str(out))
    other.join()
    assert other.exitcode == 0
    return [load_file(out / f"{rank}.safetensors") for rank in range(2)]


def test_sums_over_workers_are_exact_in_buckets_of_any_shape_and_type(workers: list[dict[str, Tensor]]) -> None:
    for worker in workers:
        assert [worker[f"sum {i}"].tolist() for i in range(4)] == [[3.0] * 3, [3.0] * 7, [3.0] * 2, 10.0]
        assert [worker[f"sum {i}"].dtype for i in range(3)] == [torch.float64, torch.float64, torch.float32]


def test_workers_skip_the_same_steps_an_idle_one_too(folder: Path, workers: list[dict[str, Tensor]]) -> None:
    one, other = ({n: v for n, v in worker.items() if n.startswith("float16")} for worker in workers)
    assert equal(one, other)
    assert [bool(one[f"float16 {step} skipped"]) for step in (0, 1)] == [True, False]
    assert [float(one[f"float16 {step} scale"]) for step in (0, 1)] == [TOO_LARGE / 2, 2.0**10]
    started = weights_of(trainer_of(folder, DPO(), seed=0, dtype="float16").policy)
    unchanged, changed = ({name: one[f"float16 {step} {name}"] for name in started} for step in (0, 1))
    assert equal(unchanged, started)
    assert not equal(changed, started)


@pytest.mark.parametrize("case", ELASTIC)
def test_weights_do_not_depend_on_how_many_workers_a_run_has_and_when_that_changes(
    folder: Path, workers: list[dict[str, Tensor]], tmp_path: Path, case: str
) -> None:
    one, other = ({name: results_of(worker, f"{case} {name}", of_pairs=False) for name in PARTS} for worker in workers)
    alone = weights_after([(1, range(6))], ELASTIC[case], folder, tmp_path / "alone", rank=0)
    assert equal(one["restarted"], one["undisturbed"])  # the number did not change
    for weights in (*one.values(), *other.values()):
        assert weights.keys() == alone.keys()
        for name, value in alone.items():
            torch.testing.assert_close(weights[name], value, atol=1e-9, rtol=0)  # float64, and sums in another order
    start = weights_of(policy_of_rank(0, folder, ELASTIC[case], dropout=0.3))
    assert max(float((value - start[name]).abs().max()) for name, value in alone.items()) > 1e-3


def results_of(worker: Mapping[str, Tensor], case: str, *, of_pairs: bool) -> dict[str, Tensor]:
    """What a worker has of a step: its own pairs' values, or what all workers have alike."""
    own = {name.removeprefix(f"{case}: "): value for name, value in worker.items() if name.startswith(f"{case}: ")}
    return {name: value for name, value in own.items() if (" of " in name) == of_pairs}


@pytest.mark.parametrize("case", CASES)
def test_workers_start_with_the_weights_of_rank_0_and_an_idle_one_stays_with_the_others(
    folder: Path, workers: list[dict[str, Tensor]], case: str
) -> None:
    one, other = (results_of(worker, case, of_pairs=False) for worker in workers)
    assert equal(one, other)
    policy = policy_of_rank(0, folder, CASES[case][0])
    for name, value in weights_of(policy).items():
        assert torch.equal(other[f"start {name}"], value)


@pytest.mark.parametrize("case", CASES)
def test_a_step_and_an_evaluation_of_two_workers_are_those_of_one(
    folder: Path, workers: list[dict[str, Tensor]], case: str
) -> None:
    algorithm, one_is_idle = CASES[case]
    alone = evaluate_and_step(folder, algorithm, [0])
    together = results_of(workers[0], case, of_pairs=False)
    of_pairs = [results_of(worker, case, of_pairs=True) for worker in workers]
    assert bool(of_pairs[1]) != one_is_idle
    assert of_pairs[0].keys().isdisjoint(of_pairs[1])
    together |= of_pairs[0] | of_pairs[1]
    assert together.keys() == alone.keys()
    for name, value in alone.items():
        if name.startswith("metric"):
            # Rewards are kept as float32 where they are divided by counts; differences of numbers near 100 are not zero.
            torch.testing.assert_close(together[name], value, atol=1e-9, rtol=1e-6)
        elif name == "norm":
            torch.testing.assert_close(together[name], value, atol=0, rtol=1e-12)  # float64
        else:
            # AdamW's first step is gradient / |gradient|, which magnifies the last bits of gradients near its epsilon of 1e-8.
            torch.testing.assert_close(together[name], value, atol=1e-9, rtol=0)
    if algorithm.name == "kto":
        assert alone["metric kl"] > 0.1
        assert alone["metric eval_kl"] > 0.1
