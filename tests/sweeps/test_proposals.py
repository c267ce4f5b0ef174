"""Optuna's proposals: typed, of the space, never twice, and better where results tell where to look."""

from dataclasses import replace

from rayalign.algorithms import DPO
from rayalign.config.config import Config
from rayalign.config.tune import TuneConfig
from rayalign.sweeps.proposals import propose
from rayalign.sweeps.search_checks import check_search
from rayalign.sweeps.search_space import SearchSpace, Setting
from rayalign.sweeps.trials import Outcome, Trial


def search(*entries: str, num_samples: int = 8) -> tuple[SearchSpace, TuneConfig]:
    tune = TuneConfig(search=entries, search_alg="optuna", num_samples=num_samples)
    return check_search(Config(DPO()), tune), tune


def proposed(space: SearchSpace, tune: TuneConfig) -> list[Setting]:
    """All settings of a sweep whose metric is high where beta is near 0.2."""
    settings: list[Setting] = []
    outcomes: list[Outcome] = []
    while len(settings) < tune.num_samples and (setting := propose(space, tune, settings, outcomes)) is not None:
        settings.append(setting)
        value = -abs(setting.get("beta", 5) - 0.2)
        outcomes.append(Outcome(Trial(len(settings), setting), "finished", value=value))
    return settings


def test_proposals_are_values_of_their_flags_kind():
    entries = (
        "beta=loguniform:0.01:1",
        "lora_rank=quniform:4:16:4",
        "warmup_ratio=quniform:0.1:0.75:0.2",
        "max_steps=choice:none,3",
    )
    for setting in proposed(*search(*entries)):
        assert list(setting) == ["beta", "lora_rank", "warmup_ratio", "max_steps"]
        assert 0.01 <= setting["beta"] <= 1
        assert setting["lora_rank"] in (4, 8, 12, 16)
        assert setting["warmup_ratio"] in (0.1, 0.3, 0.5, 0.7)
        assert setting["max_steps"] in (None, 3)


def test_an_algorithms_own_flag_is_proposed_for_it_alone():
    settings = proposed(*search("simpo_gamma=uniform:0:2", "rlhf_type=choice:dpo,simpo", num_samples=12))
    assert {"rlhf_type": "dpo"} in settings
    assert all(("simpo_gamma" in setting) == (setting["rlhf_type"] == "simpo") for setting in settings)


def test_no_setting_is_proposed_twice_and_a_space_that_is_used_up_ends():
    assert sorted(setting["lora_rank"] for setting in proposed(*search("lora_rank=choice:4,8"))) == [4, 8]


def test_results_pull_the_proposals_to_the_good_values():
    space, tune = search("beta=uniform:0.1:10", num_samples=40)
    betas = [setting["beta"] for setting in proposed(space, tune)]
    # Drawn evenly, a quarter of them would be below 2.5.
    assert sum(beta < 2.5 for beta in betas[20:]) >= 15


def test_a_sweep_that_goes_on_proposes_what_it_would_have():
    space, tune = search("beta=uniform:0.1:10")
    settings = proposed(space, tune)
    outcomes = [Outcome(Trial(i, s), "finished", value=-abs(s["beta"] - 0.2)) for i, s in enumerate(settings, 1)]
    assert propose(space, tune, settings[:6], outcomes[:6]) == settings[6]


def test_with_a_cost_the_proposals_go_where_none_beats_them_in_both():
    # The metric wants a high beta and the cost a low one; gamma only makes both worse.
    space, tune = search("beta=uniform:0.01:1", "rpo_alpha=uniform:0:1", num_samples=40)
    tune = replace(tune, cost_metric="eval_nll_loss")
    settings: list[Setting] = []
    outcomes: list[Outcome] = []
    while len(settings) < tune.num_samples and (setting := propose(space, tune, settings, outcomes)) is not None:
        settings.append(setting)
        beta, alpha = setting["beta"], setting["rpo_alpha"]
        outcomes.append(
            Outcome(Trial(len(settings), setting), "finished", value=beta - alpha, sizes={"eval_nll_loss": beta + alpha})
        )
    later = settings[20:]
    assert sum(setting["rpo_alpha"] < 0.25 for setting in later) >= 12  # evenly drawn: 5
    assert min(setting["beta"] for setting in later) < 0.3
    assert max(setting["beta"] for setting in later) > 0.7
