"""Names of what `evaluation` measures, for those who only read it."""

EVALUATED = "eval_"
"""In front of the names of an evaluation's metrics, on held-out records and on benchmarks."""

BY_SUM, BY_TOKEN, BY_REWARD_MODEL = "accuracy/likelihood", "accuracy/per_token", "accuracy/reward_model"
IMPLICIT_REWARD = "rewards/accuracies"
SHUFFLED = "/shuffled"
"""Behind an accuracy's name: the same with the pictures of other records."""

PAIR_TOKENS = CHOSEN_TOKENS, REJECTED_TOKENS = "tokens/chosen", "tokens/rejected"
"""Beside a pair's metrics: how many tokens its responses have."""

LOWER_IS_BETTER = ("loss", "nll", "perplexity", "/kl", "_kl", "grad_norm", "/CHAIR", "/Hal", "/Cog")
"""In the names of metrics of which less is better."""


def high_is_good(metric: str) -> bool:
    """Whether a high value is better, by the metric's name."""
    return not any(part in metric for part in LOWER_IS_BETTER)
