"""The flags of a sweep: what is searched, how, and by which metric."""

from dataclasses import dataclass
from typing import Literal

from rayalign.config.flags import check_bounds, flag


@dataclass(frozen=True)
class TuneConfig:
    """Search"""

    search: tuple[str, ...] = flag(
        (),
        "What to try: FLAG=grid:A,B,C (every one of them, with every other grid), or drawn for each trial FLAG=choice:A,B,C, "
        "FLAG=uniform:LOW:HIGH, FLAG=loguniform:LOW:HIGH, FLAG=quniform:LOW:HIGH:STEP. rlhf_type=grid:dpo,simpo tries "
        "algorithms.",
    )
    num_samples: int = flag(
        8,
        "Settings drawn where --search has something to draw; a grid runs whole for each draw. A higher number continues a "
        "finished sweep.",
        at_least=1,
    )
    num_seeds: int = flag(
        1, "Trials of each setting, with the seeds --seed, --seed + 1 and so on; settings are ranked by their mean.", at_least=1
    )
    search_alg: Literal["random", "optuna"] = flag(
        "random",
        "Who chooses what is drawn. random: each value by itself; optuna: a model of the results so far (TPE), which needs the "
        "extra tune.",
    )
    search_seed: int = flag(42, "Seed of what is drawn.", at_least=0)
    scheduler: Literal["auto", "none", "asha", "median", "pbt"] = flag(
        "auto",
        "Which trials are stopped at an evaluation. asha: those not among the best third so far, at growing distances; median: "
        "those below the median; pbt: none, but the worst quarter goes on from the weights of the best, with its flags a "
        "little changed; none: all run to their end. auto: asha from 4 draws of one seed on, where a run has three "
        "evaluations, else none.",
    )
    max_concurrent_trials: int | None = flag(
        None, "Trials that run at a time. Default: as many as fit the cluster.", at_least=1
    )
    metric: str = flag("eval_rewards/accuracies", "Metric that ranks the trials; SFT has eval_loss.")
    mode: Literal["max", "min"] | None = flag(
        None,
        "Whether a high or a low --metric is good. Default: by its name (min for losses, perplexity, KL and rates of "
        "hallucination, else max).",
    )
    cost_metric: str | None = flag(
        None,
        "What a good --metric may cost; near 0 is good. The page draws one against the other, and --search_alg optuna looks "
        "for settings that no other one beats in both. Default: the page draws eval_drift, without a reference eval_nll_loss.",
    )
    price_per_hour: float | None = flag(
        None, "With --dry_run: price of one GPU for an hour, by which it tells what the sweep costs.", at_least=0
    )

    def __post_init__(self) -> None:
        check_bounds(self)
