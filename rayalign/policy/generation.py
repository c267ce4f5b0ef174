"""What the policy itself says to a prompt: its likeliest token each time, by the forward that it is trained with.

Nothing of a training changes by it: no random number is drawn, no mode and no compiled code is another one afterwards.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import DynamicCache

from rayalign.data.batch import PairBatch, assemble
from rayalign.data.encoder_spec import EncoderSpec, image_processing
from rayalign.data.store import EncodedPair
from rayalign.policy.policy import Policy
from rayalign.policy.sharding import agreed


def generate_answers(policy: Policy, spec: EncoderSpec, pairs: Sequence[EncodedPair], *, max_new_tokens: int) -> list[str]:
    """The policy's own greedy answer to the prompt of each pair, one after another, as text without the end token."""
    ends = end_tokens(policy, spec)
    answers = []
    with as_trained(policy):
        for pair in pairs:
            prompt = dataclasses.replace(pair, chosen_ids=[], rejected_ids=[], reference=None)
            batch = assemble([prompt], layout=spec.layout, process_images=image_processing(spec)).to(policy.device)
            ids = greedy_ids(policy, batch, end_tokens=ends, max_new_tokens=max_new_tokens)
            answers.append(spec.tokenizer.decode(ids, skip_special_tokens=True).strip())
    return answers


def greedy_ids(policy: Policy, batch: PairBatch, *, end_tokens: frozenset[int], max_new_tokens: int) -> list[int]:
    """The likeliest token behind the batch's one prompt, the likeliest behind that, and so on to an end token, which is left
    out, or to the limit. No setting of the model's generation config but its end tokens counts."""
    cache = DynamicCache(config=policy.base.get_decoder().config)
    position_ids = batch.position_ids.amax().expand(*batch.position_ids.shape[:-1], 1)
    ids: list[int] = []
    logits = policy.logits_behind_prompt(batch, policy.image_features(batch), cache)
    while (token := agreed(policy, int(logits.argmax()))) not in end_tokens:
        ids.append(token)
        if len(ids) == max_new_tokens:
            break
        position_ids = position_ids + 1
        logits = policy.logits_behind_token(torch.tensor([[token]], device=policy.device), position_ids, cache)
    return ids


def end_tokens(policy: Policy, spec: EncoderSpec) -> frozenset[int]:
    """The tokens that end a response: the one that trained responses end with, and those of the model's generation config."""
    own = policy.base.generation_config.eos_token_id
    listed = own if isinstance(own, list) else [] if own is None else [own]
    return frozenset({spec.tokenizer.eos_token_id, *listed})


@contextmanager
def as_trained(policy: Policy) -> Iterator[None]:
    """Within it, the policy is as a user of the trained model has it: no dropout, no checkpointing of activations, no graph.
    Compiled layers run as they are written: other shapes and a cache would make new code of them, of which there is only so
    much."""
    training = [module for module in policy.model.modules() if module.training]
    policy.model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module in training:
            module.training = True
