"""What a policy answers is what transformers' own generate makes of its saved model, and the training does not notice."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig

from rayalign.algorithms import DPO, SFT, Algorithm
from rayalign.config.sections import ModelConfig, OptimizerConfig, TunerConfig
from rayalign.data.encoder_spec import EncoderSpec
from rayalign.data.store import EncodedPair
from rayalign.images.fetch import open_image
from rayalign.models.processors import load_processor, tokenizer_of
from rayalign.models.registry import find_family
from rayalign.policy.generation import as_trained, end_tokens, generate_answers, greedy_ids
from rayalign.policy.policy import Policy
from rayalign.policy.saving import save_policy
from rayalign.training.loop import Trainer
from tests.tiny_families import TINY_FAMILIES, TINY_TEXT_MODELS
from tests.tiny_models import counts_of, encode_pair, make_batch, make_policy, noise_image, wake_adapters

ALL_LINEARS = TunerConfig(lora_target_modules=("ALL",))
LENGTH = 24
QUESTIONS: tuple[tuple[str, tuple[bytes, ...]], ...] = (
    ("Which digit is it?", ()),
    ("describe the image.", (noise_image(90, 30, seed=2),)),
    ("Is it the same?", (noise_image(20, 47, seed=3), noise_image(28, 28, seed=1))),
)


def pairs_of(folder: Path, *, text_only: bool = False) -> list[EncodedPair]:
    return [
        encode_pair(folder, str(i), question, "It is two.", "a cat", images=images)
        for i, (question, images) in enumerate(QUESTIONS)
        if not (text_only and images)
    ]


def answers_of(policy: Policy, folder: Path, pairs: Sequence[EncodedPair], length: int = LENGTH) -> list[str]:
    return generate_answers(policy, EncoderSpec(str(folder), responses="both"), pairs, max_new_tokens=length)


def ids_of(policy: Policy, folder: Path, pairs: Sequence[EncodedPair], length: int = LENGTH) -> list[list[int]]:
    """The ids of the same answers."""
    ends = end_tokens(policy, EncoderSpec(str(folder), responses="both"))
    batches = [make_batch(folder, [dataclasses.replace(pair, chosen_ids=[], rejected_ids=[])]) for pair in pairs]
    with as_trained(policy):
        return [greedy_ids(policy, batch, end_tokens=ends, max_new_tokens=length) for batch in batches]


def by_transformers(model: Any, folder: Path, question: str, images: Sequence[bytes]) -> list[int]:
    """The ids that `generate` of a model, loaded from its files, puts behind the processor's output for a conversation."""
    processor = load_processor(str(folder))
    tokenizer = tokenizer_of(processor)
    family = find_family(AutoConfig.from_pretrained(folder).model_type)
    parts: Any = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
    turns = [{"role": "user", "content": question if family.text_only else parts}]
    template = processor.chat_template or tokenizer.chat_template or family.chat_template
    prompt = processor.apply_chat_template(turns, chat_template=template, add_generation_prompt=True, tokenize=False)
    if images:
        opened = [open_image(content) for content in images]
        inputs = processor(text=[prompt], images=[opened], add_special_tokens=False, return_tensors="np")
    else:
        text = f"<s>{prompt}\n" if family.model_type == "paligemma" else prompt
        inputs = tokenizer([text], add_special_tokens=False, return_tensors="np")
        if family.model_type in ("paligemma", "gemma3"):
            inputs["token_type_ids"] = np.zeros_like(inputs["input_ids"])
    left_out = ("labels", "num_crops", "num_patches")
    inputs = {name: torch.as_tensor(value) for name, value in inputs.items() if name not in left_out}
    with torch.no_grad():
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=LENGTH)
    answer: list[int] = ids[0, inputs["input_ids"].shape[1] :].tolist()
    return answer[:-1] if answer[-1] == tokenizer.eos_token_id else answer


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        (name, kernel)
        for name in (*TINY_FAMILIES, *TINY_TEXT_MODELS)
        for kernel in ("sdpa", "eager")
        if (name, kernel) != ("gemma2", "sdpa")
    ],  # transformers has no such Gemma 2
)
def test_greedy_answers_are_those_of_transformers(
    model_folder: Callable[..., Path], tmp_path: Path, family: str, attention: Any
) -> None:
    folder = model_folder(family)
    text_only = family in TINY_TEXT_MODELS
    policy = make_policy(
        folder, model=ModelConfig(attn_implementation=attention, gradient_checkpointing=True), tuner=ALL_LINEARS
    )
    save_policy(wake_adapters(policy, scale=0.3), tmp_path)
    base = policy.family.auto_class.from_pretrained(folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, tmp_path).eval()
    questions = [(question, images) for question, images in QUESTIONS if not (text_only and images)]
    expected = [by_transformers(model, folder, question, images) for question, images in questions]
    assert ids_of(policy, folder, pairs_of(folder, text_only=text_only)) == expected


@pytest.mark.parametrize(
    ("algorithm", "tuner", "checkpointing"),
    [
        (DPO(), ALL_LINEARS, False),
        (DPO(), ALL_LINEARS, True),
        (SFT(), TunerConfig(lora_dropout=0.5), True),  # whose dropout draws random numbers in the steps
        (SFT(), TunerConfig(sft_type="full"), False),
    ],
)
def test_a_training_is_the_same_to_the_bit_with_answers_in_between(
    model_folder: Callable[..., Path], algorithm: Algorithm, tuner: TunerConfig, checkpointing: bool
) -> None:
    folder = model_folder("llava")
    pairs = pairs_of(folder)
    batch = make_batch(folder, pairs, needs=algorithm.needs)
    weights, drawn, answers = [], [], []
    for answers_between in (False, True):
        policy = make_policy(
            folder, model=ModelConfig(gradient_checkpointing=checkpointing), tuner=tuner, needs=algorithm.needs
        )
        trainer = Trainer(policy, algorithm, OptimizerConfig(learning_rate=1e-2), num_steps=3)
        modes = [module.training for module in policy.model.modules()]
        for step in range(3):
            if answers_between:
                answers.append(answers_of(policy, folder, pairs, 8))
            trainer.step(step, [batch], counts_of(pairs))
        assert [module.training for module in policy.model.modules()] == modes
        weights.append({name: p.detach().clone() for name, p in policy.trainable.items()})
        drawn.append(torch.rand(4))
    assert answers[0] != answers[2]
    assert torch.equal(*drawn)
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name


def test_answers_end_at_the_end_token_and_at_the_limit(model_folder: Callable[..., Path]) -> None:
    folder = model_folder("llava")
    policy = make_policy(folder)
    pairs, spec = pairs_of(folder)[1:2], EncoderSpec(str(folder), responses="both")
    (ids,) = ids_of(policy, folder, pairs, 8)
    assert len(ids) == 8
    assert ids_of(policy, folder, pairs, 3) == [ids[:3]]
    policy.base.generation_config.eos_token_id = [5, ids[2]]
    assert end_tokens(policy, spec) == {spec.tokenizer.eos_token_id, 5, ids[2]}
    assert ids_of(policy, folder, pairs, 8) == [ids[: ids.index(ids[2])]]
    assert answers_of(policy, folder, pairs, 8) == [spec.tokenizer.decode(ids[: ids.index(ids[2])]).strip()]


def test_a_sampling_model_and_a_penalty_in_its_settings_change_no_answer(model_folder: Callable[..., Path]) -> None:
    folder = model_folder("qwen2_5_vl")
    policy = make_policy(folder)
    before = answers_of(policy, folder, pairs_of(folder))
    policy.base.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=5.0)
    assert answers_of(policy, folder, pairs_of(folder)) == before


def test_answers_in_bfloat16_and_of_fully_trained_weights(model_folder: Callable[..., Path]) -> None:
    folder = model_folder("qwen2_vl")
    for tuner in (ALL_LINEARS, TunerConfig(sft_type="full")):
        policy = make_policy(folder, model=ModelConfig(dtype="bfloat16", gradient_checkpointing=True), tuner=tuner)
        assert all(answers_of(policy, folder, pairs_of(folder)))
