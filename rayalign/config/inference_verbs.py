"""The flags of the verbs that respond to prompts, score responses, and do both in rounds of training, beside those of
`inference` or of a run."""

from dataclasses import dataclass
from typing import Literal

from rayalign.config.flags import check_bounds, flag, same_flag


@dataclass(frozen=True)
class GenerateConfig:
    """Responses"""

    n: int = flag(1, "Responses to each prompt, which is read once for all of them.", at_least=1)
    temperature: float = flag(0.0, "0: the likeliest token each time; else tokens are drawn, the hotter the wider.", at_least=0)
    top_p: float = flag(
        1.0, "Tokens are drawn from the likeliest ones that have this probability together.", above=0, at_most=1
    )
    max_new_tokens: int = flag(256, "Longest response in tokens.", at_least=1)
    seed: int = flag(
        42, "Seed of what is drawn. A prompt's responses depend on it, on the prompt's id and their numbers.", at_least=0
    )
    backend: Literal["transformers", "vllm"] = flag(
        "transformers",
        "What runs the model. vllm: vLLM, where it is installed, on GPUs; its draws differ from those of transformers.",
    )

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.n > 1 and self.temperature == 0:
            raise ValueError(
                f"--n {self.n} with --temperature 0: all responses to a prompt would be the same. Give a temperature, such as "
                "0.8, or --n 1."
            )
        if self.top_p < 1 and self.temperature == 0:
            raise ValueError(f"--top_p {self.top_p:g} with --temperature 0: nothing is drawn. Give a temperature, such as 0.8.")


SCORERS = ("reward_model", "implicit_reward", "likelihood", "per_token", "python", "judge")


@dataclass(frozen=True)
class ScoreConfig:
    """Scorers"""

    scorer: tuple[str, ...] = flag(
        (),
        "What scores the responses, KIND or KIND=WHAT, one or several: reward_model=FOLDER; implicit_reward=FOLDER, of a "
        "policy of dpo and the like: beta (log p - log p of its reference); likelihood=FOLDER, per_token=FOLDER; "
        "python=MODULE:FUNCTION or python=FILE.py:FUNCTION; judge=URL of an OpenAI-compatible server. Without a FOLDER it is "
        "--model.",
    )
    ensemble: Literal["mean", "min"] = flag("mean", "What is made of the scores of several scorers. min: the most careful one.")
    beta: float | None = flag(None, "Factor of implicit rewards. Default: that of the policy's run, else 0.1.", above=0)
    reference: str | None = flag(
        None, "Reference of implicit rewards: a model's folder. Default: what the policy's run started from."
    )
    judge_model: str | None = flag(None, "Name of the judge's model, by which its server knows it.")
    judge_prompt: str | None = flag(
        None, "File with the judge's instruction, in which {query} and {response} are filled in. Default: one of our own."
    )
    judge_pattern: str = flag(
        r"(?i)\bscore\W*?:\W*?(-?\d+(?:\.\d+)?)",
        "Regular expression whose first group is the score in what a judge writes, where it last matches.",
    )

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True)
class IterateConfig:
    """Rounds"""

    num_rounds: int = flag(3, "Rounds of responses, scores, pairs and training. A higher number continues.", at_least=1)
    reference: Literal["start", "previous"] = flag(
        "previous",
        "What a round trains from, which is also its reference. previous: the round before, on the round's own pairs; start: "
        "the first round's model in all rounds, on the pairs of all rounds so far.",
    )
    n: int = flag(4, "Responses to each prompt and round.", at_least=2)
    temperature: float = flag(0.8, "Of the draws of tokens: the hotter the wider.", above=0)
    top_p: float = same_flag(GenerateConfig, "top_p")
    max_new_tokens: int = same_flag(GenerateConfig, "max_new_tokens")
    backend: Literal["transformers", "vllm"] = same_flag(GenerateConfig, "backend")
    prompts_per_step: int = flag(8, "Prompts, or responses to score, that a worker runs at a time.", at_least=1)
    scorer: tuple[str, ...] = same_flag(ScoreConfig, "scorer")
    ensemble: Literal["mean", "min"] = same_flag(ScoreConfig, "ensemble")
    judge_model: str | None = same_flag(ScoreConfig, "judge_model")
    judge_prompt: str | None = same_flag(ScoreConfig, "judge_prompt")
    judge_pattern: str = same_flag(ScoreConfig, "judge_pattern")
    pairs_per_prompt: int = flag(
        1,
        "1: the best response with the worst; 2: also the second best with the second worst; and so on. 0: all pairs.",
        at_least=0,
    )
    pair_margin: float = flag(0.0, "Pairs whose scores differ by no more than this are left out.", at_least=0)
    max_similarity: float = flag(
        1.0,
        "Pairs whose texts are at least so alike (0 to 1) are left out. 1: only those that differ in case, spaces and "
        "punctuation alone.",
        above=0,
        at_most=1,
    )

    def __post_init__(self) -> None:
        check_bounds(self)
