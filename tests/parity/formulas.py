"""The papers' losses of a whole optimizer step, in NumPy float64 on plain lists of pairs: the oracle of `test_formulas`.

A formula gets the log-prob of every response token and the flags, and returns one number; it knows nothing of batches, masks,
workers or autograd. Formulas also take complex log-probs, which is how `slopes` differentiates them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Number = float | complex

EXACT = 1e-12
"""How far, relatively, a torch implementation in float64 may be from a formula: both round each operation to 1e-16, in another
order, and some intermediate results are about a hundred times the final one."""


@dataclass(frozen=True)
class Response:
    """Log-probs [n] of a response's tokens, by the policy and by the reference."""

    policy: NDArray[Any]
    reference: Array


@dataclass(frozen=True)
class Pair:
    """What a formula sees of a pair. KTO's may lack one of the responses; `damaged`: the chosen response given damaged images;
    `strangers`: responses to another prompt, put to this one."""

    chosen: Response | None = None
    rejected: Response | None = None
    damaged: Response | None = None
    strangers: tuple[Response, ...] = ()


Formula = Callable[[Sequence[Pair], Mapping[str, Any]], Number]
"""(pairs of the step, flags by name) -> the step's loss."""


def slopes(function: Callable[[NDArray[Any]], Number], at: Array) -> Array:
    """The gradient of a function of [n] by the complex step, Im f(x + ih) / h: with h = 1e-30 it has neither truncation nor
    cancellation, and is as exact as the function (Squire and Trapp 1998, https://doi.org/10.1137/S003614459631241X)."""
    step, found = 1e-30, np.empty_like(at)
    for i in range(len(at)):
        moved = at.astype(np.complex128)
        moved[i] += 1j * step
        found[i] = np.imag(function(moved)) / step
    return found


# --- what the formulas are made of


def log_sigmoid(x: Number) -> Number:
    """log(1 / (1 + e^-x)); of the two ways to write it, the one whose exponential can't overflow."""
    return -np.log1p(np.exp(-x)) if np.real(x) >= 0 else x - np.log1p(np.exp(x))


def sigmoid(x: Number) -> Number:
    return np.exp(log_sigmoid(x))


def bradley_terry(lead: Number, wrong: float = 0.0) -> Number:
    """-log of the probability of a label under Bradley-Terry, if labels are swapped with probability `wrong`."""
    return -(1 - wrong) * log_sigmoid(lead) - wrong * log_sigmoid(-lead)


def log_ratio(response: Response) -> Number:
    """log pi(y|x) / pi_ref(y|x)."""
    return np.sum(response.policy) - np.sum(response.reference)


def mean(numbers: Sequence[Number]) -> Number:
    return sum(numbers) / len(numbers)


def cross_entropy(pairs: Sequence[Pair]) -> Number:
    """Token mean over all chosen responses of the step."""
    return -mean([logp for pair in pairs for logp in pair.chosen.policy])


# --- the algorithms


def sft(pairs: Sequence[Pair], flags: Mapping[str, Any]) -> Number:
    return cross_entropy(pairs)


def divergence_slope(ratio: Number, flags: Mapping[str, Any]) -> Number:
    """f'(u) - f'(1) at u = pi / pi_ref, given log u: what stands for log u in DPO's loss under the divergence of f (table 1 of
    https://arxiv.org/abs/2309.16240). An f is known up to a multiple of u - 1, so that f'(1) is free: with 0 here, equal
    policies have no reward. Its alpha is 1 - f_alpha_divergence_coef."""
    alpha = 1 - flags["f_alpha_divergence_coef"]

    def slope(log_u: Number) -> Number:
        match flags["f_divergence_type"]:
            case "reverse_kl":  # f(u) = u log u
                return log_u + 1
            case "forward_kl":  # f(u) = -log u
                return -np.exp(-log_u)
            case "js_divergence":  # f(u) = u log u - (u + 1) log((u + 1) / 2)
                return np.log(2) + log_sigmoid(log_u)
            case "alpha_divergence":  # f(u) = (u^(1 - a) - (1 - a) u - a) / (a (a - 1)), and its limit at a = 0
                return (1 - np.exp(-alpha * log_u)) / alpha if alpha else log_u
        raise KeyError(flags["f_divergence_type"])

    return slope(ratio) - slope(0.0)


def length_desensitised(pair: Pair, alpha: float) -> Pair:
    """https://arxiv.org/abs/2409.06411: of either response, what goes beyond the other one's length counts alpha."""
    shorter = min(len(pair.chosen.policy), len(pair.rejected.policy))

    def weighted(response: Response) -> Response:
        weights = np.where(np.arange(len(response.policy)) < shorter, 1.0, alpha)
        return Response(response.policy * weights, response.reference * weights)

    return Pair(weighted(pair.chosen), weighted(pair.rejected))


def dpo_of_pair(name: str, pair: Pair, flags: Mapping[str, Any]) -> Number:
    """One pair's loss, for the losses that are a mean over pairs."""
    beta, wrong = flags["beta"], flags["label_smoothing"]
    chosen, rejected = log_ratio(pair.chosen), log_ratio(pair.rejected)
    seen_chosen, seen_rejected = divergence_slope(chosen, flags), divergence_slope(rejected, flags)
    lead = beta * (seen_chosen - seen_rejected)
    lead_per_token = seen_chosen / len(pair.chosen.policy) - seen_rejected / len(pair.rejected.policy)
    match name:
        case "sigmoid":  # equation 7 of 2305.18290
            return bradley_terry(lead, wrong)
        case "sigmoid_norm":  # section 5.1.2 of 2411.15124
            return bradley_terry(beta * lead_per_token)
        case "hinge":  # equation 10 of 2309.06657
            return 1 - lead if np.real(lead) < 1 else 0 * lead
        case "ipo":  # equation 17 of 2310.12036, with tau = beta
            return (lead_per_token - 1 / beta / 2) ** 2
        case "exo_pair":  # equation 16 of 2402.00856: KL(policy's preference || label's)
            policy, label = (sigmoid(lead), sigmoid(-lead)), (1 - wrong, wrong)
            return sum(
                p * (logp - np.log(q)) for p, logp, q in zip(policy, map(log_sigmoid, (lead, -lead)), label, strict=True)
            )
        case "nca_pair":  # 2402.05369 with K = 2
            return -(log_sigmoid(beta * chosen) + sum(log_sigmoid(-beta * r) for r in (chosen, rejected)) / 2)
        case "robust":  # 2403.00409
            return ((1 - wrong) * bradley_terry(lead) - wrong * bradley_terry(-lead)) / (1 - 2 * wrong)
        case "bco_pair":  # 2404.04656, with delta = 0
            return -log_sigmoid(beta * chosen) - log_sigmoid(-beta * rejected)
        case "sppo_hard":  # equation 4.7 of 2405.00675, with eta = 1 / beta and P = 1 or 0
            eta = 1 / beta
            return (chosen - eta * (1 - 0.5)) ** 2 + (rejected - eta * (0 - 0.5)) ** 2
        case "apo_zero":  # equation 7 of 2408.06266; both terms as probabilities
            return sigmoid(-beta * chosen) + sigmoid(beta * rejected)
        case "apo_down":  # equation 8 of 2408.06266; both terms as probabilities
            return sigmoid(beta * chosen) + sigmoid(beta * (rejected - chosen))
        case "discopop":  # equation 5 of 2406.08414
            share = sigmoid(lead / flags["discopop_tau"])
            return (1 - share) * np.log(1 + np.exp(-lead)) + share * np.exp(-lead)
    raise KeyError(name)


def dpo(pairs: Sequence[Pair], flags: Mapping[str, Any]) -> Number:
    names, beta, wrong = flags["loss_type"], flags["beta"], flags["label_smoothing"]
    likelihood = cross_entropy(pairs)
    if flags["reference_free"]:
        pairs = [Pair(*(Response(r.policy, np.zeros(len(r.reference))) for r in (p.chosen, p.rejected))) for p in pairs]
    if flags["ld_alpha"] is not None:
        pairs = [length_desensitised(pair, flags["ld_alpha"]) for pair in pairs]

    def quantiles(numbers: Sequence[Number]) -> list[Number]:
        return sorted(numbers, key=np.real)

    def of_step(name: str) -> Number:
        match name:
            case "sft":
                return likelihood
            case "aot":  # 2406.05882, paired: margins of the policy should exceed those of the reference, quantile by quantile
                ours = quantiles([np.sum(p.chosen.policy) - np.sum(p.rejected.policy) for p in pairs])
                theirs = quantiles([np.sum(p.chosen.reference) - np.sum(p.rejected.reference) for p in pairs])
                return mean([bradley_terry(beta * (a - b), wrong) for a, b in zip(ours, theirs, strict=True)])
            case "aot_unpaired":  # 2406.05882, unpaired: log-ratios of chosen responses should exceed those of rejected ones
                good = quantiles([log_ratio(p.chosen) for p in pairs])
                bad = quantiles([log_ratio(p.rejected) for p in pairs])
                return mean([bradley_terry(beta * (a - b), wrong) for a, b in zip(good, bad, strict=True)])
            case _:
                return mean([dpo_of_pair(name, pair, flags) for pair in pairs])

    weights = flags["loss_weights"] or [1.0] * len(names)
    return sum(w * of_step(name) for w, name in zip(weights, names, strict=True)) + flags["rpo_alpha"] * likelihood


def mdpo(pairs: Sequence[Pair], flags: Mapping[str, Any]) -> Number:
    """Section 3 of https://arxiv.org/abs/2406.11839: DPO + conditional preference + anchor. A pair without images has no
    conditional preference."""
    beta, losses = flags["beta"], []
    for pair in pairs:
        chosen, rejected = log_ratio(pair.chosen), log_ratio(pair.rejected)
        loss = -log_sigmoid(beta * chosen - beta * rejected)
        if pair.damaged is not None:
            loss += flags["conditional_weight"] * -log_sigmoid(beta * chosen - beta * log_ratio(pair.damaged))
        losses.append(loss + flags["anchor_weight"] * -log_sigmoid(beta * chosen - flags["anchor_delta"]))
    return mean(losses)


def cpo(pairs: Sequence[Pair], flags: Mapping[str, Any]) -> Number:
    """https://arxiv.org/abs/2401.08417: L_prefer + alpha L_NLL."""
    leads = [flags["beta"] * (np.sum(pair.chosen.policy) - np.sum(pair.rejected.policy)) for pair in pairs]
    preference = mean([bradley_terry(lead, flags["label_smoothing"]) for lead in leads])
    return preference + flags["cpo_alpha"] * cross_entropy(pairs)


def simpo(pairs: Sequence[Pair], flags: Mapping[str, Any]) -> Number:
    """Equation 6 of https://arxiv.org/abs/2405.14734, and CPO's likelihood term."""
    losses = []
    for pair in pairs:
        rewards = [flags["beta"] / len(response.policy) * np.sum(response.policy) for response in (pair.chosen, pair.rejected)]
        losses.append(-log_sigmoid(rewards[0] - rewards[1] - flags["simpo_gamma"]))
    return mean(losses) + flags["cpo_alpha"] * cross_entropy(pairs)


def orpo(pairs: Sequence[Pair], flags: Mapping[str, Any]) -> Number:
    """Equations 3 to 7 of https://arxiv.org/abs/2403.07691, with lambda = beta."""

    def log_odds(response: Response) -> Number:
        probability = np.exp(np.mean(response.policy))
        return np.log(probability / (1 - probability))

    penalties = [-log_sigmoid(log_odds(pair.chosen) - log_odds(pair.rejected)) for pair in pairs]
    return cross_entropy(pairs) + flags["beta"] * mean(penalties)


def kl_estimate(pairs: Sequence[Pair]) -> float:
    """z of section 4.1 of https://arxiv.org/abs/2402.01306, which no gradient flows through: a real number."""
    return max(0.0, float(np.real(mean([log_ratio(response) for pair in pairs for response in pair.strangers]))))


def kto(pairs: Sequence[Pair], flags: Mapping[str, Any]) -> Number:
    """Section 4.1 of https://arxiv.org/abs/2402.01306: the mean of lambda - v over all responses of the step."""
    z, beta = kl_estimate(pairs), flags["beta"]
    losses = []
    for pair in pairs:
        if pair.chosen is not None:
            good = flags["desirable_weight"]
            losses.append(good - good * sigmoid(beta * (log_ratio(pair.chosen) - z)))
        if pair.rejected is not None:
            bad = flags["undesirable_weight"]
            losses.append(bad - bad * sigmoid(beta * (z - log_ratio(pair.rejected))))
    return mean(losses)


FORMULAS: Mapping[str, Formula] = {
    "sft": sft,
    "dpo": dpo,
    "mdpo": mdpo,
    "cpo": cpo,
    "simpo": simpo,
    "orpo": orpo,
    "kto": kto,
}
"""All but the reward model's, whose responses have values and no log-probs."""


def rm(values: Sequence[tuple[Number, Number]], margins: Sequence[float], flags: Mapping[str, Any]) -> Number:
    """Equation 1 of https://arxiv.org/abs/2203.02155 with the margin of https://arxiv.org/abs/2307.09288 (equation 2), and
    the centring of https://arxiv.org/abs/2312.09244; `values` (chosen, rejected) of each pair."""
    preference = mean([-log_sigmoid(good - bad - margin) for (good, bad), margin in zip(values, margins, strict=True)])
    return preference + flags["center_rewards_coefficient"] * mean([(good + bad) ** 2 for good, bad in values])


# --- from hidden states to log-probs and back


@dataclass(frozen=True)
class Row:
    """A prompt of `prompt` tokens, its chosen and its rejected response one after the other: the states of all tokens
    [n, HIDDEN], by the policy and by the reference."""

    name: str
    prompt: int
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    states: Array
    reference_states: Array

    def predicted_at(self) -> tuple[list[int], list[int]]:
        """Places of the states that predict the tokens of either response: the prompt's end, then each token but the last."""
        end = self.prompt + len(self.chosen)
        chosen = [self.prompt - 1, *range(self.prompt, end - 1)] if self.chosen else []
        rejected = [self.prompt - 1, *range(end, end + len(self.rejected) - 1)] if self.rejected else []
        return chosen, rejected

    def last_tokens(self) -> tuple[int, int]:
        """Places of either response's last token."""
        return self.prompt + len(self.chosen) - 1, self.prompt + len(self.chosen) + len(self.rejected) - 1


@dataclass(frozen=True)
class PairRows:
    """The rows of one pair: its own; with damaged images; with another pair's responses."""

    own: Row
    damaged: Row | None = None
    strange: Row | None = None
    margin: float = 0.0


@dataclass(frozen=True)
class Expected:
    """A step's loss, and its gradient by all states of each row, by the row's name."""

    loss: float
    gradients: dict[str, Array]
    value_head: Array | None = None


def log_softmax(states: Array, head: Array) -> Array:
    logits = states @ head.T
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


def token_logps(states: Array, tokens: Sequence[int], head: Array) -> Array:
    return log_softmax(states, head)[range(len(tokens)), list(tokens)]


def token_slopes(states: Array, tokens: Sequence[int], head: Array) -> Array:
    """d log p(token) / d state, [n, HIDDEN]."""
    return (np.eye(len(head))[list(tokens)] - np.exp(log_softmax(states, head))) @ head


def rows_of(step: Sequence[PairRows]) -> list[Row]:
    return [row for pair in step for row in (pair.own, pair.damaged, pair.strange) if row is not None]


def moved(step: Sequence[PairRows], by: Mapping[str, Array]) -> list[PairRows]:
    """The same step with other states by the policy, each row's by what is under its name."""

    def shifted(row: Row | None) -> Row | None:
        return None if row is None else replace(row, states=row.states + by[row.name])

    return [replace(p, own=shifted(p.own), damaged=shifted(p.damaged), strange=shifted(p.strange)) for p in step]


def pairs_of(step: Sequence[PairRows], head: Array) -> list[Pair]:
    """The log-probs of a step's responses."""

    def responses(row: Row | None) -> list[Response | None]:
        if row is None:
            return [None, None]
        return [
            Response(*(token_logps(states[places], tokens, head) for states in (row.states, row.reference_states)))
            if tokens
            else None
            for places, tokens in zip(row.predicted_at(), (row.chosen, row.rejected), strict=True)
        ]

    return [
        Pair(*responses(pair.own), responses(pair.damaged)[0], tuple(r for r in responses(pair.strange) if r is not None))
        for pair in step
    ]


def responses_of(pairs: Sequence[Pair]) -> list[Response]:
    """All there are, in a fixed order."""
    return [r for p in pairs for r in (p.chosen, p.rejected, p.damaged, *p.strangers) if r is not None]


def with_logps(pairs: Sequence[Pair], logps: NDArray[Any]) -> list[Pair]:
    """The same pairs with other log-probs by the policy: of all tokens, in the order of `responses_of`."""
    at = 0

    def renewed(response: Response | None) -> Response | None:
        nonlocal at
        if response is None:
            return None
        at += len(response.policy)
        return replace(response, policy=logps[at - len(response.policy) : at])

    return [Pair(*map(renewed, (p.chosen, p.rejected, p.damaged)), tuple(map(renewed, p.strangers))) for p in pairs]


def slopes_by_logps(formula: Formula, pairs: Sequence[Pair], flags: Mapping[str, Any]) -> Array:
    """d loss / d log-prob of each token, in the order of `responses_of`."""
    logps = np.concatenate([response.policy for response in responses_of(pairs)])
    return slopes(lambda moved: formula(with_logps(pairs, moved), flags), logps)


def expected_of_logps(formula: Formula, step: Sequence[PairRows], head: Array, flags: Mapping[str, Any]) -> Expected:
    """A step of any algorithm but the reward model, from the states of its rows."""
    pairs = pairs_of(step, head)
    by_token = iter(slopes_by_logps(formula, pairs, flags))
    gradients = {row.name: np.zeros_like(row.states) for row in rows_of(step)}
    # In the order of `responses_of`: rows in the order of `rows_of`, and of each row the chosen response first.
    for row in rows_of(step):
        for places, tokens in zip(row.predicted_at(), (row.chosen, row.rejected), strict=True):
            for place, slope in zip(places, token_slopes(row.states[places], tokens, head), strict=True):
                gradients[row.name][place] += next(by_token) * slope
    assert next(by_token, None) is None
    return Expected(float(np.real(formula(pairs, flags))), gradients)


def value_rows(step: Sequence[PairRows]) -> list[tuple[Row, int]]:
    """Where the reward model scores: the rows and the places in them, chosen and rejected of each pair in turn."""
    return [(pair.own, place) for pair in step for place in pair.own.last_tokens()]


def loss_of_values(step: Sequence[PairRows], value_head: Array, flags: Mapping[str, Any]) -> float:
    """A step of the reward model: `value_head` [HIDDEN] scores the state of a response's last token."""
    values = [row.states[place] @ value_head for row, place in value_rows(step)]
    return float(np.real(rm_of_flat(np.array(values), step, flags)))


def rm_of_flat(values: NDArray[Any], step: Sequence[PairRows], flags: Mapping[str, Any]) -> Number:
    """`rm` of values in the order of `value_rows`."""
    return rm(list(zip(values[::2], values[1::2], strict=True)), [pair.margin for pair in step], flags)


def expected_of_values(step: Sequence[PairRows], value_head: Array, flags: Mapping[str, Any]) -> Expected:
    """`loss_of_values`, and its gradient by the states and by the head."""
    values = np.array([row.states[place] @ value_head for row, place in value_rows(step)])
    by_value = slopes(lambda moved_values: rm_of_flat(moved_values, step, flags), values)
    gradients, by_head = {pair.own.name: np.zeros_like(pair.own.states) for pair in step}, np.zeros_like(value_head)
    for slope, (row, place) in zip(by_value, value_rows(step), strict=True):
        gradients[row.name][place] += slope * value_head
        by_head += slope * row.states[place]
    return Expected(loss_of_values(step, value_head, flags), gradients, by_head)
