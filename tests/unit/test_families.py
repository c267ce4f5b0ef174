"""The contract of every model family: a shared-prefix row is worth two plain rows of the model as transformers runs it."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor

import rayalign.policy
from rayalign.algorithms import DPO, Needs
from rayalign.batch import PAD, PairBatch
from rayalign.config import ModelConfig, TunerConfig
from rayalign.images import open_image
from rayalign.policy import Policy
from rayalign.prepared import EncodedPair
from tests.tiny_models import FAMILIES, encode_pair, in_float64, make_batch, make_policy, noise_image, totals_of, wake_adapters

# float64 sums of the same few hundred terms in another order, through two layers and back.
FLOAT64 = 1e-10
# In eager attention transformers computes the softmax in float32, whose rounding is 6e-8 at each of the two layers.
EAGER = 1e-5
# float32 throughout.
FLOAT32 = 1e-5

VISION_TOWERS = {"llava": "model.vision_tower", "llava_next": "model.vision_tower"}
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
OTHERS = ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
NO_MATCH = (
    "matches no linear of the language model. Its linears: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj."
)

SQUARE, WIDE, TALL = noise_image(28, 28, seed=1), noise_image(90, 30, seed=2), noise_image(20, 47, seed=3)
TEXT_ONLY = ("text", "Which digit is it?", "two", "A cat sits on the mat.", ())
ONE_IMAGE = ("one", "Which digit is it?", "The digit is two.", "a cat", (WIDE,))
SEVERAL = ("several", "describe the image.", "A cat.", "The digit is a mat on the cat.", (TALL, SQUARE, WIDE))
SAME_AGAIN = ("again", "Is it the digit?", "it is", "the", (WIDE, WIDE))
CASES = {
    "text": [TEXT_ONLY],
    "one image": [ONE_IMAGE],
    "several images": [SEVERAL],
    "a mixed batch": [ONE_IMAGE, TEXT_ONLY, SEVERAL, SAME_AGAIN],
}


def pairs_of(folder: Path, case: str) -> list[EncodedPair]:
    return [encode_pair(folder, *texts, images=images) for *texts, images in CASES[case]]


def plain_logps(model: Any, folder: Path, prompts: Sequence[EncodedPair], responses: Sequence[Sequence[int]]) -> Tensor:
    """[B], the model as transformers documents it: a causal row `[prompt | response]`, padded on the right, with pixels."""
    rows = [[*p.prompt_ids, *response] for p, response in zip(prompts, responses, strict=True)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    places = torch.arange(width)
    lengths = torch.tensor([[len(p.prompt_ids), len(row)] for p, row in zip(prompts, rows, strict=True)])
    images = [open_image(content) for p in prompts for content in p.images]
    inputs = AutoProcessor.from_pretrained(folder).image_processor(images, return_tensors="pt") if images else {}
    if images:
        inputs["pixel_values"] = inputs["pixel_values"].to(next(model.parameters()).dtype)
    attended = (places < lengths[:, 1:]).long()
    logits = model(input_ids=ids, attention_mask=attended, use_cache=False, **inputs).logits
    logps = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    in_response = (places[1:] >= lengths[:, :1]) & (places[1:] < lengths[:, 1:])
    return (logps * in_response).sum(1)


def two_plain_rows(policy: Policy, folder: Path, pairs: Sequence[EncodedPair]) -> tuple[Tensor, Tensor]:
    responses = [p.chosen_ids for p in pairs], [p.rejected_ids for p in pairs]
    return plain_logps(policy.model, folder, pairs, responses[0]), plain_logps(policy.model, folder, pairs, responses[1])


def one_shared_row(policy: Policy, batch: PairBatch) -> tuple[Tensor, Tensor]:
    logps = policy.logps(batch, policy.image_features(batch))
    return logps.chosen.total, logps.rejected.total


def loss_and_gradients(policy: Policy, totals: tuple[Tensor, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """A loss in which every pair's responses depend on each other, and the gradients of everything that learns."""
    chosen, rejected = totals
    loss = -F.logsigmoid(0.1 * (chosen - rejected)).sum() - 0.05 * chosen.sum()
    gradients = torch.autograd.grad(loss, list(policy.trainable.values()), allow_unused=True)
    assert all(gradient is not None for gradient in gradients)
    return loss.detach(), list(gradients)


def assert_same_loss_and_gradient(policy: Policy, folder: Path, case: str, tolerance: float) -> None:
    pairs = pairs_of(folder, case)
    ours = loss_and_gradients(policy, one_shared_row(policy, make_batch(folder, pairs)))
    plain = loss_and_gradients(policy, two_plain_rows(policy, folder, pairs))
    torch.testing.assert_close(ours[0], plain[0], atol=0, rtol=tolerance)
    largest = max(float(gradient.abs().max()) for gradient in plain[1])
    assert largest > 1e-3
    for a, b in zip(ours[1], plain[1], strict=True):
        torch.testing.assert_close(a, b, atol=tolerance * largest, rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_row_equals_two_plain_rows_in_loss_and_gradient(
    model_folder: Callable[..., Path], family: str, case: str, attention: Any, checkpointing: bool
) -> None:
    folder = model_folder(family)
    config = ModelConfig(attn_implementation=attention, gradient_checkpointing=checkpointing)
    policy = wake_adapters(in_float64(make_policy(folder, model=config, tuner=TunerConfig(lora_target_modules=("ALL",)))))
    assert_same_loss_and_gradient(policy, folder, case, FLOAT64 if attention == "sdpa" else EAGER)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_row_equals_two_plain_rows_in_full_fine_tuning(model_folder: Callable[..., Path], family: str) -> None:
    folder = model_folder(family)
    policy = in_float64(make_policy(folder, tuner=TunerConfig(sft_type="full")))
    assert_same_loss_and_gradient(policy, folder, "a mixed batch", FLOAT64)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_row_equals_two_plain_rows_under_a_sliding_window(
    model_folder: Callable[..., Path], family: str, attention: Any
) -> None:
    folder = model_folder(family, sliding_window=9)  # prompts are longer, so the window cuts into them
    config = ModelConfig(attn_implementation=attention, gradient_checkpointing=True)
    policy = wake_adapters(in_float64(make_policy(folder, model=config)))
    if attention == "sdpa":
        assert_same_loss_and_gradient(policy, folder, "a mixed batch", FLOAT64)
    else:  # one pair: transformers' own eager softmax makes NaN of padding that the window leaves without a key
        assert_same_loss_and_gradient(policy, folder, "several images", EAGER)
    batch = make_batch(folder, pairs_of(folder, "a mixed batch"))
    unbounded = in_float64(make_policy(model_folder(family)))  # the same weights, no window
    difference = one_shared_row(policy, batch)[0] - one_shared_row(wake_adapters(unbounded), batch)[0]
    assert difference.abs().min() > 1e-3


@pytest.mark.parametrize("fault", ["leaked mask", "positions run on", "images swapped"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_comparison_notices_a_fault(
    model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, family: str, fault: str
) -> None:
    folder = model_folder(family)
    policy = wake_adapters(in_float64(make_policy(folder)))
    twins = noise_image(40, 40, seed=8), noise_image(40, 40, seed=9)  # of one size, so that their features fit both places
    pairs = [encode_pair(folder, "twins", "Is it?", "A cat", "The digit", images=twins), *pairs_of(folder, "several images")]
    batch = make_batch(folder, pairs)
    if fault == "leaked mask":
        honest = rayalign.policy.attention_mask

        def leaked(segments: Tensor, positions: Tensor, *, sliding_window: int | None) -> Tensor:
            return honest(segments.clamp(max=1), positions, sliding_window=sliding_window)  # both responses as one

        monkeypatch.setattr(rayalign.policy, "attention_mask", leaked)
    elif fault == "positions run on":
        batch = dataclasses.replace(batch, position_ids=torch.arange(batch.input_ids.shape[1]).expand_as(batch.input_ids))
    else:
        first, second, *rest = batch.image_slots
        batch = dataclasses.replace(batch, image_slots=(second, first, *rest))
    with torch.no_grad():
        plain = two_plain_rows(policy, folder, pairs)
        broken = one_shared_row(policy, batch)
    assert max(float((a - b).abs().max()) for a, b in zip(broken, plain, strict=True)) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_holds_no_log_probs(model_folder: Callable[..., Path], family: str) -> None:
    folder = model_folder(family)
    policy = in_float64(make_policy(folder))
    pairs = pairs_of(folder, "a mixed batch")
    batch = make_batch(folder, pairs)
    noisy = dataclasses.replace(batch, input_ids=batch.input_ids.masked_fill(batch.segment_ids == PAD, 77))
    for a, b in zip(one_shared_row(policy, batch), one_shared_row(policy, noisy), strict=True):
        assert torch.equal(a, b)
    logps = policy.logps(batch, policy.image_features(batch))
    assert logps.chosen.tokens.tolist() == [len(p.chosen_ids) for p in pairs]
    assert logps.rejected.tokens.tolist() == [len(p.rejected_ids) for p in pairs]


@pytest.mark.parametrize("family", FAMILIES)
def test_image_token_counts_are_the_lengths_of_the_models_features(model_folder: Callable[..., Path], family: str) -> None:
    folder = model_folder(family)
    policy = make_policy(folder)
    sides = (5, 14, 27, 28, 29, 43, 56, 100, 333)
    pairs = [
        encode_pair(folder, f"{w}x{h}", "?", "a", "b", images=[noise_image(w, h, seed=w * h)]) for w in sides for h in sides
    ]
    batch = make_batch(folder, pairs)
    lengths = [len(features) for features in policy.image_features(batch)]
    assert policy.family.image_token_counts(policy.base.config, batch.image_inputs) == lengths
    assert [pair.prompt_ids.count(policy.base.config.image_token_id) for pair in pairs] == lengths


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_vision_tower_runs_once_for_each_distinct_image_and_never_backward(
    model_folder: Callable[..., Path], family: str, checkpointing: bool
) -> None:
    folder = model_folder(family)
    policy = wake_adapters(make_policy(folder, model=ModelConfig(gradient_checkpointing=checkpointing)))
    pairs = pairs_of(folder, "a mixed batch")
    batch = make_batch(folder, pairs)
    runs = {"tower": 0, "backward": 0, "layer": 0}

    def count(name: str) -> Callable[..., None]:
        return lambda *arguments: runs.update({name: runs[name] + 1})

    tower = policy.base.get_submodule(VISION_TOWERS[family])
    tower.register_forward_hook(count("tower"))
    next(m for m in tower.modules() if isinstance(m, nn.Linear)).register_full_backward_hook(count("backward"))
    policy.base.get_decoder().layers[0].mlp.register_forward_pre_hook(count("layer"))
    output = DPO().step(policy, batch, totals_of(pairs))
    output.loss_share.backward()
    # Layers run for the policy and the reference; checkpointing runs the policy's again in the backward pass.
    assert runs == {"tower": 1, "backward": 0, "layer": 3 if checkpointing else 2}
    assert len(batch.image_inputs["pixel_values"]) == 3
    assert batch.image_slots == (0, 1, 2, 0, 0, 0)


@pytest.mark.parametrize(
    ("modules", "linears"),
    [
        (("DEFAULT",), ATTENTION),
        (("ALL",), (*ATTENTION, *OTHERS)),
        (("o_proj", "up_proj"), ("self_attn.o_proj", "mlp.up_proj")),
        ((r".*\.self_attn\.[qo]_proj",), ("self_attn.q_proj", "self_attn.o_proj")),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_stand_on_exactly_these_linears_of_the_language_model(
    model_folder: Callable[..., Path], family: str, modules: tuple[str, ...], linears: tuple[str, ...]
) -> None:
    policy = make_policy(model_folder(family), tuner=TunerConfig(lora_target_modules=modules))
    expected = {f"base_model.model.model.language_model.layers.{i}.{name}" for i in range(2) for name in linears}
    assert {name.rsplit(".lora_", 1)[0] for name in policy.trainable} == expected
    assert len(policy.trainable) == 2 * len(expected)


@pytest.mark.parametrize(
    ("modules", "error"),
    [
        (("query_proj",), f"query_proj {NO_MATCH}"),
        (("q_proj", "typo_proj"), f"typo_proj {NO_MATCH}"),  # never one that matches and one that is left out in silence
        (("*q_proj",), "'*q_proj' is no valid regular expression: nothing to repeat at position 0."),
    ],
)
def test_targets_that_match_nothing_are_refused_with_the_names_there_are(
    model_folder: Callable[..., Path], modules: tuple[str, ...], error: str
) -> None:
    with pytest.raises(ValueError) as caught:
        make_policy(model_folder("llava"), tuner=TunerConfig(lora_target_modules=modules))
    assert str(caught.value) == f"--lora_target_modules {error}"


@pytest.mark.parametrize("sft_type", ["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_gives_the_same_log_probs_in_transformers_and_peft(
    model_folder: Callable[..., Path], tmp_path: Path, family: str, sft_type: Any
) -> None:
    folder = model_folder(family)
    policy = make_policy(folder, tuner=TunerConfig(sft_type=sft_type))
    with torch.no_grad():
        for parameter in policy.trainable.values():
            parameter.add_(0.02 * torch.randn_like(parameter))
    policy.save(tmp_path)
    assert {f.suffix for f in tmp_path.iterdir()} <= {".safetensors", ".json", ".md"}
    pairs = pairs_of(folder, "a mixed batch")
    with torch.no_grad():
        expected = one_shared_row(policy, make_batch(folder, pairs))[0]
        base = AutoModelForImageTextToText.from_pretrained(folder)
        before = plain_logps(base, folder, pairs, [p.chosen_ids for p in pairs])
        if sft_type == "full":
            models = [AutoModelForImageTextToText.from_pretrained(tmp_path)]
        else:
            models = [PeftModel.from_pretrained(base, tmp_path)]
        again = [plain_logps(model.eval(), folder, pairs, [p.chosen_ids for p in pairs]) for model in models]
        if sft_type == "lora":
            again.append(plain_logps(models[0].merge_and_unload(), folder, pairs, [p.chosen_ids for p in pairs]))
    for logps in again:
        torch.testing.assert_close(logps, expected, atol=0, rtol=FLOAT32)
    assert (expected - before).abs().min() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_is_off_where_two_policies_are_compared(model_folder: Callable[..., Path], family: str) -> None:
    folder = model_folder(family, attention_dropout=0.3)
    batch = make_batch(folder, pairs_of(folder, "one image"))
    tuner = TunerConfig(lora_dropout=0.5)
    compared = wake_adapters(make_policy(folder, tuner=tuner))
    assert compared.base.get_decoder().training
    runs = [one_shared_row(compared, batch)[0] for _ in range(3)]
    compared.base.eval()
    assert all(torch.equal(run, one_shared_row(compared, batch)[0]) for run in runs)
    supervised = wake_adapters(make_policy(folder, tuner=tuner, needs=Needs(dropout=True)))
    assert not torch.equal(one_shared_row(supervised, batch)[0], one_shared_row(supervised, batch)[0])
