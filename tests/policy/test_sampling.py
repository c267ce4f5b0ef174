"""Responses drawn in batches: as many as asked of one prefill, the same whatever runs beside them, and with the right odds."""

import dataclasses
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from rayalign.config.sections import ModelConfig, TunerConfig
from rayalign.data.encoder_spec import EncoderSpec
from rayalign.data.store import EncodedPair
from rayalign.policy.generation import Sampling, as_trained, choose, end_tokens, greedy_ids, sample_responses
from rayalign.policy.policy import Policy
from tests.tiny_families import TINY_FAMILIES, TINY_TEXT_MODELS
from tests.tiny_models import encode_pair, make_batch, make_policy, noise_image, wake_adapters

DRAWN = Sampling(n=3, temperature=1.0, top_p=0.9, max_new_tokens=12, seed=5)


def prompts_of(folder: Path, *, text_only: bool = False) -> list[EncodedPair]:
    questions: list[tuple[str, tuple[bytes, ...]]] = [
        ("Which digit is it?", ()),
        ("describe the image.", (noise_image(90, 30, seed=2),)),
        ("Is it the same?", (noise_image(20, 47, seed=3), noise_image(28, 28, seed=1))),
        ("a cat", ()),
    ]
    shown = [(question, images) for question, images in questions if not (text_only and images)]
    return [encode_pair(folder, f"p{i}", q, "It is two.", "a cat", images=images) for i, (q, images) in enumerate(shown)]


def awake(folder: Path, attention: str = "sdpa") -> Policy:
    model = ModelConfig(attn_implementation=attention, gradient_checkpointing=False)  # type: ignore[arg-type]  # a literal
    return wake_adapters(make_policy(folder, model=model, tuner=TunerConfig(lora_target_modules=("ALL",))), scale=0.3)


def ids_of(policy: Policy, folder: Path, prompts: list[EncodedPair], sampling: Sampling) -> list[list[list[int]]]:
    drawn = sample_responses(policy, EncoderSpec(str(folder), "chosen"), prompts, sampling)
    return [[response.ids for response in responses] for responses in drawn]


@pytest.mark.parametrize("family", [*TINY_FAMILIES, *TINY_TEXT_MODELS])
def test_greedy_responses_of_a_batch_are_those_of_each_prompt_alone(model_folder: Callable[..., Path], family: str) -> None:
    folder = model_folder(family)
    policy = awake(folder, "eager" if family == "gemma2" else "sdpa")
    prompts = prompts_of(folder, text_only=family in TINY_TEXT_MODELS)
    together = ids_of(policy, folder, prompts, Sampling(max_new_tokens=12))
    ends = end_tokens(policy, EncoderSpec(str(folder), "chosen"))
    for prompt, (found,) in zip(prompts, together, strict=True):
        batch = make_batch(folder, [dataclasses.replace(prompt, chosen_ids=[], rejected_ids=[])])
        with as_trained(policy):
            assert found == greedy_ids(policy, batch, end_tokens=ends, max_new_tokens=12)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_a_prompts_responses_are_the_same_whatever_runs_beside_it_and_however_many_there_are(
    model_folder: Callable[..., Path], family: str
) -> None:
    folder = model_folder(family)
    policy, prompts = awake(folder), prompts_of(folder)
    together = ids_of(policy, folder, prompts, DRAWN)
    assert len({tuple(ids) for responses in together for ids in responses}) > 6
    for i, prompt in enumerate(prompts):
        assert ids_of(policy, folder, [prompt], DRAWN) == [together[i]]
    fewer = ids_of(policy, folder, prompts[::-1], dataclasses.replace(DRAWN, n=2))
    assert fewer == [responses[:2] for responses in together[::-1]]
    assert ids_of(policy, folder, prompts, dataclasses.replace(DRAWN, seed=6)) != together


def test_a_response_ends_where_it_and_its_prompt_have_the_longest_length(model_folder: Callable[..., Path]) -> None:
    folder = model_folder("llava")
    policy, prompts = awake(folder), prompts_of(folder)
    free = sample_responses(policy, EncoderSpec(str(folder), "chosen"), prompts, DRAWN)
    longest = make_batch(folder, [dataclasses.replace(prompts[2], chosen_ids=[], rejected_ids=[])]).position_ids.shape[-1] + 4
    cut = sample_responses(policy, EncoderSpec(str(folder), "chosen", max_length=longest), prompts, DRAWN)
    assert [[r.ids for r in responses] for responses in cut[:2]] == [[r.ids for r in responses] for responses in free[:2]]
    assert [r.ids for r in cut[2]] == [r.ids[:4] for r in free[2]]
    assert [r.is_ended for r in cut[2]] == [r.is_ended and len(r.ids) < 4 for r in free[2]]
    assert any(len(r.ids) > 4 for r in free[2])  # or nothing was cut


def test_a_prompt_is_read_once_for_all_of_its_responses(
    model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_folder("llava")
    policy, read = awake(folder), []
    behind = Policy.logits_behind_prompt
    monkeypatch.setattr(Policy, "logits_behind_prompt", lambda *words: read.append(1) or behind(*words))
    sample_responses(policy, EncoderSpec(str(folder), "chosen"), prompts_of(folder)[:2], DRAWN)
    assert len(read) == 2


def test_responses_end_at_the_end_token_which_is_left_out_and_the_others_go_on(model_folder: Callable[..., Path]) -> None:
    folder = model_folder("llava")
    policy, prompts = awake(folder), prompts_of(folder)
    spec = EncoderSpec(str(folder), "chosen")
    before = sample_responses(policy, spec, prompts, DRAWN)
    stop = before[0][0].ids[2]
    policy.base.generation_config.eos_token_id = [stop]
    after = sample_responses(policy, spec, prompts, DRAWN)
    for old, new in zip(chain(*before), chain(*after), strict=True):
        cut = old.ids.index(stop) if stop in old.ids else len(old.ids)
        assert new.ids == old.ids[:cut]
        assert new.is_ended == (old.is_ended or stop in old.ids)
    assert after[0][0].is_ended


def test_tokens_are_drawn_with_their_probabilities_and_none_from_beyond_top_p() -> None:
    logits = torch.log(torch.tensor([0.1, 0.5, 0.15, 0.25])).expand(4000, 4)
    draws = torch.as_tensor(np.random.default_rng(0).random(4000))
    drawn = choose(logits, draws, Sampling(temperature=1.0))
    assert np.allclose(np.bincount(drawn, minlength=4) / 4000, [0.1, 0.5, 0.15, 0.25], atol=0.03)
    hot = choose(logits, draws, Sampling(temperature=2.0))  # shares go with the square roots
    roots = np.sqrt([0.1, 0.5, 0.15, 0.25])
    assert np.allclose(np.bincount(hot, minlength=4) / 4000, roots / roots.sum(), atol=0.03)
    nucleus = choose(logits, draws, Sampling(temperature=1.0, top_p=0.7))
    assert np.allclose(np.bincount(nucleus, minlength=4) / 4000, [0, 2 / 3, 0, 1 / 3], atol=0.03)
    assert choose(logits[:1], torch.tensor([1.0]), Sampling(temperature=1.0)).tolist() == [3]
    assert choose(logits[:2], draws[:2], Sampling()).tolist() == [1, 1]
