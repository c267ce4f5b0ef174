"""What is trained, in which type, from which start: LoRA and its variants, full fine-tuning, frozen parts, QLoRA, stacks."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from rayalign.algorithms import DPO, RM, SFT, Algorithm, Needs
from rayalign.config.sections import ModelConfig, OptimizerConfig, TunerConfig
from rayalign.data.batch import PairBatch
from rayalign.data.store import EncodedPair
from rayalign.images.fetch import open_image
from rayalign.models.source import ModelSource
from rayalign.policy.generation import as_trained
from rayalign.policy.policy import Policy
from rayalign.policy.saving import save_policy
from rayalign.policy.tuner_checks import check_optimizer, check_tuner
from rayalign.training.loop import Trainer
from rayalign.training.metrics import MetricSums
from tests.tiny_families import TINY_FAMILIES
from tests.tiny_models import REFERRED, counts_of, encode_pair, in_float64, make_batch, make_policy, noise_image, wake_adapters

# float64 sums of the same few hundred terms in another order, through two towers and back.
FLOAT64 = 1e-10
# float32 throughout.
FLOAT32 = 1e-5

FAMILIES = ("llava", "llava_next")
ALL: Any = ("ALL",)
EVERYTHING: Any = {"freeze_vit": False, "freeze_aligner": False}

TOWER = [f"model.vision_tower.encoder.layers.{i}" for i in range(2)]
DECODER = [f"model.language_model.layers.{i}" for i in range(2)]
QKV = [f"self_attn.{p}_proj" for p in "qkv"]
OF_TOWER = [*QKV, "self_attn.out_proj", "mlp.fc1", "mlp.fc2"]
OF_DECODER = [*QKV, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
ALIGNER = {f"model.multi_modal_projector.linear_{i}" for i in (1, 2)}

WITH_IMAGES = [0, 2, 3]
"""Those of the pairs below whose chosen responses follow an image."""

RED, BLUE = noise_image(40, 30, seed=1), noise_image(20, 60, seed=2)


def pairs_of(folder: Path) -> list[EncodedPair]:
    """Four pairs; one image serves three of them, in one twice."""
    return [
        encode_pair(folder, "one", "Which digit is it?", "The digit is two.", "a cat", images=[RED]),
        encode_pair(folder, "none", "two?", "A cat sits on the mat.", "yes"),
        encode_pair(folder, "two", "describe the image.", "It", "The digit is two, the cat sits.", images=[BLUE, RED]),
        encode_pair(folder, "same", "Is it?", "it is", "the mat", images=[RED, RED]),
    ]


def steps(policy: Policy, algorithm: Algorithm, folder: Path, *, count: int = 3, **config: Any) -> list[float]:
    """Takes some optimizer steps on the pairs; the loss of each."""
    pairs = pairs_of(folder)
    settings = OptimizerConfig(**{"learning_rate": 1e-3, "warmup_ratio": 0, "lr_scheduler_type": "constant", **config})
    trainer = Trainer(policy, algorithm, settings, num_steps=count)
    losses = []
    for step in range(count):
        result = trainer.step(step, [make_batch(folder, pairs, needs=algorithm.needs)], counts_of(pairs))
        assert not result.is_skipped
        losses.append(MetricSums(result.outputs).reduce(steps=1)["loss"])
    return losses


def logps(policy: Policy, batch: PairBatch) -> Tensor:
    with torch.no_grad():
        both = policy.logps(batch, policy.image_features(batch))
    return torch.cat([both.chosen.total, both.rejected.total])


def reference(policy: Policy, batch: PairBatch) -> Tensor:
    both = policy.reference_logps(batch, policy.image_features(batch))
    return torch.cat([both.chosen.total, both.rejected.total])


def plain_logps(model: Any, folder: Path, pairs: list[EncodedPair]) -> Tensor:
    """[2 x pairs], each response by transformers' own forward of `[prompt | response]` with its pixels."""
    process = AutoProcessor.from_pretrained(folder).image_processor
    totals = []
    for side in ("chosen_ids", "rejected_ids"):
        for pair in pairs:
            images = dict(process([open_image(i) for i in pair.images], return_tensors="pt")) if pair.images else {}
            if images:
                images["pixel_values"] = images["pixel_values"].to(next(model.parameters()).dtype)
            response = list(getattr(pair, side))
            ids = torch.tensor([[*pair.prompt_ids, *response]])
            scores = model(input_ids=ids, use_cache=False, **images).logits[0, len(pair.prompt_ids) - 1 : -1].log_softmax(-1)
            totals.append(scores.gather(1, torch.tensor(response)[:, None]).sum())
    return torch.stack(totals)


def shaken(policy: Policy, *, scale: float = 0.02) -> Policy:
    """The policy with everything that is trained moved a little."""
    with torch.no_grad():
        for parameter in policy.trainable.values():
            parameter.add_(scale * torch.randn_like(parameter))
    return policy


def adapted(policy: Policy) -> set[str]:
    """The linears whose adapters are trained."""
    return {name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for name in policy.trainable}


def names(roots: list[str], linears: list[str]) -> set[str]:
    return {f"{root}.{linear}" for root in roots for linear in linears}


# Which parts are trained


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, names(DECODER, QKV)),
        ({"freeze_vit": False}, names(DECODER, QKV) | names(TOWER, QKV)),
        ({"freeze_aligner": False}, names(DECODER, QKV) | ALIGNER),
        ({"freeze_vit": False, "freeze_llm": True}, names(TOWER, QKV)),
        ({**EVERYTHING, "lora_target_modules": ALL}, names(DECODER, OF_DECODER) | names(TOWER, OF_TOWER) | ALIGNER),
        (
            {"freeze_vit": False, "lora_target_modules": ("q_proj", "fc1")},
            names(DECODER, QKV[:1]) | names(TOWER, ["mlp.fc1", QKV[0]]),
        ),
        (
            {**EVERYTHING, "lora_target_modules": (r".*(fc2|linear_2|o_proj)",)},
            names(DECODER, ["self_attn.o_proj"]) | names(TOWER, ["mlp.fc2"]) | {"model.multi_modal_projector.linear_2"},
        ),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_go_on_the_linears_of_every_part_that_is_not_frozen(
    model_folder: Callable[..., Path], family: str, flags: dict[str, Any], expected: set[str]
) -> None:
    policy = make_policy(model_folder(family), tuner=TunerConfig(**flags))
    assert adapted(policy) == expected
    assert len(policy.trainable) == 2 * len(expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_fine_tuning_trains_all_weights_of_every_part_that_is_not_frozen(
    model_folder: Callable[..., Path], family: str
) -> None:
    roots = {
        "vit": ("model.vision_tower.",),
        "aligner": ("model.multi_modal_projector.", "model.image_newline"),
        "llm": ("model.language_model.", "lm_head."),
    }
    for learning in (("llm",), ("aligner",), ("vit",), ("vit", "aligner", "llm")):
        flags: Any = {f"freeze_{part}": part not in learning for part in roots}
        policy = make_policy(model_folder(family), tuner=TunerConfig(sft_type="full", **flags))
        prefixes = tuple(root for part in learning for root in roots[part])
        assert set(policy.trainable) == {name for name, _ in policy.base.named_parameters() if name.startswith(prefixes)}


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (
            {"freeze_vit": False, "lora_target_modules": ("linear_1",)},
            "--lora_target_modules linear_1 matches no linear of the vision tower and the language model. Its linears: "
            "down_proj, fc1, fc2, gate_proj, k_proj, o_proj, out_proj, q_proj, up_proj, v_proj.",
        ),
        (
            {"freeze_aligner": False, "freeze_llm": True, "lora_target_modules": ("q_proj",)},
            "--lora_target_modules q_proj matches no linear of the aligner. Its linears: linear_1, linear_2.",
        ),
    ],
)
def test_targets_that_match_nothing_in_the_trainable_parts_are_refused(
    model_folder: Callable[..., Path], flags: dict[str, Any], error: str
) -> None:
    with pytest.raises(ValueError) as caught:
        make_policy(model_folder("llava"), tuner=TunerConfig(**flags))
    assert str(caught.value) == error


def test_a_part_without_linears_takes_no_adapter(model_folder: Callable[..., Path]) -> None:
    with pytest.raises(ValueError) as caught:
        make_policy(model_folder("gemma3"), tuner=TunerConfig(freeze_aligner=False))
    assert str(caught.value) == (
        "The model has no linear layers in its aligner, so that no adapter can go there: leave that part frozen, or use "
        "--sft_type full."
    )


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (
            {"freeze_llm": True},
            "--freeze_llm true: with --freeze_vit and --freeze_aligner nothing is left to train. Turn one of the three off.",
        ),
        ({"quant_bits": 8}, "--quant_bits 8: only 4 is supported. Pass 4, or leave the flag out."),
        *(
            (
                {"sft_type": "full", name: value},
                f"--{name} with --sft_type full: it is an option of LoRA, and full trains no adapter. Use --sft_type lora, or "
                "leave the option out.",
            )
            for name, value in (("use_rslora", True), ("use_dora", True), ("stack_adapter", True), ("quant_bits", 4))
        ),
        (
            {"bnb_4bit_quant_type": "fp4"},
            "--bnb_4bit_quant_type and --bnb_4bit_use_double_quant say how to quantise: add --quant_bits 4.",
        ),
        (
            {"stack_adapter": True, "use_dora": True},
            "--stack_adapter with --use_dora: a DoRA and another adapter can't be saved as one. Leave one of the two out.",
        ),
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError) as caught:
        TunerConfig(**flags)
    assert str(caught.value) == error


@pytest.mark.parametrize("family", ["llava", "fast_vlm"])
def test_a_frozen_tower_runs_in_bfloat16_beside_a_fully_trained_language_model(
    model_folder: Callable[..., Path], family: str
) -> None:
    folder = model_folder(family)
    model = ModelConfig(dtype="bfloat16", gradient_checkpointing=False)
    policy = make_policy(folder, model=model, tuner=TunerConfig(sft_type="full"))
    batch = make_batch(folder, pairs_of(folder))
    features = policy.image_features(batch)
    assert {part.dtype for part in features} == {torch.bfloat16}
    assert policy.logps(batch, features).chosen.total.isfinite().all()


# A tower that is trained


def loss_of(totals: Tensor) -> Tensor:
    """A loss in which the responses of a pair depend on each other."""
    chosen, rejected = totals.chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).sum() - 0.05 * chosen.sum()


@pytest.mark.parametrize(
    ("family", "sft_type", "checkpointing"),
    [("llava", "full", False), ("llava_next", "lora", True), ("llava_next", "full", True)],
)
def test_an_image_that_serves_several_pairs_gets_the_gradients_of_all_of_them(
    model_folder: Callable[..., Path], family: str, sft_type: Any, checkpointing: bool
) -> None:
    folder = model_folder(family)
    tuner = TunerConfig(sft_type=sft_type, **EVERYTHING)
    policy = wake_adapters(
        in_float64(make_policy(folder, tuner=tuner, model=ModelConfig(gradient_checkpointing=checkpointing)))
    )
    pairs = pairs_of(folder)
    batch = make_batch(folder, pairs)
    both = policy.logps(batch, policy.image_features(batch))
    weights = list(policy.trainable.values())
    ours = torch.autograd.grad(loss_of(torch.cat([both.chosen.total, both.rejected.total])), weights, allow_unused=True)
    plain = torch.autograd.grad(loss_of(plain_logps(policy.model, folder, pairs)), weights, allow_unused=True)
    largest: dict[str, float] = {}
    for name, a, b in zip(policy.trainable, ours, plain, strict=True):
        assert (a is None) == (b is None), name
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, atol=FLOAT64 * max(1.0, float(b.abs().max())), rtol=0)
            part = next((part for part in ("vision_tower", "projector", "language_model") if part in name), "other")
            largest[part] = max(largest.get(part, 0.0), float(b.abs().max()))
    assert all(largest[part] > 1e-3 for part in ("vision_tower", "projector", "language_model"))


@pytest.mark.parametrize(
    ("variant", "flags"),
    [
        ({"use_dora": True}, {}),
        ({"use_dora": True}, EVERYTHING),
        ({"use_rslora": True}, {"freeze_vit": False, "freeze_llm": True}),
    ],
    ids=["dora", "dora all parts", "rslora vit"],
)
def test_the_reference_is_the_base_model_to_the_bit_before_and_after_training(
    model_folder: Callable[..., Path], variant: dict[str, Any], flags: dict[str, Any]
) -> None:
    folder = model_folder("llava_next")
    batch = make_batch(folder, pairs_of(folder))
    with torch.no_grad():
        base = logps(make_policy(folder, tuner=TunerConfig(sft_type="full")), batch)
    policy = make_policy(folder, tuner=TunerConfig(**variant, **flags), needs=REFERRED)
    assert torch.equal(reference(policy, batch), base)
    assert torch.equal(logps(policy, batch), base)
    before = {name: p.detach().clone() for name, p in policy.trainable.items()}
    losses = steps(policy, DPO(), folder, learning_rate=1e-2)
    assert torch.equal(reference(policy, batch), base)
    assert losses[-1] < losses[0]
    assert (logps(policy, batch) - base)[WITH_IMAGES].abs().min() > 1e-3
    # LLaVA takes the features of the tower's last layer but one.
    unused = "vision_tower.encoder.layers.1"
    assert all(not torch.equal(p, before[name]) for name, p in policy.trainable.items() if unused not in name)
    assert set(policy.trainable) == set(before)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_every_familys_parts_are_told_apart_and_trained(model_folder: Callable[..., Path], family: str) -> None:
    folder = model_folder(family)
    model = make_policy(folder, tuner=TunerConfig(sft_type="full")).base
    found = {}
    for part in ("vit", "aligner", "llm"):
        flags: Any = {f"freeze_{other}": other != part for other in ("vit", "aligner", "llm")}
        found[part] = set(make_policy(folder, tuner=TunerConfig(sft_type="full", **flags)).trainable)
    whole = {name: id(p) for name, p in model.named_parameters()}
    assert sorted([*found["vit"], *found["aligner"], *found["llm"]]) == sorted(whole)
    tower = {id(p) for p in model.get_encoder(modality="image").parameters()}
    language = {id(p) for p in (*model.get_decoder().parameters(), model.get_output_embeddings().weight)}
    assert {whole[name] for name in found["llm"]} == language
    assert {whole[name] for name in found["vit"]} <= tower
    assert all("merger" in name for name in found["aligner"] if whole[name] in tower)
    # Gemma 3's aligner is a norm and a bare matrix, FastVLM's small tower convolutions: no adapter can go there.
    learning = {"vit", "aligner", "llm"} - {{"gemma3": "aligner", "fast_vlm": "vit"}.get(family, "")}
    tuner = TunerConfig(lora_target_modules=ALL, freeze_vit="vit" not in learning, freeze_aligner="aligner" not in learning)
    policy = make_policy(folder, tuner=tuner, needs=REFERRED)
    batch = make_batch(folder, pairs_of(folder))
    before = reference(policy, batch)
    weights = {name: p.detach().clone() for name, p in policy.trainable.items() if "lora_B" in name}
    steps(policy, DPO(), folder, count=2)
    assert torch.equal(reference(policy, batch), before)
    moved = {
        name.split(".lora_")[0].removeprefix("base_model.model.")
        for name, weight in weights.items()
        if not torch.equal(policy.trainable[name], weight)
    }
    for part in learning:
        roots = {name.rsplit(".", 1)[0] for name in found[part]}
        assert moved & roots, part


# rsLoRA and DoRA


def test_rslora_divides_by_the_root_of_the_rank(model_folder: Callable[..., Path]) -> None:
    scales = []
    for use_rslora in (False, True):
        policy = make_policy(model_folder("llava"), tuner=TunerConfig(lora_rank=16, lora_alpha=8, use_rslora=use_rslora))
        scales.append({m.scaling["default"] for m in policy.model.modules() if isinstance(m, LoraLayer)})
    assert scales == [{8 / 16}, {8 / 4}]


def test_dora_trains_a_magnitude_for_each_output(model_folder: Callable[..., Path]) -> None:
    policy = make_policy(model_folder("llava"), tuner=TunerConfig(use_dora=True))
    magnitudes = {name: p for name, p in policy.trainable.items() if "lora_magnitude_vector" in name}
    assert len(magnitudes) == 6
    assert len(policy.trainable) == 18
    for name, magnitude in magnitudes.items():
        weight = policy.model.get_submodule(name.split(".lora_")[0]).get_base_layer().weight
        torch.testing.assert_close(magnitude, weight.norm(dim=1))


# Precision


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_adapters_are_float32_over_half_precision_weights(
    model_folder: Callable[..., Path], tmp_path: Path, dtype: Any
) -> None:
    folder = model_folder("llava")
    config = ModelConfig(dtype=dtype, gradient_checkpointing=False)
    tuner = TunerConfig(use_dora=True, **EVERYTHING)
    policy = make_policy(folder, model=config, tuner=tuner)
    save_policy(policy, tmp_path)
    source = ModelSource(str(folder), adapter=str(tmp_path))
    for one in (policy, make_policy(source, model=config, tuner=tuner, needs=REFERRED)):
        learning = {id(p) for p in one.trainable.values()}
        assert {p.dtype for p in one.trainable.values()} == {torch.float32}
        frozen = {p.dtype for n, p in one.model.named_parameters() if id(p) not in learning and ".lora_" not in n}
        assert frozen == {getattr(torch, dtype)}


@pytest.mark.parametrize("variant", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_new_adapter_changes_nothing_in_half_precision_either(
    folder: Path, batch: PairBatch, variant: dict[str, Any], dtype: Any
) -> None:
    config = ModelConfig(dtype=dtype, gradient_checkpointing=False)
    policy = make_policy(folder, model=config, tuner=TunerConfig(lora_target_modules=ALL, **variant), needs=REFERRED)
    assert torch.equal(logps(policy, batch), reference(policy, batch))


# Numbers near 7 (loss) keep 8 (bfloat16) or 11 (float16) bits; a sum of hundreds of them in float32 averages the roundings.
HALF = {"bfloat16": 1e-2, "float16": 1e-3}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    ("algorithm", "flags", "attention"),
    [
        (DPO(), EVERYTHING, "eager"),
        (DPO(), {"use_dora": True}, "sdpa"),
        (SFT(), {"sft_type": "full"}, "sdpa"),
        (SFT(), {"sft_type": "full", **EVERYTHING}, "eager"),
        (SFT(), {"sft_type": "full", "freeze_vit": False, "freeze_llm": True}, "sdpa"),
        (RM(), {}, "sdpa"),
        (RM(), {"sft_type": "full"}, "sdpa"),
    ],
    ids=["dpo all parts", "dpo dora", "sft full", "sft full all parts", "sft full vit", "rm", "rm full"],
)
def test_training_in_half_precision_follows_training_in_float32(
    model_folder: Callable[..., Path], algorithm: Algorithm, flags: dict[str, Any], attention: Any, dtype: Any
) -> None:
    folder = model_folder("llava_next")
    losses = []
    for each in ("float32", dtype):
        config = ModelConfig(dtype=each, attn_implementation=attention)
        policy = make_policy(folder, model=config, tuner=TunerConfig(lora_dropout=0, **flags), needs=algorithm.needs)
        losses.append(torch.tensor(steps(policy, algorithm, folder)))
        assert {p.dtype for p in policy.trainable.values()} == {torch.float32}
    torch.testing.assert_close(losses[1], losses[0], atol=0, rtol=HALF[dtype])
    assert losses[0][-1] < losses[0][0]


def test_small_updates_that_bfloat16_would_lose_are_kept(model_folder: Callable[..., Path]) -> None:
    folder = model_folder("llava")
    config = ModelConfig(dtype="bfloat16", gradient_checkpointing=False)
    policy = make_policy(folder, model=config, tuner=TunerConfig(sft_type="full"), needs=SFT().needs)
    weight = policy.base.get_decoder().layers[0].mlp.up_proj.weight
    start = weight.detach().clone()
    in_bfloat16 = nn.Parameter(start.bfloat16())
    optimizer = torch.optim.AdamW([in_bfloat16], lr=1e-5, weight_decay=0)
    steps(policy, SFT(), folder, count=1, learning_rate=1e-5, weight_decay=0)
    in_bfloat16.grad = weight.grad.bfloat16()
    optimizer.step()
    # AdamW's first step moves each weight by the rate; bfloat16's next number after 0.1 is 5e-4 away.
    moved = (weight - start).abs()
    assert 0.9e-5 < moved.median() < 1.1e-5
    stuck = in_bfloat16.detach() == start.bfloat16()
    assert stuck.float().mean() > 0.95
    assert moved[stuck].min() > 0


def test_parts_that_are_frozen_in_full_fine_tuning_are_kept_in_half_precision(model_folder: Callable[..., Path]) -> None:
    config = ModelConfig(dtype="bfloat16")
    policy = make_policy(model_folder("llava"), model=config, tuner=TunerConfig(sft_type="full"))
    types = {name.split(".")[1]: p.dtype for name, p in policy.base.named_parameters()}
    assert types == {
        "vision_tower": torch.bfloat16,
        "multi_modal_projector": torch.bfloat16,
        "language_model": torch.float32,
        "weight": torch.float32,  # of the output head
    }
    seen = []
    layer = policy.base.get_decoder().layers[0].mlp.up_proj
    layer.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
    folder = model_folder("llava")
    logps(policy, make_batch(folder, pairs_of(folder)))
    assert seen == [(torch.float32, torch.bfloat16)]


@pytest.mark.parametrize("tied", [False, True])
def test_full_weights_are_saved_in_the_type_of_the_run_and_stay_as_they_are(
    model_folder: Callable[..., Path], tmp_path: Path, tied: bool
) -> None:
    config = ModelConfig(dtype="bfloat16", gradient_checkpointing=False)
    folder = model_folder("llava", tie_word_embeddings=tied)
    tuner = TunerConfig(sft_type="full", **EVERYTHING)
    policy = shaken(make_policy(folder, model=config, tuner=tuner))
    before = {name: p.detach().clone() for name, p in policy.trainable.items()}
    save_policy(policy, tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    for name, parameter in policy.trainable.items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, before[name])
    again = make_policy(tmp_path, model=config)
    batch = make_batch(folder, pairs_of(folder))
    # Linears see the same numbers; the stream between them was float32, and is bfloat16 (8 bits) now.
    torch.testing.assert_close(logps(again, batch), logps(policy, batch), atol=0, rtol=3e-2)


# Saving and loading


@pytest.mark.parametrize(
    "flags",
    [
        {"use_rslora": True, "lora_rank": 4},
        {"use_dora": True, "lora_target_modules": ALL},
        {**EVERYTHING, "lora_target_modules": ALL},
        {"freeze_aligner": False, "freeze_llm": True},
        {"sft_type": "full", "freeze_aligner": False, "freeze_llm": True},
        {"sft_type": "full", **EVERYTHING},
    ],
    ids=["rslora", "dora", "all parts", "aligner", "full aligner", "full all parts"],
)
def test_what_was_trained_gives_the_same_log_probs_when_it_is_loaded(
    model_folder: Callable[..., Path], tmp_path: Path, flags: dict[str, Any]
) -> None:
    folder = model_folder("llava_next")
    policy = shaken(make_policy(folder, tuner=TunerConfig(**flags)))
    save_policy(policy, tmp_path)
    pairs = pairs_of(folder)
    batch = make_batch(folder, pairs)
    expected = logps(policy, batch)
    full = flags.get("sft_type") == "full"
    again = make_policy(ModelSource(str(tmp_path)) if full else ModelSource(str(folder), str(tmp_path)))
    assert torch.equal(logps(again, batch), expected)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path if full else folder)
    if not full:
        model = PeftModel.from_pretrained(model, tmp_path).merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(plain_logps(model.eval(), folder, pairs), expected, atol=0, rtol=5 * FLOAT32)
    assert (logps(make_policy(folder), batch) - expected)[WITH_IMAGES].abs().min() > 1e-3


# Starting from an adapter


@pytest.fixture(scope="module")
def folder(model_folder: Callable[..., Path]) -> Path:
    return model_folder("llava")


@pytest.fixture(scope="module")
def first(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    """An adapter as an earlier run leaves it: rank 4 on all linears of tower and language model."""
    saved = tmp_path_factory.mktemp("first")
    tuner = TunerConfig(lora_rank=4, lora_alpha=6, use_rslora=True, lora_target_modules=ALL, freeze_vit=False)
    save_policy(shaken(make_policy(folder, tuner=tuner), scale=0.05), saved)
    return ModelSource(str(folder), str(saved))


@pytest.fixture(scope="module")
def batch(folder: Path) -> PairBatch:
    return make_batch(folder, pairs_of(folder))


def test_a_new_adapter_on_top_of_another_starts_from_it_and_compares_with_it(
    folder: Path, first: ModelSource, batch: PairBatch, tmp_path: Path
) -> None:
    start = logps(make_policy(first), batch)
    assert (start - logps(make_policy(folder), batch)).abs().min() > 1e-3
    tuner = TunerConfig(stack_adapter=True, lora_rank=2, lora_target_modules=("q_proj", "linear_1"), freeze_aligner=False)
    policy = make_policy(first, tuner=tuner, needs=REFERRED)
    assert torch.equal(logps(policy, batch), start)
    assert torch.equal(reference(policy, batch), start)
    assert adapted(policy) == names(DECODER, QKV[:1]) | {"model.multi_modal_projector.linear_1"}
    steps(policy, DPO(), folder, learning_rate=1e-2)
    assert torch.equal(reference(policy, batch), start)
    trained = logps(policy, batch)
    assert (trained - start).abs().min() > 1e-3
    save_policy(policy, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4 + 2, 4 + 2, str(folder))
    # One adapter now, which sums in another order: float32.
    torch.testing.assert_close(
        logps(make_policy(ModelSource(str(folder), str(tmp_path))), batch), trained, atol=0, rtol=FLOAT32
    )
    plain = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(folder), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(plain_logps(plain, folder, pairs_of(folder)), trained, atol=0, rtol=FLOAT32)


def test_the_frozen_adapter_below_has_no_dropout(folder: Path, first: ModelSource, batch: PairBatch) -> None:
    tuner = TunerConfig(stack_adapter=True, lora_dropout=0.5, freeze_vit=True)
    policy = make_policy(first, tuner=tuner, needs=Needs(dropout=True))
    # The new adapter's matrices are zero, so that its own dropout can't be seen yet.
    assert torch.equal(logps(policy, batch), logps(policy, batch))
    # With dropout a layer is computed in another order: float32.
    torch.testing.assert_close(logps(policy, batch), logps(make_policy(first), batch), atol=0, rtol=FLOAT32)


def test_full_fine_tuning_starts_from_the_merged_adapter(
    folder: Path, first: ModelSource, batch: PairBatch, tmp_path: Path
) -> None:
    start = logps(make_policy(first), batch)
    policy = make_policy(first, tuner=TunerConfig(sft_type="full"), needs=SFT().needs)
    assert not any(isinstance(module, LoraLayer) for module in policy.model.modules())
    assert all(".language_model." in name or name.startswith("lm_head") for name in policy.trainable)
    torch.testing.assert_close(logps(policy, batch), start, atol=0, rtol=FLOAT32)  # merged sums are rounded anew
    steps(policy, SFT(), folder)
    save_policy(policy, tmp_path)
    assert torch.equal(logps(make_policy(tmp_path), batch), logps(policy, batch))


def test_a_part_that_is_frozen_keeps_its_share_of_the_adapter(
    folder: Path, first: ModelSource, batch: PairBatch, tmp_path: Path
) -> None:
    policy = make_policy(first, needs=REFERRED)
    assert adapted(policy) == names(DECODER, OF_DECODER)
    start = reference(policy, batch)
    steps(policy, DPO(), folder, learning_rate=1e-2)
    save_policy(policy, tmp_path)
    assert torch.equal(logps(make_policy(ModelSource(str(folder), str(tmp_path))), batch), logps(policy, batch))
    before, after = (load_file(Path(f) / "adapter_model.safetensors") for f in (str(first.adapter), str(tmp_path)))
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]) == (".vision_tower." in name), name
    assert torch.equal(reference(policy, batch), start)
    whole = make_policy(first, tuner=TunerConfig(freeze_vit=False), needs=REFERRED)
    assert adapted(whole) == names(DECODER, OF_DECODER) | names(TOWER, OF_TOWER)


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        ({"lora_rank": 16}, ("--lora_rank 16", "has 4. Leave the flag out")),
        ({"use_dora": True}, ("--use_dora true", "has false. Leave the flag out")),
        ({"freeze_aligner": False}, ("--freeze_aligner false", "has no matrices there. Turn the flag on")),
        (
            {"lora_target_modules": ("q_proj",)},
            ("--lora_target_modules q_proj", "stands on other layers. Leave the flag out"),
        ),
    ],
)
def test_flags_that_the_adapter_to_continue_from_does_not_fit_are_refused(
    first: ModelSource, flags: dict[str, Any], error: tuple[str, str]
) -> None:
    with pytest.raises(ValueError) as caught:
        make_policy(first, tuner=TunerConfig(**flags))
    assert str(caught.value) == (
        f"{error[0]}: training continues from the adapter {first.adapter}, which {error[1]}, or train a new adapter on top of "
        "it (--stack_adapter true)."
    )


def test_flags_that_the_adapter_to_continue_from_has_are_taken(first: ModelSource) -> None:
    tuner = TunerConfig(lora_rank=4, lora_alpha=6, use_rslora=True, lora_target_modules=ALL, freeze_vit=False)
    assert len(make_policy(first, tuner=tuner).trainable) == 2 * (2 * 7 + 2 * 6)


def test_a_stack_needs_an_adapter_and_no_dora(folder: Path, tmp_path: Path) -> None:
    tuner = TunerConfig(stack_adapter=True)
    with pytest.raises(ValueError) as caught:
        make_policy(folder, tuner=tuner)
    assert str(caught.value) == (
        "--stack_adapter true: there is no adapter to stand on. Pass its folder with --adapter, or leave the flag out."
    )
    save_policy(make_policy(folder, tuner=TunerConfig(use_dora=True)), tmp_path)
    with pytest.raises(ValueError) as caught:
        make_policy(ModelSource(str(folder), str(tmp_path)), tuner=tuner)
    assert str(caught.value) == (
        f"--stack_adapter true: {tmp_path} has use_dora, which can't be saved as one with another adapter. Continue from it "
        "(leave the flag out), or merge it into its model first."
    )


def test_a_stack_stands_on_linear_layers_only(folder: Path, tmp_path: Path) -> None:
    base = AutoModelForImageTextToText.from_pretrained(folder)
    get_peft_model(base, LoraConfig(target_modules=["embed_tokens"])).save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(ValueError) as caught:
        make_policy(ModelSource(str(folder), str(tmp_path)), tuner=TunerConfig(stack_adapter=True))
    assert str(caught.value) == (
        f"--stack_adapter true: {tmp_path} adapts model.language_model.embed_tokens, which is no linear layer, and can't be "
        "saved as one with another adapter. Continue from it (leave the flag out), or merge it into its model first."
    )


# QLoRA

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason='bitsandbytes is not installed (pip install "rayalign[qlora]")'
)
# Its import compiles with torch.jit, which torch has deprecated.
compiles_on_import = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")

QLORA: Any = {"quant_bits": 4, "lora_target_modules": ALL}


def test_quantisation_without_its_package_is_refused_before_anything_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    with pytest.raises(ValueError) as caught:
        make_policy(Path("/no/such/model"), tuner=TunerConfig(**QLORA))
    assert str(caught.value) == '--quant_bits 4 needs bitsandbytes, which is not installed: pip install "rayalign[qlora]".'
    with pytest.raises(ValueError) as caught:
        check_optimizer(OptimizerConfig(optim="adamw_8bit"), on_gpu=True)
    assert str(caught.value) == '--optim adamw_8bit needs bitsandbytes, which is not installed: pip install "rayalign[qlora]".'
    check_optimizer(OptimizerConfig(), on_gpu=True)


def test_quantisation_without_a_gpu_is_refused_where_the_package_needs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    old: Any = ModuleType("bitsandbytes")
    old.__version__, old.supported_torch_devices = "0.44.1", {"cuda", "xpu"}
    old.__spec__ = importlib.util.spec_from_loader("bitsandbytes", loader=None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", old)
    tuner, source = TunerConfig(**QLORA), ModelSource("/no/such/model")
    with pytest.raises(ValueError) as caught:
        make_policy(source, tuner=tuner)
    assert str(caught.value) == (
        "--quant_bits 4 on workers without a GPU: the installed bitsandbytes 0.44.1 works on GPUs only. Update it "
        '(pip install --upgrade "rayalign[qlora]"), give each worker a GPU, or leave --quant_bits out.'
    )
    check_tuner(tuner, source, on_gpu=True)


@needs_bitsandbytes
@compiles_on_import
def test_qlora_has_the_same_gradients_after_a_forward_without_any(folder: Path, batch: PairBatch) -> None:
    policy = wake_adapters(make_policy(folder, tuner=TunerConfig(**QLORA)))

    def gradients() -> tuple[Tensor, ...]:
        totals = policy.logps(batch, policy.image_features(batch)).chosen.total
        return torch.autograd.grad(totals.sum(), list(policy.trainable.values()))

    before = gradients()
    with as_trained(policy):
        policy.logps(batch, policy.image_features(batch))
    after = gradients()
    for one, other in zip(after, before, strict=True):
        assert torch.equal(one, other)


@needs_bitsandbytes
@compiles_on_import
@pytest.mark.parametrize(
    ("dtype", "variant"),
    [("bfloat16", {}), ("float16", {"bnb_4bit_quant_type": "fp4"}), ("float32", {"use_dora": True, **EVERYTHING})],
    ids=["nf4", "fp4", "dora all parts"],
)
def test_qlora_trains_adapters_over_a_language_model_in_4_bits(
    folder: Path, batch: PairBatch, tmp_path: Path, dtype: Any, variant: dict[str, Any]
) -> None:
    config = ModelConfig(dtype=dtype)
    tuner = TunerConfig(**QLORA, **variant)
    policy = make_policy(folder, model=config, tuner=tuner, needs=REFERRED)
    linears = {n.removesuffix(".base_layer"): m for n, m in policy.base.named_modules() if isinstance(m, nn.Linear)}
    in_4_bits = {name for name, linear in linears.items() if linear.weight.dtype == torch.uint8}
    assert in_4_bits == names(DECODER, OF_DECODER)
    assert {p.dtype for p in policy.trainable.values()} == {torch.float32}
    start = reference(policy, batch)
    assert torch.equal(logps(policy, batch), start)
    # 4 bits a weight move log-probs of 20 to 60 nats, and by no more than a quarter.
    exact = reference(make_policy(folder, needs=REFERRED), batch)
    torch.testing.assert_close(start, exact, atol=0, rtol=0.25)
    assert (start - exact).abs().min() > 1e-3
    losses = steps(policy, DPO(), folder, learning_rate=1e-2)
    assert losses[-1] < losses[0]
    assert torch.equal(reference(policy, batch), start)
    save_policy(policy, tmp_path)
    again = make_policy(ModelSource(str(folder), str(tmp_path)), model=config, tuner=tuner)
    assert torch.equal(logps(again, batch), logps(policy, batch))
