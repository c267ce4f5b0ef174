"""The flags of DPO: which losses there are, and which settings go together; and whom AOT compares a pair with."""

from typing import Any, get_args

import pytest
import torch

from rayalign.algorithms import DPO, StepStatistics
from rayalign.algorithms.dpo import LossType
from rayalign.algorithms.dpo_losses import (
    BY_DIVERGENCE,
    PAIR_LOSSES,
    RANKED,
    REFERENCE_FREE,
    REFERENCE_FREE_DIVERGENCES,
    SFT_LOSS,
    SMOOTHED,
    Divergence,
    LossSettings,
    PairScores,
    RankPartners,
    divergence_score,
    rank_partners,
)
from rayalign.data.batch import assemble
from rayalign.data.store import EncodedPair
from rayalign.models.family import ImageInputs, RowLayout


def test_the_flag_names_every_loss_of_the_table_and_sft() -> None:
    assert get_args(LossType) == (*PAIR_LOSSES, SFT_LOSS)
    assert {*SMOOTHED, *RANKED, *BY_DIVERGENCE, *REFERENCE_FREE} <= set(get_args(LossType))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"loss_type": ()}, "--loss_type names no loss: give one of them, such as sigmoid."),
        (
            {"loss_type": ("sigmoid", "hinge", "sigmoid")},
            "--loss_type sigmoid hinge sigmoid: each loss can be named once; give it a larger weight instead.",
        ),
        (
            {"loss_type": ("sigmoid", "hinge"), "loss_weights": (1.0,)},
            "--loss_weights 1 with --loss_type sigmoid hinge: there must be as many weights as losses.",
        ),
        (
            {"loss_weights": (0.8, 0.25)},
            "--loss_weights 0.8 0.25 with --loss_type sigmoid: there must be as many weights as losses.",
        ),
        (
            {"loss_type": ("sigmoid", "sft")},
            "--loss_type sigmoid sft with --rpo_alpha 1: sft and --rpo_alpha both add the chosen responses' likelihood. "
            "Pass --rpo_alpha 0, or leave sft out.",
        ),
        (
            {"loss_type": ("hinge", "ipo"), "label_smoothing": 0.1},
            "--label_smoothing 0.1 with --loss_type hinge ipo: smoothing is for aot, aot_unpaired, exo_pair, robust, sigmoid. "
            "Leave it out, or take one of these.",
        ),
        (
            {"loss_type": ("exo_pair",)},
            "--loss_type exo_pair needs a --label_smoothing above 0, such as 0.001: it divides by it.",
        ),
        (
            {"discopop_tau": 0.1},
            "--discopop_tau 0.1 with --loss_type sigmoid: it belongs to the loss discopop.",
        ),
        (
            {"f_alpha_divergence_coef": 0.7, "f_divergence_type": "forward_kl"},
            "--f_alpha_divergence_coef 0.7 with --f_divergence_type forward_kl: it belongs to alpha_divergence.",
        ),
        (
            {"loss_type": ("robust",), "label_smoothing": 0.5},
            "--loss_type robust needs a --label_smoothing below 0.5: labels as good as a coin's teach nothing.",
        ),
        (
            {"loss_type": ("sigmoid", "apo_zero", "aot"), "f_divergence_type": "forward_kl"},
            "--f_divergence_type forward_kl with --loss_type aot apo_zero: this loss is derived for reverse_kl. "
            "Other divergences go with discopop, exo_pair, hinge, ipo, robust, sft, sigmoid, sigmoid_norm.",
        ),
        (
            {"loss_type": ("sigmoid", "sppo_hard", "apo_zero"), "reference_free": True},
            "--reference_free true with --loss_type apo_zero sppo_hard: it holds each response's log-ratio against 0, where "
            "only a real reference puts it, and would train nothing or the wrong way. Leave --reference_free out, or take one "
            "of aot, aot_unpaired, discopop, exo_pair, hinge, ipo, robust, sft, sigmoid, sigmoid_norm.",
        ),
        (
            {"f_divergence_type": "forward_kl", "reference_free": True},
            "--reference_free true with --f_divergence_type forward_kl: it grows exponentially with the log-ratio, which is "
            "near 0 only beside a real reference, and is cut off: nothing would be trained. Leave --reference_free out, or "
            "take reverse_kl or js_divergence.",
        ),
    ],
)
def test_losses_that_do_not_go_together_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as caught:
        DPO(**settings)
    assert str(caught.value) == words


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": ("sigmoid", "bco_pair", "sft"), "loss_weights": (0.8, 0.2, 1.0), "rpo_alpha": 0.0},
        {"loss_type": ("sigmoid", "hinge"), "loss_weights": ()},
        {"loss_type": ("exo_pair",), "label_smoothing": 0.001},
        {"loss_type": ("robust",), "label_smoothing": 0.499},
        {"loss_type": ("hinge", "sigmoid"), "label_smoothing": 0.1},
        {"loss_type": ("sft",), "rpo_alpha": 0.0, "f_divergence_type": "js_divergence"},
        {"loss_type": ("sigmoid", "discopop", "hinge"), "reference_free": True, "f_divergence_type": "js_divergence"},
    ],
)
def test_what_goes_together_is_accepted(settings: dict[str, Any]) -> None:
    assert DPO(**settings).loss_type == settings["loss_type"]


@pytest.mark.parametrize(
    ("settings", "reference", "statistics"),
    [
        ({}, True, False),
        ({"reference_free": True}, False, False),
        ({"loss_type": ("sigmoid", "aot")}, True, True),
        ({"loss_type": ("aot_unpaired",), "reference_free": True}, False, True),
    ],
)
def test_dpo_asks_for_what_its_losses_use(settings: dict[str, Any], reference: bool, statistics: bool) -> None:
    needs = DPO(**settings).needs
    assert (needs.reference, needs.statistics, needs.responses, needs.companion) == (reference, statistics, "both", None)


@pytest.mark.parametrize("divergence", get_args(Divergence))
@pytest.mark.parametrize("loss", PAIR_LOSSES)
def test_what_goes_without_a_reference_trains_both_responses_the_right_way(loss: str, divergence: Divergence) -> None:
    smoothing = 0.1 if loss in ("exo_pair", "robust") else 0.0
    try:
        dpo = DPO(loss_type=(loss,), label_smoothing=smoothing, f_divergence_type=divergence, reference_free=True)  # type: ignore[arg-type]
    except ValueError:
        is_seen = loss in BY_DIVERGENCE or divergence == "reverse_kl"
        assert not is_seen or loss not in REFERENCE_FREE or divergence not in REFERENCE_FREE_DIVERGENCES
        return
    # Two pairs as long responses have them: -60 and -75 nats, alike by how much the policy already prefers the chosen one.
    chosen, rejected = (
        torch.tensor(sums, dtype=torch.float64, requires_grad=True) for sums in ([-60.0, -75.0], [-61.0, -76.0])
    )
    seen = [divergence_score(side, divergence=divergence, alpha=0.5) for side in (chosen, rejected)]
    zeros, tokens = torch.zeros(2, dtype=torch.float64), torch.full((2,), 10.0, dtype=torch.float64)
    partners = RankPartners(zeros, chosen.detach(), rejected.detach())
    scores = PairScores(chosen, rejected, *seen, tokens, tokens, chosen - rejected, partners)
    PAIR_LOSSES[loss](scores, LossSettings(dpo.beta, smoothing, dpo.discopop_tau)).sum().backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert (chosen.grad < -1e-3).all()
    assert (rejected.grad > 1e-3).all()


@pytest.mark.parametrize(("first", "count"), [(0, 3), (0, 1), (1, 2), (2, 1)])
def test_aot_finds_a_pairs_partners_by_rank_among_all_pairs_of_the_step(first: int, count: int) -> None:
    # Log-probs of chosen and rejected by the policy, then by the reference.
    whole = torch.tensor(
        [
            [-1.0, -2.0, -3.0, -1.0],  # gaps 1 and -2; log-ratios of chosen and rejected 2 and -1
            [-5.0, -2.0, -1.0, -6.0],  # gaps -3 and 5; log-ratios -4 and 4
            [-3.0, -9.0, -4.0, -5.0],  # gaps 6 and 1; log-ratios 1 and -4
        ]
    )
    pairs = [EncodedPair(str(i), [5], [6], [7], [], []) for i in range(count)]
    batch = assemble(pairs, layout=RowLayout(pad_token_id=0), process_images=lambda contents, alone: ImageInputs())
    found = rank_partners(StepStatistics(whole, first), batch)
    own = slice(first, first + count)
    assert found.gap.tolist() == [1.0, -2.0, 5.0][own]  # of the reference's -2, 1, 5: the middle, lowest, highest
    assert found.chosen_logratios.tolist() == [1.0, 2.0, -4.0][own]  # of -4, 1, 2, by the ranks of the rejected -1, 4, -4
    assert found.rejected_logratios.tolist() == [4.0, -4.0, -1.0][own]  # of -4, -1, 4, by the ranks of the chosen 2, -4, 1
