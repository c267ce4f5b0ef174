import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rayalign.estimate.meter import Meter
from rayalign.ops import logprobs
from rayalign.ops.logprobs import SequenceLogps, score_tokens, sum_by_response, token_logps
from tests.watching import LargestTensor

CHUNK = 4
# Both orders of summation are exact to a few units in the last place of numbers around 10.
FLOAT64 = 1e-13


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_TOKENS", CHUNK)


def plain_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return (hidden @ weight.t()).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


def inputs(n: int, *, vocabulary: int = 11, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(n, 3, dtype=torch.float64).to(dtype)
    weight = torch.randn(vocabulary, 3, dtype=torch.float64).to(dtype)
    return hidden, weight, torch.randint(vocabulary, (n,))


def test_two_tokens_with_known_probabilities() -> None:
    hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    weight = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])
    # Logits: row 0 [0, 0] -> 1/2 each; row 1 [log 3, 0] -> 3/4 and 1/4.
    logps = token_logps(hidden, weight, torch.tensor([1, 0]))
    torch.testing.assert_close(logps, torch.tensor([math.log(1 / 2), math.log(3 / 4)]))


def test_a_target_is_the_first_choice_where_no_token_is_likelier() -> None:
    hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(CHUNK, 1)  # logits [2, 3, 1] and [1, 0, 4], over several chunks
    weight = torch.tensor([[2.0, 1.0], [3.0, 0.0], [1.0, 4.0]])
    for targets, expected in (((1, 2), (True, True)), ((0, 2), (False, True)), ((1, 0), (True, False))):
        logps, is_first_choice = score_tokens(hidden, weight, torch.tensor(targets).repeat(CHUNK), softcap=5.0)
        assert is_first_choice.tolist() == [*expected] * CHUNK
        assert torch.equal(logps, token_logps(hidden, weight, torch.tensor(targets).repeat(CHUNK), softcap=5.0))


@pytest.mark.parametrize("n", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK + 2])
def test_values_and_both_gradients_equal_the_plain_log_softmax(n: int) -> None:
    hidden, weight, targets = inputs(n)
    upstream = torch.randn(n, dtype=torch.float64)  # every token has its own factor, as in a preference loss
    results = []
    for function in (token_logps, plain_logps):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logps = function(h, w, targets)
        logps.backward(upstream)
        results.append((logps.detach(), h.grad, w.grad))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, atol=FLOAT64, rtol=FLOAT64)


def test_gradcheck_of_hidden_states_and_head() -> None:
    hidden, weight, targets = inputs(CHUNK + 2)
    given = (hidden.requires_grad_(), weight.requires_grad_(), targets)
    assert torch.autograd.gradcheck(token_logps, given)
    assert torch.autograd.gradcheck(lambda *tensors: token_logps(*tensors, softcap=1.5), given)


@pytest.mark.parametrize(("hidden_learns", "head_learns"), [(True, False), (False, True)])
def test_what_does_not_learn_gets_no_gradient(hidden_learns: bool, head_learns: bool) -> None:
    hidden, weight, targets = inputs(CHUNK + 1)
    h, w = hidden.clone().requires_grad_(hidden_learns), weight.clone().requires_grad_(head_learns)
    token_logps(h, w, targets).sum().backward()
    plain_h, plain_w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    plain_logps(plain_h, plain_w, targets).sum().backward()
    for ours, plain, learns in ((h.grad, plain_h.grad, hidden_learns), (w.grad, plain_w.grad, head_learns)):
        if learns:
            torch.testing.assert_close(ours, plain, atol=FLOAT64, rtol=FLOAT64)
        else:
            assert ours is None


def test_no_tokens_give_no_log_probs_and_zero_gradients() -> None:
    hidden, weight, targets = inputs(0)
    hidden.requires_grad_()
    weight.requires_grad_()
    logps = token_logps(hidden, weight, targets)
    assert logps.shape == (0,)
    logps.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, 3)
    assert weight.grad is not None
    assert not weight.grad.any()


def test_the_inputs_are_left_as_they_were() -> None:
    hidden, weight, targets = inputs(CHUNK + 1)
    before = hidden.clone(), weight.clone()
    token_logps(hidden.requires_grad_(), weight.requires_grad_(), targets).sum().backward()
    assert torch.equal(hidden, before[0])
    assert torch.equal(weight, before[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_states_give_float32_log_probs_and_gradients_of_their_own_type(dtype: torch.dtype) -> None:
    hidden, weight, targets = inputs(CHUNK + 1, dtype=dtype)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logps = token_logps(h, w, targets)
    assert logps.dtype == torch.float32
    # The logits are rounded by the matrix product; from there on the arithmetic is float32.
    expected = (hidden @ weight.t()).float().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(logps.detach(), expected, atol=1e-6, rtol=1e-6)
    logps.sum().backward()
    exact_h, exact_w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    plain_logps(exact_h, exact_w, targets).sum().backward()
    for ours, exact in ((h.grad, exact_h.grad), (w.grad, exact_w.grad)):
        assert ours is not None
        assert ours.dtype == dtype
        # bfloat16 keeps 8 bits: 2^-8 = 0.4 % of numbers up to 4, over a handful of additions.
        torch.testing.assert_close(ours.double(), exact, atol=0.1, rtol=0.05)


def test_no_tensor_is_larger_than_one_chunk_of_logits_forward_and_backward() -> None:
    n, vocabulary = 40 * CHUNK, 500
    hidden, weight, targets = inputs(n, vocabulary=vocabulary)
    peaks = []
    for function in (token_logps, plain_logps):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        with LargestTensor() as largest:
            function(h, w, targets).sum().backward()
        peaks.append(largest.numel)
    assert peaks == [CHUNK * vocabulary, n * vocabulary]


def test_peak_memory_does_not_grow_with_vocabulary_times_length() -> None:
    vocabulary, size = 500, 3
    peaks: dict[Any, list[int]] = {}
    for function in (token_logps, plain_logps):
        for n in (10 * CHUNK, 40 * CHUNK):
            hidden, weight, targets = inputs(n, vocabulary=vocabulary)
            h, w = hidden.requires_grad_(), weight.requires_grad_()
            with Meter([h, w, targets]) as meter:
                function(h, w, targets).sum().backward()
            peaks.setdefault(function, []).append(meter.peak)
    number = torch.float64.itemsize
    short, long = peaks[token_logps]
    # Longer by 30 chunks: states, their gradients and some numbers a token, whatever the vocabulary.
    assert long - short < 30 * CHUNK * (3 * size + 6) * number
    # A chunk's logits and probabilities and what is made of them, and three of the head: its gradient, a product, a sum.
    assert long < (4 * CHUNK * vocabulary + 3 * vocabulary * size + 40 * CHUNK * (3 * size + 6)) * number
    short, long = peaks[plain_logps]
    assert long - short > 30 * CHUNK * vocabulary * number


def test_the_average_is_per_token() -> None:
    logps = SequenceLogps(total=torch.tensor([-6.0, -1.0]), tokens=torch.tensor([3, 2]), shared=torch.zeros(2))
    assert logps.average.tolist() == [-2.0, -0.5]


def summed_one_by_one(logps: Tensor, sequences: Tensor, num_pairs: int) -> list[list[float]]:
    """[total, tokens, shared] of every response, chosen ones first, by a loop over tokens."""
    responses = [[float(x) for x, s in zip(logps, sequences, strict=True) if s == k] for k in range(2 * num_pairs)]
    lines = []
    for k, own in enumerate(responses):
        other = responses[(k + num_pairs) % (2 * num_pairs)]
        lines.append([sum(own), float(len(own)), sum(own[: len(other)])])
    return lines


@pytest.mark.parametrize(
    "lengths",
    [
        [(2, 1)],
        [(1, 3), (2, 2)],
        [(2, 0), (0, 3)],  # a single good response, a single bad one
        [(0, 1), (3, 1), (4, 0), (1, 5)],
        [(3, 0), (2, 0)],  # SFT
        [(0, 2)],
    ],
)
def test_tokens_are_summed_by_response_as_a_loop_does(lengths: list[tuple[int, int]]) -> None:
    num_pairs = len(lengths)
    # As in a batch: pair by pair, chosen before rejected.
    sequences = torch.tensor(
        [s for b, two in enumerate(lengths) for side, n in enumerate(two) for s in [b + side * num_pairs] * n]
    )
    logps = torch.randn(len(sequences), dtype=torch.float64, requires_grad=True)
    found = sum_by_response(logps, sequences, num_pairs)
    lines = [
        [side.total[b].item(), float(side.tokens[b]), side.shared[b].item()]
        for side in (found.chosen, found.rejected)
        for b in range(num_pairs)
    ]
    assert lines == [pytest.approx(line, abs=FLOAT64) for line in summed_one_by_one(logps.detach(), sequences, num_pairs)]
    assert [(int(c), int(r)) for c, r in zip(found.chosen.tokens, found.rejected.tokens, strict=True)] == lengths
    assert found.chosen.first_choices is None
    is_first_choice = torch.arange(len(sequences)) % 2 == 0
    counted = sum_by_response(logps.detach(), sequences, num_pairs, is_first_choice=is_first_choice)
    for number, side in enumerate((counted.chosen, counted.rejected)):
        assert side.first_choices is not None
        own = [is_first_choice[sequences == b + number * num_pairs].sum().item() for b in range(num_pairs)]
        assert side.first_choices.tolist() == own
    found.rejected.total.sum().backward()
    assert logps.grad is not None
    assert logps.grad.tolist() == [float(s >= num_pairs) for s in sequences]


def test_the_shared_part_of_a_response_ends_where_the_shorter_one_does() -> None:
    # Chosen: three tokens, rejected: two.
    found = sum_by_response(torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0]), torch.tensor([0, 0, 0, 1, 1]), 1)
    assert (found.chosen.total.item(), found.chosen.shared.item()) == (-7.0, -3.0)
    assert (found.rejected.total.item(), found.rejected.shared.item()) == (-24.0, -24.0)


def test_a_batch_without_response_tokens_sums_to_nothing() -> None:
    found = sum_by_response(torch.zeros(0), torch.zeros(0, dtype=torch.long), 2)
    assert found.chosen.total.tolist() == found.rejected.shared.tolist() == [0.0, 0.0]
    assert found.chosen.tokens.tolist() == [0, 0]
