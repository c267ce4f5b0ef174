"""Rows that come and go beside each other have the logits that each has by itself."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

from rayalign.policy.generation import Prefilled, prefill
from rayalign.policy.sequences import Sequences
from tests.tiny_models import encode_pair, make_batch, make_policy, noise_image


def test_a_row_has_the_same_logits_whoever_joins_and_leaves(model_folder: Callable[..., Path]) -> None:
    folder = model_folder("llava")
    policy = make_policy(folder)
    policy.model.eval()

    def read(question: str, *images: bytes) -> Prefilled:
        pair = encode_pair(folder, question, question, "a", "b", images=images)
        return prefill(policy, make_batch(folder, [dataclasses.replace(pair, chosen_ids=[], rejected_ids=[])]))

    def alone(prompt: Prefilled, tokens: list[int]) -> torch.Tensor:
        rows = Sequences(policy)
        rows.join(prompt)
        return torch.cat([rows.step([token]) for token in tokens])

    long, short = ("Describe the image. A cat sits on the mat.", noise_image(40, 30)), ("Which?",)
    with torch.no_grad():
        of_short, of_long = alone(read(*short), [5, 6, 7, 8]), alone(read(*long), [9, 10])
        rows = Sequences(policy)
        rows.join(read(*short))
        found = [rows.step([5])]
        rows.join(read(*long))
        found += [rows.step([6, 9]), rows.step([7, 10])]
        assert len(rows) == 2
        with_padding = rows.num_places
        rows.keep([0])
        found.append(rows.step([8]))
        assert (len(rows), rows.num_places) == (1, read(*short).num_tokens + 4)
        rows.keep([])
        rows.join(read(*short))
        found.append(rows.step([5]))
    assert with_padding == read(*long).num_tokens + 2
    # Sums over more places, which are rounded otherwise.
    torch.testing.assert_close(torch.cat([logits[:1] for logits in found[:4]]), of_short, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.cat([logits[1:] for logits in found[1:3]]), of_long, atol=1e-5, rtol=0)
    assert torch.equal(found[4], of_short[:1])
