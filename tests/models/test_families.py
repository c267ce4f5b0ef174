"""The contract of every model family: a shared-prefix row is worth two plain rows of the model as transformers runs it.

The matrix of families and checks is printed at the end of the run.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from rayalign.algorithms import DPO, KTO, MDPO, Needs
from rayalign.config.sections import ModelConfig, TunerConfig
from rayalign.data.batch import PairBatch, assemble
from rayalign.data.store import EncodedPair
from rayalign.images.fetch import open_image
from rayalign.models.family import RowLayout
from rayalign.models.processors import describe_images, load_processor, tokenizer_of
from rayalign.models.registry import find_family
from rayalign.ops.rows import PAD
from rayalign.policy.policy import Policy
from rayalign.policy.saving import save_policy
from tests.tiny_families import MISTRAL, TINY_FAMILIES, TINY_TEXT_MODELS, VISION, TinyFamily
from tests.tiny_models import (
    FAMILIES,
    counts_of,
    encode_pair,
    in_float64,
    make_batch,
    make_policy,
    noise_image,
    save_model,
    wake_adapters,
)

# float64 sums of the same few hundred terms in another order, through two layers and back.
FLOAT64 = 1e-10
# Some towers and all eager attention compute parts in float32, whose rounding is 6e-8 at each of the two layers.
MIXED = 1e-5
# float32 throughout.
FLOAT32 = 1e-5
EXACT_TOWERS = ("llava", "llava_next")

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
OTHERS = ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
NO_MATCH = (
    "matches no linear of the language model. Its linears: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj."
)
IMAGE = 3
ALL_LINEARS = TunerConfig(lora_target_modules=("ALL",))

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
    # Of one size, so that their features fit both places.
    "twins": [("twins", "Is it?", "A cat", "The digit", (noise_image(40, 40, seed=8), noise_image(40, 40, seed=9))), SEVERAL],
}


def pairs_of(folder: Path, case: str) -> list[EncodedPair]:
    return [encode_pair(folder, *texts, images=images) for *texts, images in CASES[case]]


def model_type_of(folder: Path) -> str:
    model_type: str = AutoConfig.from_pretrained(folder).model_type
    return model_type


def tolerance_of(family: str, attention: str = "sdpa") -> float:
    return FLOAT64 if attention == "sdpa" and family in EXACT_TOWERS else MIXED


def plain_inputs(folder: Path, texts: tuple[Any, ...], response: Sequence[int]) -> dict[str, Tensor]:
    """What the family's own processor makes of a prompt, and the response behind it: a causal row as transformers documents
    it."""
    _, question, _, _, contents = texts
    model_type = model_type_of(folder)
    processor = load_processor(str(folder))
    images = [open_image(content) for content in contents]
    parts = [{"type": "image"} for _ in images] + [{"type": "text", "text": question}]
    turns = [{"role": "user", "content": question if find_family(model_type).text_only else parts}]
    template = processor.chat_template or find_family(model_type).chat_template
    prompt = processor.apply_chat_template(turns, chat_template=template, add_generation_prompt=True, tokenize=False)
    options = {"add_special_tokens": False, "return_tensors": "np"}
    if images:
        inputs = processor(text=[prompt], images=[images], **options)
    else:
        inputs = tokenizer_of(processor)([f"<s>{prompt}\n" if model_type == "paligemma" else prompt], **options)
    row = {
        name: torch.from_numpy(value) for name, value in inputs.items() if name not in ("labels", "num_crops", "num_patches")
    }
    ids = row["input_ids"]
    row["input_ids"] = torch.cat([ids, torch.tensor([response])], dim=1)
    row["attention_mask"] = torch.ones_like(row["input_ids"])
    if "mm_token_type_ids" in row:
        row["mm_token_type_ids"] = F.pad(row["mm_token_type_ids"], (0, len(response)))
    if model_type == "gemma3":  # 1: part of an image
        row["token_type_ids"] = F.pad(row.get("token_type_ids", torch.zeros_like(ids)), (0, len(response)))
    if model_type == "paligemma":  # 1: of the response
        row["token_type_ids"] = F.pad(torch.zeros_like(ids), (0, len(response)), value=1)
    return row


def plain_logp(model: Any, folder: Path, texts: tuple[Any, ...], pair: EncodedPair, response: Sequence[int]) -> Tensor:
    """[], the log-probability of a response by the model's own forward, with pixels."""
    inputs = plain_inputs(folder, texts, response)
    prompt = inputs["input_ids"].shape[1] - len(response)
    assert inputs["input_ids"][0, :prompt].tolist() == pair.prompt_ids
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(next(model.parameters()).dtype)
    logits = model(**inputs, use_cache=False).logits[0, prompt - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum()


def plain_logps(model: Any, folder: Path, case: str, pairs: Sequence[EncodedPair], side: str) -> Tensor:
    """[B], of the responses on one side."""
    return torch.stack(
        [
            plain_logp(model, folder, texts, pair, getattr(pair, f"{side}_ids"))
            for texts, pair in zip(CASES[case], pairs, strict=True)
        ]
    )


def two_plain_rows(policy: Policy, folder: Path, case: str, pairs: Sequence[EncodedPair]) -> tuple[Tensor, Tensor]:
    return tuple(plain_logps(policy.model, folder, case, pairs, side) for side in ("chosen", "rejected"))


def one_shared_row(policy: Policy, batch: PairBatch) -> tuple[Tensor, Tensor]:
    logps = policy.logps(batch, policy.image_features(batch))
    return logps.chosen.total, logps.rejected.total


def loss_and_gradients(policy: Policy, totals: tuple[Tensor, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """A loss in which every pair's responses depend on each other, and the gradients of all trainable weights."""
    chosen, rejected = totals
    loss = -F.logsigmoid(0.1 * (chosen - rejected)).sum() - 0.05 * chosen.sum()
    gradients = torch.autograd.grad(loss, list(policy.trainable.values()), allow_unused=True)
    assert all(gradient is not None for gradient in gradients)
    return loss.detach(), list(gradients)


def assert_same_loss_and_gradient(policy: Policy, folder: Path, case: str, tolerance: float) -> None:
    pairs = pairs_of(folder, case)
    ours = loss_and_gradients(policy, one_shared_row(policy, make_batch(folder, pairs)))
    plain = loss_and_gradients(policy, two_plain_rows(policy, folder, case, pairs))
    torch.testing.assert_close(ours[0], plain[0], atol=0, rtol=tolerance)
    largest = max(float(gradient.abs().max()) for gradient in plain[1])
    assert largest > 1e-3
    for a, b in zip(ours[1], plain[1], strict=True):
        torch.testing.assert_close(a, b, atol=tolerance * largest, rtol=0)


@pytest.mark.parametrize(("attention", "checkpointing"), [("sdpa", False), ("sdpa", True), ("eager", True)])
@pytest.mark.parametrize("case", ["text", "a mixed batch"])
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_a_shared_row_equals_two_plain_rows_in_loss_and_gradient(
    model_folder: Callable[..., Path], family: str, case: str, attention: Any, checkpointing: bool
) -> None:
    folder = model_folder(family)
    config = ModelConfig(attn_implementation=attention, gradient_checkpointing=checkpointing)
    policy = wake_adapters(in_float64(make_policy(folder, model=config, tuner=ALL_LINEARS)))
    assert_same_loss_and_gradient(policy, folder, case, tolerance_of(family, attention))


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_a_shared_row_equals_two_plain_rows_in_full_fine_tuning(model_folder: Callable[..., Path], family: str) -> None:
    folder = model_folder(family)
    policy = in_float64(make_policy(folder, tuner=TunerConfig(sft_type="full")))
    assert_same_loss_and_gradient(policy, folder, "a mixed batch", tolerance_of(family))


@pytest.mark.parametrize("family", TINY_TEXT_MODELS)
def test_a_language_model_runs_like_one_with_images(model_folder: Callable[..., Path], family: str) -> None:
    folder = model_folder(family)
    # Gemma 2 caps its attention's logits, which only eager attention does.
    config = ModelConfig(attn_implementation="eager" if family == "gemma2" else "sdpa", gradient_checkpointing=False)
    policy = wake_adapters(in_float64(make_policy(folder, model=config, tuner=ALL_LINEARS)))
    assert_same_loss_and_gradient(policy, folder, "text", MIXED)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_row_equals_two_plain_rows_under_a_sliding_window(
    model_folder: Callable[..., Path], family: str, attention: Any
) -> None:
    folder = model_folder(family, sliding_window=9)  # prompts are longer, so the window cuts into them
    config = ModelConfig(attn_implementation=attention, gradient_checkpointing=True)
    policy = wake_adapters(in_float64(make_policy(folder, model=config)))
    assert_same_loss_and_gradient(policy, folder, "a mixed batch", tolerance_of(family, attention))
    batch = make_batch(folder, pairs_of(folder, "a mixed batch"))
    unbounded = in_float64(make_policy(model_folder(family)))  # the same weights, no window
    difference = one_shared_row(policy, batch)[0] - one_shared_row(wake_adapters(unbounded), batch)[0]
    assert difference.abs().min() > 1e-3


def test_layers_of_two_kinds_each_get_their_own_window(model_folder: Callable[..., Path]) -> None:
    for family in ("internvl", "qwen2_5_vl"):
        folder = model_folder(family, use_sliding_window=True, sliding_window=9, max_window_layers=1)
        policy = wake_adapters(in_float64(make_policy(folder)))
        assert_same_loss_and_gradient(policy, folder, "a mixed batch", MIXED)


@pytest.mark.parametrize("fault", ["leaked mask", "positions run on", "images swapped"])
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_the_comparison_notices_a_fault(model_folder: Callable[..., Path], family: str, fault: str) -> None:
    folder = model_folder(family)
    policy = wake_adapters(in_float64(make_policy(folder)))
    pairs = pairs_of(folder, "twins")
    batch = make_batch(folder, pairs)
    if fault == "leaked mask":
        batch = dataclasses.replace(batch, segment_ids=batch.segment_ids.clamp(max=1))  # both responses as one
    elif fault == "positions run on":
        batch = dataclasses.replace(batch, position_ids=torch.arange(batch.input_ids.shape[1]).expand_as(batch.position_ids))
    else:
        first, second, *rest = batch.image_slots
        batch = dataclasses.replace(batch, image_slots=(second, first, *rest))
    with torch.no_grad():
        plain = two_plain_rows(policy, folder, "twins", pairs)
        broken = one_shared_row(policy, batch)
    assert max(float((a - b).abs().max()) for a, b in zip(broken, plain, strict=True)) > 1e-2


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_another_pairs_responses_put_to_a_prompt_have_their_own_log_probs(
    model_folder: Callable[..., Path], family: str
) -> None:
    folder = model_folder(family)
    policy = wake_adapters(in_float64(make_policy(folder)))
    pairs = pairs_of(folder, "a mixed batch")
    batch = make_batch(folder, pairs, needs=KTO().needs)
    assert batch.companion is not None
    with torch.no_grad():
        logps = policy.logps(batch.companion.batch, policy.image_features(batch))
        crossed = [
            dataclasses.replace(pair, chosen_ids=other.chosen_ids, rejected_ids=other.rejected_ids)
            for pair, other in zip(pairs, [*pairs[1:], pairs[0]], strict=True)
        ]
        plain = two_plain_rows(policy, folder, "a mixed batch", crossed)
    for ours, theirs in zip((logps.chosen.total, logps.rejected.total), plain, strict=True):
        torch.testing.assert_close(ours, theirs, atol=0, rtol=MIXED)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_damaged_images_run_beside_the_true_ones(model_folder: Callable[..., Path], family: str) -> None:
    folder = model_folder(family)
    policy = wake_adapters(make_policy(folder, needs=MDPO().needs))
    pairs = pairs_of(folder, "a mixed batch")
    batch = make_batch(folder, pairs, needs=MDPO().needs)
    output = MDPO().loss(policy, batch, counts_of(pairs))
    output.loss.backward()
    assert torch.isfinite(output.loss)
    assert batch.companion is not None
    damaged = batch.companion.batch
    true, false = policy.logps(batch, policy.image_features(batch)), policy.logps(damaged, policy.image_features(damaged))
    assert (true.chosen.total[batch.companion.rows] - false.chosen.total).abs().min() > 1e-3


@pytest.mark.parametrize("family", TINY_FAMILIES)
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


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_image_token_counts_are_the_lengths_of_the_models_features(model_folder: Callable[..., Path], family: str) -> None:
    folder = model_folder(family)
    policy = make_policy(folder)
    sides = (5, 14, 27, 28, 29, 43, 56, 100, 333) if family in EXACT_TOWERS else (9, 28, 43, 100, 333)
    pairs = [
        encode_pair(folder, f"{w}x{h}", "?", "a", "b", images=[noise_image(w, h, seed=w * h)]) for w in sides for h in sides
    ]
    batch = make_batch(folder, pairs)
    lengths = [len(features) for features in policy.image_features(batch)]
    assert list(batch.image_lengths) == lengths
    assert [pair.prompt_ids.count(policy.image_token_id) for pair in pairs] == lengths


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("family", TINY_FAMILIES)
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

    tower = policy.base.get_submodule(TINY_FAMILIES[family].tower)
    tower.register_forward_hook(count("tower"))
    next(m for m in tower.modules() if isinstance(m, nn.Linear | nn.Conv2d)).register_full_backward_hook(count("backward"))
    policy.base.get_decoder().layers[0].mlp.register_forward_pre_hook(count("layer"))
    output = DPO().loss(policy, batch, counts_of(pairs))
    output.loss.backward()
    # Layers run for the policy and the reference; checkpointing runs the policy's again in the backward pass.
    assert runs == {"tower": 1, "backward": 0, "layer": 3 if checkpointing else 2}
    if policy.family.features_by_company:  # WIDE alone, then WIDE and the others beside others
        assert batch.image_slots == (0, 1, 2, 3, 3, 3)
    else:
        assert batch.image_slots == (0, 1, 2, 0, 0, 0)
    assert len(batch.image_lengths) == len(set(batch.image_slots))


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_adapters_stand_on_exactly_the_language_models_linears(model_folder: Callable[..., Path], family: str) -> None:
    for modules in ("DEFAULT", "ALL"):
        policy = make_policy(model_folder(family), tuner=TunerConfig(lora_target_modules=(modules,)))
        decoder = policy.base.get_decoder()
        prefix = next(name for name, module in policy.base.named_modules() if module is decoder)
        assert "vision" not in prefix
        assert "visual" not in prefix
        layers = {
            f"base_model.model.{prefix}.{name}"
            for name, module in decoder.named_modules()
            if isinstance(getattr(module, "base_layer", module), nn.Linear) and not re.search(r"\.(base_layer|lora_)", name)
        }
        expected = {name for name in layers if modules == "ALL" or name.endswith(("q_proj", "k_proj", "v_proj"))}
        assert {name.rsplit(".lora_", 1)[0] for name in policy.trainable} == expected
        assert len(policy.trainable) == 2 * len(expected)
        assert len(expected) == 2 * (3 if modules == "DEFAULT" else 6 if family.startswith("glm") else 7)


@pytest.mark.parametrize(
    ("modules", "linears"),
    [
        (("DEFAULT",), ATTENTION),
        (("ALL",), (*ATTENTION, *OTHERS)),
        (("o_proj", "up_proj"), ("self_attn.o_proj", "mlp.up_proj")),
        ((r".*\.self_attn\.[qo]_proj",), ("self_attn.q_proj", "self_attn.o_proj")),
    ],
)
def test_adapters_stand_on_the_linears_that_are_named(
    model_folder: Callable[..., Path], modules: tuple[str, ...], linears: tuple[str, ...]
) -> None:
    policy = make_policy(model_folder("llava"), tuner=TunerConfig(lora_target_modules=modules))
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
@pytest.mark.parametrize("family", [*TINY_FAMILIES, "llama"])
def test_a_saved_model_gives_the_same_log_probs_in_transformers_and_peft(
    model_folder: Callable[..., Path], tmp_path: Path, family: str, sft_type: Any
) -> None:
    folder = model_folder(family)
    case = "text" if family in TINY_TEXT_MODELS else "a mixed batch"
    load = (AutoModelForCausalLM if family in TINY_TEXT_MODELS else AutoModelForImageTextToText).from_pretrained
    policy = make_policy(folder, tuner=TunerConfig(sft_type=sft_type))
    with torch.no_grad():
        for parameter in policy.trainable.values():
            parameter.add_(0.02 * torch.randn_like(parameter))
    save_policy(policy, tmp_path)
    assert {f.suffix for f in tmp_path.iterdir()} <= {".safetensors", ".json", ".md"}
    pairs = pairs_of(folder, case)
    with torch.no_grad():
        expected = one_shared_row(policy, make_batch(folder, pairs))[0]
        base = load(folder)
        before = plain_logps(base, folder, case, pairs, "chosen")
        models = [load(tmp_path)] if sft_type == "full" else [PeftModel.from_pretrained(base, tmp_path)]
        again = [plain_logps(model.eval(), folder, case, pairs, "chosen") for model in models]
        if sft_type == "lora":
            again.append(plain_logps(models[0].merge_and_unload(), folder, case, pairs, "chosen"))
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


def pixtral_llava(vision: dict[str, Any], text: dict[str, Any]) -> Any:
    return transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


def mistral3(vision: dict[str, Any], text: dict[str, Any]) -> Any:
    return transformers.Mistral3Config(vision_config=vision, text_config=text, image_token_index=IMAGE, spatial_merge_size=2)


@pytest.mark.parametrize("make_config", [pixtral_llava, mistral3])
def test_a_tower_for_pictures_of_any_size(tmp_path: Path, make_config: Callable[..., Any]) -> None:
    """Its processor needs torchvision, so the inputs are made by hand: two pictures, padded to one size."""
    vision = {**VISION, "model_type": "pixtral", "image_size": 56, "head_dim": 8}
    save_model(tmp_path, TinyFamily(TINY_TEXT_MODELS["llama"].processor, lambda processor, text: make_config(vision, MISTRAL)))
    policy = wake_adapters(in_float64(make_policy(tmp_path)))
    tensors = {
        "pixel_values": torch.rand(2, 3, 56, 42, dtype=torch.float64),
        "image_sizes": torch.tensor([[56, 28], [28, 42]]),
    }
    images = describe_images(policy.family, policy.base.config, tensors)
    assert images.lengths == ((8 * 4, 4 * 6) if make_config is pixtral_llava else (4 * 2, 2 * 3))
    first, second = images.lengths
    prompt = [1, 10, 11, *[IMAGE] * first, 12, *[IMAGE] * second, 13]
    pair = EncodedPair("a", prompt, [20, 21, 2], [22, 2], [b"0", b"1"], ["0", "1"])
    layout = RowLayout(pad_token_id=0, image_token_id=IMAGE)
    batch = assemble([pair], layout=layout, process_images=lambda contents, alone: images)
    with torch.no_grad():
        ours = one_shared_row(policy, batch)
        for side, response in zip(ours, (pair.chosen_ids, pair.rejected_ids), strict=True):
            ids = torch.tensor([[*prompt, *response]])
            logits = policy.model(input_ids=ids, attention_mask=torch.ones_like(ids), **tensors).logits[0, len(prompt) - 1 : -1]
            plain = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum()
            torch.testing.assert_close(side[0], plain, atol=0, rtol=MIXED)
