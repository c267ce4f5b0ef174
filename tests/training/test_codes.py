import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rayalign.algorithms import SimPO
from rayalign.config.sections import OptimizerConfig
from rayalign.estimate.memory import moment_bytes
from rayalign.policy.sharding import sharded_weights
from rayalign.storage import Store
from rayalign.training.checkpoint import WHOLE, Snapshot, load_checkpoint, write_checkpoint
from rayalign.training.checkpoint_folder import checkpoint_name, fetch_newest
from rayalign.training.codes import BLOCK, in_blocks
from rayalign.training.distributed import gather
from rayalign.training.loop import Trainer
from tests.sharded_steps import FULL, Case, batches_of, pairs_of, policy_of, shard, together, whole
from tests.tiny_models import counts_of, save_tiny_model

TABLE = torch.linspace(-0.99, 1, 256)


def numbers_of(codes: Tensor, scales: Tensor) -> Tensor:
    return TABLE[codes.flatten().int()] * scales


def test_codes_of_the_same_blocks_stay_as_they_are() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(256, (5, 120), dtype=torch.uint8, generator=generator)  # 88 of the last block
    of_blocks = torch.tensor([3e-40, 0.0, 1e30])
    again, scales = in_blocks(codes, of_blocks.repeat_interleave(BLOCK)[: codes.numel()], TABLE)
    assert torch.equal(again, codes)
    assert torch.equal(scales, of_blocks)


def test_codes_of_other_blocks_are_the_nearest() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(256, (300, 3), dtype=torch.uint8, generator=generator)
    before = torch.cat([torch.full((100,), 0.5), torch.full((700,), 2.0), torch.zeros(100)])
    again, scales = in_blocks(codes, before, TABLE)
    assert scales.tolist() == [2.0, 2.0, 2.0, 2.0]
    apart = numbers_of(again, scales.repeat_interleave(BLOCK)[:900]) - numbers_of(codes, before)
    step = 2.0 * float(TABLE[1] - TABLE[0])
    assert 0 < apart.abs().max() <= step / 2 * 1.001
    assert not apart[100:800].any()


def test_no_codes_have_no_blocks() -> None:
    codes, scales = in_blocks(torch.empty(0, 7), torch.empty(0), TABLE)
    assert (codes.shape, codes.dtype, len(scales)) == ((0, 7), torch.uint8, 0)


CASE = Case(SimPO(), tuner=FULL, dtype=torch.float32, deals=(((0,),), ((1, 2),), ((3,),), ()))
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 512}
WIDTHS = {"aligned": 256, "across": 200}
"""How many numbers a row of most weights has: blocks end where rows do, or not."""
NAME = checkpoint_name(2, "a")
if importlib.util.find_spec("bitsandbytes") is None:
    pytest.skip('bitsandbytes is not installed (pip install "rayalign[qlora]")', allow_module_level=True)
# Its import compiles with torch.jit, which torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")


def trainer_of(folder: Path, rank: int, *, sharded: bool) -> Trainer:
    policy = policy_of(CASE, folder)
    fillers = shard(policy, CASE, folder) if sharded else None
    config = OptimizerConfig(learning_rate=1e-3, optim="adamw_8bit")
    return Trainer(policy, CASE.algorithm, config, num_steps=6, rank=rank, fillers=fillers)


def train(trainer: Trainer, folder: Path, rank: int, num_workers: int, steps: range) -> None:
    """Steps of the same pairs, by any number of workers."""
    deal = [pairs for worker in range(rank, 4, num_workers) for pairs in CASE.deals[worker]]
    for step in steps:
        trainer.step(step, iter(batches_of(CASE, folder, deal)), counts_of(pairs_of(folder)))


def weights_of(trainer: Trainer, kind: str) -> dict[str, Tensor]:
    return {f"{kind} {name}": whole(p) for name, p in trainer.policy.trainable.items()}


def save(trainer: Trainer, folder: Path, rank: int) -> None:
    write_checkpoint(Store(str(folder / NAME)), Snapshot.of(trainer.policy, trainer.optimizer, step=2, rank=rank))


def goes_on(place: Path, temporary: Path, folder: Path, rank: int, num_workers: int, *, sharded: bool) -> Trainer:
    """A trainer that took over a checkpoint of two steps, and took two more."""
    trainer = trainer_of(folder, rank, sharded=sharded)
    temporary.mkdir()
    found = fetch_newest(Store(str(place)), temporary, shard=(rank, num_workers))
    assert found is not None
    load_checkpoint(found, trainer.policy, trainer.optimizer)
    train(trainer, folder, rank, num_workers, range(2, 4))
    return trainer


def work_of(out: Path, rank: int, folders: Mapping[str, Path]) -> dict[str, Tensor]:
    """Four steps; their last two from a checkpoint of these two workers, and of one."""
    results = {}
    for family, folder in folders.items():
        trainer = trainer_of(folder, rank, sharded=True)
        train(trainer, folder, rank, 2, range(2))
        save(trainer, out / family, rank)
        train(trainer, folder, rank, 2, range(2, 4))
        gather(None)
        results |= weights_of(trainer, f"{family} undisturbed")
        for name, place in {"own": out, "of one": out / "alone"}.items():
            resumed = goes_on(place / family, out / f"{family} {name} {rank}", folder, rank, 2, sharded=True)
            results |= weights_of(resumed, f"{family} {name}")
        kept = [value for state in trainer.optimizer.state.values() for key, value in state.items() if key not in WHOLE]
        results[f"bytes of {family} {rank}"] = torch.tensor(sum(value.nbytes for value in kept))
    return results


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("models")
    return {
        kind: save_tiny_model(place / kind, "llava", text={**HEADS, "hidden_size": width}) for kind, width in WIDTHS.items()
    }


@pytest.fixture(scope="module")
def ends(folders: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Weights after four steps."""
    out = tmp_path_factory.mktemp("checkpoints")
    results = {}
    for family, folder in folders.items():
        alone = trainer_of(folder, 0, sharded=False)
        train(alone, folder, 0, 1, range(2))
        save(alone, out / "alone" / family, 0)
        train(alone, folder, 0, 1, range(2, 4))
        results |= weights_of(alone, f"{family} alone")
    for worker in together(functools.partial(work_of, out), 2, folders, out):
        results |= worker
    for family, folder in folders.items():
        of_two = goes_on(out / family, out / f"{family} of two", folder, 0, 1, sharded=False)
        results |= weights_of(of_two, f"{family} of two")
    return results


def part(ends: Mapping[str, Tensor], kind: str) -> Tensor:
    return torch.cat([value.flatten() for name, value in sorted(ends.items()) if name.startswith(f"{kind} ")])


@pytest.mark.parametrize("family", WIDTHS)
def test_sharded_moments_of_8_bits_come_back_to_the_bit(ends: Mapping[str, Tensor], family: str) -> None:
    assert torch.equal(part(ends, f"{family} undisturbed"), part(ends, f"{family} own"))


@pytest.mark.parametrize(("family", "most"), [("across", 0.02), ("aligned", 1e-3)])
def test_other_numbers_of_workers_end_near(
    ends: Mapping[str, Tensor], folders: Mapping[str, Path], family: str, most: float
) -> None:
    """With blocks that end elsewhere , and that end where they did."""
    start = torch.cat([p.detach().flatten() for _, p in sorted(policy_of(CASE, folders[family]).trainable.items())])
    alone = part(ends, f"{family} alone")
    moved = (alone - start).norm()
    for kind in ("undisturbed", "of one", "of two"):
        assert (part(ends, f"{family} {kind}") - alone).norm() < most * moved


@pytest.mark.parametrize("family", WIDTHS)
def test_a_plan_knows_what_sharded_moments_of_8_bits_take(
    ends: Mapping[str, Tensor], folders: Mapping[str, Path], family: str
) -> None:
    policy = policy_of(CASE, folders[family])
    sharded = set(sharded_weights(policy.model, policy.base))
    trainable = policy.trainable.values()
    own = moment_bytes([p for p in trainable if p in sharded], "adamw_8bit") / 2
    own += moment_bytes([p for p in trainable if p not in sharded], "adamw_8bit")
    for rank in range(2):
        assert int(ends[f"bytes of {family} {rank}"]) == pytest.approx(own, rel=0.01)
