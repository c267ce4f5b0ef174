"""The command `rayalign VERB --flag value ...`: a table of verbs, each of which reads its flags and starts its work.

`pipelines/VERB.py` and `python -m rayalign VERB` come in here as well. Nothing that computes is imported before the flags are
understood: `--help` and a mistyped flag are answered at once.
"""

import functools
import importlib.metadata
import platform
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import rayalign
from rayalign.algorithms import ALGORITHMS
from rayalign.config import command_line
from rayalign.config.config import Config
from rayalign.config.endings import user_errors
from rayalign.config.evaluate import EvaluateConfig
from rayalign.config.flags import did_you_mean
from rayalign.config.inference import InferenceConfig
from rayalign.config.inference_verbs import GenerateConfig, ScoreConfig
from rayalign.config.methods import advice_for_method
from rayalign.config.serving import ChatConfig, ExportConfig, ServeConfig
from rayalign.log_lines import configure_logging, quiet_transformers
from rayalign.sweeps.search_checks import check_search

OWN_FLAGS = ("help", "version")
LIBRARIES = ("ray", "torch", "transformers", "peft")


@dataclass(frozen=True)
class Verb:
    """What `rayalign VERB` does: in a sentence, and from the words behind the verb; `prog` is how the program was started."""

    summary: str
    start: Callable[[Sequence[str], str, str], None]  # words, prog, summary


def main(words: Sequence[str] | None = None, *, prog: str = "rayalign") -> None:
    """Runs the verb that the words begin with; a mistake ends the program with code 2."""
    verb, *rest = (sys.argv[1:] if words is None else words) or ["--help"]
    if verb in ("--help", "-h", "help"):
        sys.stdout.write(_help(prog))
    elif verb == "--version":
        sys.stdout.write(_versions())
    elif verb not in VERBS:
        _refuse(verb, prog)
    else:
        VERBS[verb].start(rest, f"{prog} {verb}", VERBS[verb].summary)


def pipeline(file: str) -> None:
    """Runs the verb that a script of pipelines/ is named for, with the words behind it."""
    verb = Path(file).stem
    VERBS[verb].start(sys.argv[1:], f"pipelines/{verb}.py", VERBS[verb].summary)


def run(config: Config) -> None:
    """Trains, or, with --dry_run, tells what training would take; raises ValueError for what the user can correct."""
    if config.run.dry_run:
        from rayalign.estimate.plan import plan_run  # here, so that a run does not wait for what only plans need

        sys.stdout.write(plan_run(config))
    else:
        began = time.time()

        from rayalign.training import driver  # here and below, so that a mistyped flag is answered before Ray is loaded

        driver.run(config, began=began)


def _train(words: Sequence[str], prog: str, summary: str, *, algorithm: str | None) -> None:
    config = command_line.parse(ALGORITHMS, words, prog=prog, description=summary, algorithm=algorithm)
    configure_logging()
    with user_errors():
        config.check_inputs()  # here and below, so that it is told before Ray and torch are loaded
        run(config)


def _tune(words: Sequence[str], prog: str, summary: str) -> None:
    config, sweep = command_line.parse_sweep(ALGORITHMS, words, prog=prog, description=summary, check=check_search)
    configure_logging()
    with user_errors():
        config.check_inputs()
        if config.run.dry_run:
            from rayalign.estimate.plan import estimate_run
            from rayalign.estimate.table import plan_text
            from rayalign.sweeps.schedulers import plan_in_words

            found = estimate_run(config, several_runs=True)
            gpu_hours = found.time.hours * found.time.gpus if found.time else None
            space, steps = check_search(config, sweep), found.schedule.steps
            words = plan_in_words(space, sweep, num_steps=steps, gpu_hours=gpu_hours, shared=found.beforehand_share)
            sys.stdout.write(f"One trial, without --search\n{plan_text(found)}{words}\n")
        else:
            from rayalign.sweeps import tune

            tune.run(config, sweep)


def _plan(words: Sequence[str], prog: str, summary: str) -> None:
    config, gpus = command_line.parse_plan(ALGORITHMS, words, prog=prog, description=summary)
    configure_logging()
    with user_errors():
        config.check_inputs()

        from rayalign.ray_lines import quiet_logging

        quiet_logging()

        from rayalign.estimate.plan import plan_run

        sys.stdout.write(plan_run(config, gpus))


def _export(words: Sequence[str], prog: str, summary: str) -> None:
    example = "--model output/dpo/model --output_dir output/dpo/merged"
    config = command_line.parse_section(ExportConfig, words, prog=prog, description=summary, example=example)
    configure_logging()
    with user_errors():
        quiet_transformers()

        from rayalign.training import export

        export.run(config)


def _serve(words: Sequence[str], prog: str, summary: str) -> None:
    example = "--model llava-hf/llava-1.5-7b-hf --adapter dpo=output/dpo/model"
    config = command_line.parse_section(ServeConfig, words, prog=prog, description=summary, example=example)
    configure_logging()
    with user_errors():
        from rayalign.serving import serve

        serve.run(config)


def _chat(words: Sequence[str], prog: str, summary: str) -> None:
    example = "--model output/dpo/model --image cat.png"
    config = command_line.parse_section(ChatConfig, words, prog=prog, description=summary, example=example)
    configure_logging()
    with user_errors():
        from rayalign.serving import chat

        quiet_transformers()
        chat.run(config)


def _evaluate(words: Sequence[str], prog: str, summary: str) -> None:
    example = "--model output/dpo/model --dataset pairs.jsonl --benchmarks pope:data/pope --output_dir output/evaluation"
    sections = (InferenceConfig, EvaluateConfig)
    flags, evaluation = command_line.parse_sections(sections, words, prog=prog, description=summary, example=example)
    configure_logging()
    with user_errors():
        from rayalign.evaluation import evaluate

        sys.stdout.write(evaluate.run(flags, evaluation).table)


def _generate(words: Sequence[str], prog: str, summary: str) -> None:
    example = "--model output/dpo/model --dataset prompts.jsonl --n 4 --temperature 0.8 --output_dir output/responses"
    sections = (InferenceConfig, GenerateConfig)
    flags, own = command_line.parse_sections(sections, words, prog=prog, description=summary, example=example)
    configure_logging()
    with user_errors():
        from rayalign.evaluation import generate

        generate.run(flags, own)


def _score(words: Sequence[str], prog: str, summary: str) -> None:
    example = "--scorer reward_model=output/rm/model --dataset output/responses/rows --output_dir output/scores"
    sections = (InferenceConfig, ScoreConfig)
    flags, own = command_line.parse_sections(sections, words, prog=prog, description=summary, example=example)
    configure_logging()
    with user_errors():
        from rayalign.evaluation import score

        score.run(flags, own)


def _iterate(words: Sequence[str], prog: str, summary: str) -> None:
    config, rounds = command_line.parse_rounds(ALGORITHMS, words, prog=prog, description=summary)
    configure_logging()
    with user_errors():
        from rayalign.rounds import iterate

        iterate.run(config, rounds)


def _trainer(summary: str, algorithm: str | None) -> Verb:
    return Verb(summary, functools.partial(_train, algorithm=algorithm))


VERBS: Mapping[str, Verb] = {
    "sft": _trainer("Supervised fine-tuning on the chosen responses, the stage before preference alignment.", "sft"),
    "rm": _trainer("Training of a reward model: a score for each response, from preference pairs.", "rm"),
    "dpo": _trainer("Direct preference optimisation of a vision-language model.", "dpo"),
    "mdpo": _trainer("mDPO: preference optimisation that can't be learnt from the text alone.", "mdpo"),
    "cpo": _trainer("Contrastive preference optimisation: without a reference, held to the chosen responses.", "cpo"),
    "simpo": _trainer("Simple preference optimisation: rewards per token, without a reference.", "simpo"),
    "orpo": _trainer("Odds ratio preference optimisation: SFT and preference in one, without a reference.", "orpo"),
    "kto": _trainer("Kahneman-Tversky optimisation: responses that are each labelled good or bad, or pairs.", "kto"),
    "rlhf": _trainer("Any training algorithm by name: `--rlhf_type dpo` and so on.", None),
    "tune": Verb("A sweep over the flags of any training algorithm: many short runs, ranked by a metric.", _tune),
    "plan": Verb("What a run will need, before it is started: memory, GPUs, hours and cost.", _plan),
    "evaluate": Verb("A model on preference data and benchmarks, alone or beside a second one.", _evaluate),
    "generate": Verb("A model's own responses to the prompts of any data set, one or several to each.", _generate),
    "score": Verb("Scores of responses: by reward models, policies, a function of yours or a judge.", _score),
    "iterate": Verb("Rounds of responses, scores, preference pairs and training, each from the model before.", _iterate),
    "export": Verb("A trained model as a plain folder, its adapter merged; a reward model; or a checkpoint.", _export),
    "serve": Verb("A model and its adapters behind an OpenAI-compatible address; a reward model's scores.", _serve),
    "chat": Verb("A conversation with a model in the terminal, beside a second one if you like.", _chat),
}


def _help(prog: str) -> str:
    lines = [f"usage: {prog} VERB [--flag value ...] [--config FILE ...]", "", rayalign.__doc__ or "", "", "verbs:"]
    for name, verb in VERBS.items():
        lines += textwrap.wrap(verb.summary, 100, initial_indent=f"  {name:<10}", subsequent_indent=" " * 12)
    lines += ["", f"{prog} VERB --help lists the flags of a verb, {prog} --version the versions of what it runs on."]
    return "\n".join(lines) + "\n"


def _versions() -> str:
    """The versions of rayalign, of the libraries that decide what a run computes, and of Python; nothing is imported for it."""
    found = {
        "rayalign": rayalign.__version__,
        **{name: _version_of(name) for name in LIBRARIES},
        "python": platform.python_version(),
    }
    return "".join(f"{name} {version}\n" for name, version in found.items())


def _version_of(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _refuse(verb: str, prog: str) -> NoReturn:
    if not verb.startswith("-"):
        hint = did_you_mean(verb, VERBS) or f" There are {', '.join(VERBS)}."
        advice = advice_for_method(verb, ALGORITHMS)
        problem = f"{verb}: {advice}" if advice else f"Unknown verb {verb}.{hint}"
    elif hint := did_you_mean(verb.strip("-"), OWN_FLAGS, prefix="--"):
        problem = f"Unknown flag {verb}.{hint}"
    else:
        problem = f"{verb}: the verb comes first, then its flags, as in `{prog} dpo {verb} ...`."
    sys.stderr.write(f"{prog}: error: {problem}\n(--help lists every verb)\n")
    raise SystemExit(2)
