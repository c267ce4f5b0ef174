import dataclasses
import importlib.util
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rayalign.algorithms import DPO, KTO, MDPO, ORPO, RM, SFT, Needs, SimPO
from rayalign.config.config import Config
from rayalign.config.sections import ClusterConfig, ModelConfig, TunerConfig
from rayalign.data.companions import Damaged, Mismatched
from rayalign.data.encoder_spec import EncoderSpec
from rayalign.estimate.architecture import Blueprint
from rayalign.estimate.dry_run import Activations
from rayalign.estimate.memory import Memory, MicroBatch, memory_of
from rayalign.estimate.shapes import PairShape
from rayalign.estimate.sharding import share_of
from rayalign.models.source import ModelSource
from rayalign.policy.generation import as_trained, greedy_ids
from rayalign.policy.loading import load_policy
from rayalign.policy.policy import Policy
from rayalign.policy.sharding import agreed
from rayalign.training import ready
from rayalign.training.lockstep import Fillers, in_step, is_filler
from tests.sharded_steps import (
    FULL,
    IDLE,
    LORA,
    MIXED,
    Case,
    batches_of,
    differences,
    pairs_of,
    steps_of,
    together,
    trainer_of,
    whole_or_own,
)
from tests.tiny_models import counts_of, make_batch

VISION = TunerConfig(sft_type="full", freeze_vit=False, freeze_aligner=False)
TOWER = dataclasses.replace(VISION, freeze_llm=True)
CASES = {
    "dpo, adapters": Case(DPO()),
    "mdpo, adapters": Case(MDPO(), "qwen2_vl", deals=MIXED),
    "kto, all weights, one worker idle": Case(KTO(), tuner=FULL, deals=IDLE),
    "rm, all weights": Case(RM(), "qwen2_vl", tuner=FULL),
    "sft, all weights and the tower's": Case(SFT(), tuner=VISION, deals=IDLE),
    "mdpo, all weights and the tower's, pictures on one worker": Case(MDPO(), "qwen2_vl", tuner=VISION, deals=MIXED),
    "kto, all weights and the tower's, pictures on one worker": Case(KTO(), tuner=VISION, deals=MIXED),
    "simpo, all weights and the tower's, bfloat16": Case(SimPO(), tuner=VISION, deals=MIXED, dtype=torch.bfloat16),
    "kto, all weights, bfloat16": Case(KTO(), "qwen2_vl", tuner=FULL, deals=IDLE, dtype=torch.bfloat16, scattered=True),
    "mdpo, all weights, bfloat16": Case(MDPO(), tuner=FULL, deals=MIXED, dtype=torch.bfloat16),
    "simpo, the tower's weights alone, a position without pictures": Case(
        SimPO(), tuner=TOWER, deals=(((0,), (1,)), ((3,), (2,))), checkpointing=False
    ),
    "dpo, the tower's weights alone, pictures on one worker": Case(DPO(), tuner=TOWER, deals=MIXED),
    "dpo, adapters, rank 0's weights, pictures on one worker": Case(DPO(), "qwen2_vl", deals=MIXED, scattered=True),
    "simpo, all weights, float32": Case(SimPO(), tuner=FULL, dtype=torch.float32, checkpointing=False),
    "orpo, all weights": Case(ORPO(), "qwen2_vl", tuner=FULL, checkpointing=False),
    "dpo, adapters, rank 0's weights": Case(DPO(), recomputed=1, scattered=True),
    "kto, all weights, rank 0's": Case(KTO(), "qwen2_vl", tuner=FULL, scattered=True),
}
FSDP = ClusterConfig(strategy="fsdp", num_workers=2, gpus_per_worker=0.0)
HELD = {
    name: Case(DPO(), tuner=tuner, dtype=torch.float32)
    for name, tuner in {"held, adapters": LORA, "held, all weights": FULL}.items()
}
if importlib.util.find_spec("bitsandbytes") is not None:
    whole_scales = {"bnb_4bit_use_double_quant": False, "bnb_4bit_quant_type": "fp4"}
    four_bits: list[TunerConfig] = [dataclasses.replace(LORA, quant_bits=4, **each) for each in ({}, whole_scales)]
    CASES["dpo, adapters over 4 bits"] = Case(DPO(), tuner=four_bits[0], dtype=torch.float32)
    CASES["dpo, adapters over 4 bits, whole scales"] = Case(
        DPO(), "qwen2_vl", tuner=four_bits[1], dtype=torch.float32, checkpointing=False
    )
    for name, tuner in {"4 bits": four_bits[0], "4 bits, DoRA": dataclasses.replace(four_bits[1], use_dora=True)}.items():
        CASES[f"dpo, {name}, rank 0's weights"] = Case(DPO(), tuner=tuner, dtype=torch.float32, scattered=True)
    HELD["held, adapters over 4 bits, rank 0's weights"] = Case(DPO(), tuner=four_bits[1], dtype=torch.float32, scattered=True)
    HELD["held, adapters over 4 bits, whole scales"] = Case(DPO(), tuner=four_bits[1], dtype=torch.float32)
# bitsandbytes' import compiles with torch.jit, which torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
MOST = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-3}
"""The largest relative difference of sums that are made in another order. In bfloat16 gradients are float32 sums of products
that are rounded alike, but of a key's bias, which is nothing but rounding, in three digits."""


@pytest.fixture(scope="module")
def folders(model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    broken = tmp_path_factory.mktemp("broken") / "model"
    shutil.copytree(model_folder("llava"), broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    return {"llava": model_folder("llava"), "qwen2_vl": model_folder("qwen2_vl"), "broken": broken}


def answer_of(policy: Policy, folder: Path) -> Tensor:
    """The ids of an answer to a picture."""
    prompt = make_batch(folder, [dataclasses.replace(pairs_of(folder)[0], chosen_ids=[], rejected_ids=[])])
    assert prompt.image_inputs
    with as_trained(policy):
        return torch.tensor(greedy_ids(policy, prompt, end_tokens=frozenset(), max_new_tokens=6))


def work_of(rank: int, folders: Mapping[str, Path]) -> dict[str, Tensor]:
    case, folder = CASES["dpo, adapters"], folders["llava"]
    policy = trainer_of(case, folder, sharded=True, rank=rank).policy
    answers = {"answer": answer_of(policy, folder), "agreed": torch.tensor(agreed(policy, 5 + rank))}
    results = (
        steps_of(CASES, rank, folders) | answers | held_of(rank, folder) | started_of(rank, folder) | sums_of(rank, folder)
    )
    return results | refused_of(rank, folders["broken"])


def refused_of(rank: int, broken: Path) -> dict[str, Tensor]:
    """What a worker is told of a model that rank 0 can't load."""
    config = Config(DPO(), model=ModelConfig(dtype="bfloat16"), cluster=FSDP)
    data: Any = SimpleNamespace(source=ModelSource(str(broken)), spec=EncoderSpec(str(broken), "both"))
    with pytest.raises(ValueError) as caught:
        ready.ready_policy(config, data, device=torch.device("cpu"), rank=rank, say=lambda message: None)
    return {"told": torch.tensor(list(str(caught.value).encode()))}


class Exchanges(TorchDispatchMode):
    """Counts what workers exchange, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.count[func._opname] += 1
        return func(*args, **(kwargs or {}))


SUMS: dict[str, dict[str, Any]] = {"each": {}, "once": {"sync_each_batch": False}, "groups": {"group_size": 1}}


def sums_of(rank: int, folder: Path) -> dict[str, Tensor]:
    """How often a step of three micro-batches adds gradients up within groups of workers and over these, and gathers
    weights."""
    found = {}
    for name, options in SUMS.items():
        case = Case(SimPO(), tuner=FULL, deals=(((0,), (1,), (2,)), ((3,),)), **options)
        trainer = trainer_of(case, folder, sharded=True, rank=rank)
        with Exchanges() as exchanges:
            trainer.gradients(batches_of(case, folder, case.deals[rank]), counts_of(pairs_of(folder)))
        kinds = ("_reduce_scatter_base_", "allreduce_", "_allgather_base_")
        found[f"sums {name}"] = torch.tensor([exchanges.count[kind] for kind in kinds])
    return found


def started_of(rank: int, folder: Path) -> dict[str, Tensor]:
    """Bytes of the weights that a worker holds before each time that it loads the model, and in the end, and of the start's."""
    config = Config(KTO(), model=ModelConfig(dtype="bfloat16"), tuner=FULL, cluster=FSDP)
    data: Any = SimpleNamespace(source=ModelSource(str(folder)), spec=EncoderSpec(str(folder), "both"))
    loaded: list[Policy] = []
    held: list[int] = []

    def load(*args: Any, **options: Any) -> Policy:
        held.append(sum(map(bytes_of, loaded)))
        loaded.append(load_policy(*args, **options))
        return loaded[-1]

    with mock.patch.object(ready, "load_policy", load):
        policy, _ = ready.ready_policy(config, data, device=torch.device("cpu"), rank=rank, say=lambda message: None)
    assert policy.start is not None
    return {"loading": torch.tensor([*held, bytes_of(policy), bytes_of(policy.start)])}


def bytes_of(policy: Policy) -> int:
    return sum(whole_or_own(p).nbytes for p in policy.model.parameters())


def held_of(rank: int, folder: Path) -> dict[str, Tensor]:
    """Bytes of frozen weights, with the scales of those of 4 bits, and of trainable weights that a worker holds, by case."""
    results = {}
    for name, case in HELD.items():
        policy = trainer_of(case, folder, sharded=True, rank=rank).policy
        for trainable in (False, True):
            own = [whole_or_own(p) for p in policy.model.parameters() if p.requires_grad == trainable]
            own += [state.absmax for m in policy.base.modules() if not trainable and (state := getattr(m, "quant_state", None))]
            results[f"{name} {trainable}"] = torch.tensor(sum(p.numel() * p.element_size() for p in own))
    return results


@pytest.fixture(scope="module")
def workers(folders: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    return together(work_of, 2, folders, tmp_path_factory.mktemp("workers"))


@pytest.mark.parametrize("name", CASES)
def test_steps_of_a_sharded_policy_are_those_of_a_whole_one(
    folders: Mapping[str, Path], workers: list[dict[str, Tensor]], name: str
) -> None:
    case = CASES[name]
    found = differences(case, name, workers[0], folders[case.family])
    assert found.keys() == {"metric", "norm", "gradient", "weight"}
    # Metrics are kept as float32 where they are divided by counts.
    assert found.pop("metric") < 1e-5
    assert found.pop("weight") < 10 * MOST[case.dtype]  # AdamW's first steps magnify the last bits of the smallest gradients
    assert max(found.values()) < MOST[case.dtype]


@pytest.mark.parametrize("name", CASES)
def test_all_workers_end_with_the_same(workers: list[dict[str, Tensor]], name: str) -> None:
    one, other = ({n: v for n, v in worker.items() if n.startswith(f"{name}: ")} for worker in workers)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_workers_answer_together_as_one_does(folders: Mapping[str, Path], workers: list[dict[str, Tensor]]) -> None:
    policy = trainer_of(CASES["dpo, adapters"], folders["llava"], sharded=False).policy
    answer = answer_of(policy, folders["llava"])
    assert [worker["answer"].tolist() for worker in workers] == [answer.tolist()] * 2
    assert [int(worker["agreed"]) for worker in workers] == [5, 5]  # rank 0's choice
    assert agreed(policy, 7) == 7


def test_all_workers_are_told_what_keeps_rank_0_from_loading(
    folders: Mapping[str, Path], workers: list[dict[str, Tensor]]
) -> None:
    for worker in workers:
        told = bytes(worker["told"].tolist()).decode()
        assert told.startswith(f"{folders['broken']}/model.safetensors: is damaged or cut off")


def test_gradients_are_added_up_as_often_as_a_run_says(workers: list[dict[str, Tensor]]) -> None:
    """There are two layers, and a root beside them; vectors are added up once a step in any case. Weights of a layer are
    gathered in the forward and in the backward, those of the root once; the tower's where there is a picture."""
    micro_batches, units = 3, 3
    gathers = micro_batches * (1 + 2 * 2) + units
    for worker in workers:
        assert worker["sums each"].tolist() == [micro_batches * units, 1, gathers]
        assert worker["sums once"].tolist() == [units, 1, gathers]
        assert worker["sums groups"].tolist() == [0, units + 1, 0]


def test_no_worker_has_two_whole_models(folders: Mapping[str, Path], workers: list[dict[str, Tensor]]) -> None:
    """Where a copy of the model at the start is held, it is loaded when the first is sharded."""
    spec, source = EncoderSpec(str(folders["llava"]), "both"), ModelSource(str(folders["llava"]))
    blueprint = Blueprint(spec.model_config, source, ModelConfig(dtype="bfloat16"), FULL, KTO().needs)
    skeleton = blueprint.build()
    shape = PairShape(1, 1, 1)
    whole = sum(p.nbytes for p in skeleton.model.parameters())
    plan = share_of(
        memory_of(blueprint, skeleton, Activations(0, 0, 0), None, MicroBatch(1, shape, shape)),
        skeleton,
        blueprint,
        num_workers=2,
        below_head=0,
    )
    for worker in workers:
        nothing, first, policy, start = worker["loading"].tolist()
        assert (nothing, first) == (0, policy)
        assert whole / 2 < policy < 0.6 * whole  # vectors are whole
        assert plan.weights + plan.trainable == pytest.approx(policy + start, rel=0.01)


@pytest.mark.parametrize("name", HELD)
def test_a_plan_knows_what_each_worker_holds(folders: Mapping[str, Path], workers: list[dict[str, Tensor]], name: str) -> None:
    case, spec = HELD[name], EncoderSpec(str(folders["llava"]), "both")
    source = ModelSource(str(folders["llava"]))
    blueprint = Blueprint(spec.model_config, source, ModelConfig(dtype="float32"), case.tuner, case.algorithm.needs)
    skeleton = blueprint.build()
    quantised = skeleton.linears() if case.tuner.quant_bits is not None else []

    def size(parameters: Iterable[Tensor]) -> int:
        return sum(p.numel() // 2 if any(p is other for other in quantised) else 4 * p.numel() for p in parameters)

    parameters = list(skeleton.model.parameters())
    frozen, trainable = (size(p for p in parameters if p.requires_grad == trained) for trained in (False, True))
    frozen += sum(4 * (p.numel() // 64) for p in quantised)  # scales
    whole = Memory(frozen, trainable, trainable, 2 * trainable, kept=0, working=0, images=0)
    share = share_of(whole, skeleton, blueprint, num_workers=2, below_head=0, quantised=set(quantised))
    # A worker has a row more than another where their number is odd.
    held = {trained: sum(int(worker[f"{name} {trained}"]) for worker in workers) / 2 for trained in (False, True)}
    assert share.weights == pytest.approx(held[False], abs=2)
    assert share.trainable == pytest.approx(held[True], abs=2)
    assert (share.gradients, share.moments) == (share.trainable, pytest.approx(2 * share.trainable, abs=2))
    layers = skeleton.base.get_decoder().layers
    in_layer = size(p for n, p in layers[0].named_parameters() if p.ndim > 1 and ".lora_" not in n)
    outside = size([skeleton.head])
    embeddings = size([skeleton.base.get_input_embeddings().weight])
    gradients = in_layer + outside if case.tuner is FULL else 0
    assert share.working == 2 * in_layer + outside + embeddings + gradients


def test_a_filler_has_what_the_batch_has_that_it_stands_for(folders: Mapping[str, Path]) -> None:
    spec = EncoderSpec(str(folders["llava"]), "both")
    lacks_picture = {"companion": True, "reference": True, "picture": False}
    damaged = Fillers(spec, Needs(companion=Damaged(), reference=True)).batch(**lacks_picture)
    assert is_filler(damaged)
    assert damaged.row_lengths == ((2, 4),)
    assert damaged.companion is not None
    assert damaged.companion.rows.tolist() == []  # it belongs to none of the pairs
    assert damaged.companion.batch.row_lengths == ((2, 3),)
    assert damaged.reference_logps is not None
    assert damaged.companion.batch.reference_logps is not None
    assert [bool(batch.image_inputs) for batch in (damaged, damaged.companion.batch)] == [False, True]
    mismatched = Fillers(spec, Needs(companion=Mismatched(), reference=True))
    crossed = mismatched.batch(**lacks_picture).companion
    assert crossed is not None
    assert crossed.batch.reference_logps is None  # nobody knows its rows beforehand
    assert not crossed.batch.image_inputs
    seeing = mismatched.batch(**lacks_picture | {"picture": True})
    assert seeing.companion is not None
    assert [(len(batch.image_lengths), batch.image_slots) for batch in (seeing, seeing.companion.batch)] == [(1, ())] * 2
    chosen = Fillers(spec, Needs(responses="chosen")).batch(companion=False, reference=False, picture=False)
    assert (chosen.row_lengths, chosen.companion, chosen.reference_logps) == (((2, 3),), None, None)


def test_a_batch_keeps_what_it_has(folders: Mapping[str, Path]) -> None:
    """And gets what it lacks: pair 0 has a picture, pair 1 has none."""
    case = Case(MDPO())
    fillers = Fillers(EncoderSpec(str(folders["llava"]), "both"), case.algorithm.needs)
    seeing, blind = batches_of(case, folders["llava"], [(0,), (1,)])
    completed = [fillers.completed(batch, companion=True, picture=True) for batch in (seeing, blind)]
    assert completed[0].image_inputs is seeing.image_inputs
    assert completed[0].companion is not None
    assert completed[0].companion.batch is seeing.companion.batch if seeing.companion else False
    assert blind.companion is None
    assert completed[1].companion is not None
    assert [len(batch.image_lengths) for batch in (completed[1], completed[1].companion.batch)] == [1, 1]
    assert (completed[1].ids, completed[1].input_ids is blind.input_ids) == (("1",), True)


def test_without_fillers_batches_go_by_as_they_are(folders: Mapping[str, Path]) -> None:
    batches = batches_of(Case(DPO()), folders["llava"], [(0,), (1, 2)])
    assert list(in_step(iter(batches), None)) == batches
