"""One DPO step against that of ms-swift's trainer: pairs per second and peak memory, on the same pairs, weights and adapter.

    python -m venv swift; swift/bin/pip install torch==2.13.0 "ms-swift==4.6.*"       # the torch of this environment
    python benchmarks/swift_step.py --swift_python swift/bin/python                  # short, medium
    python benchmarks/swift_step.py --swift_python swift/bin/python --case tiny      # a smoke test, mostly imports

ms-swift wants older versions of transformers and TRL, so each side is a process under its own Python, which takes a step
whenever it is asked to, in turn with the other. ms-swift's step is `training_step` of a run of `swift rlhf`, held at its first
batch: image features, reference and policy forward, loss, backward. Tokens, losses and gradients of the two sides are compared
first; where they differ, nothing is measured.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from comparing import Remote, answer_requests, measure_memory, report_of, step_parser, table_of
from measuring import machine_facts, set_up, write_json
from sides import BETA, LORA_ALPHA, LORA_RANK, Case, Job, Rayalign, Row, Side
from synthetic import MEDIUM, SHORT, SHORT_RESPONSES, TINY, TINY_RESPONSES
from torch import Tensor

SWIFT_MODEL_TYPE = "llava1_6_mistral_hf"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<s>' if loop.first else '' }}[INST] {% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}"
    "{{ ' [/INST]' if message['role'] == 'user' else '</s>' }}{% endfor %}"
)
"""The prompt that ms-swift writes for models of this type, by a template of its own: it doesn't read the model's."""

CASES = {
    "tiny": Case(TINY, TINY_RESPONSES),
    "short": Case(SHORT, SHORT_RESPONSES),
    "medium": Case(MEDIUM, SHORT_RESPONSES),
}


class MsSwift:
    """The step of a run of `swift rlhf`, with the batch that its data loader brought."""

    def __init__(self, model: Any, batch: dict[str, Any], training_step: Callable[[], Any]) -> None:
        self.model = model
        self.batch = batch
        self.training_step = training_step

    def rows(self) -> list[Row]:
        tensors = (self.batch[name] for name in ("input_ids", "labels", "attention_mask"))
        rows = []
        for ids, labels, is_token in zip(*tensors, strict=True):
            counts = labels != -100
            rows.append({"prompt": ids[is_token.bool() & ~counts].tolist(), "response": ids[counts].tolist()})
        return rows

    def step(self) -> Tensor:
        loss: Tensor = self.training_step()
        return loss


def start_rayalign(job: Job, answer: Callable[[Side], None]) -> None:
    answer(Rayalign(job))


def start_rayalign_stored(job: Job, answer: Callable[[Side], None]) -> None:
    answer(Rayalign(job).with_stored_reference())


def start_ms_swift(job: Job, answer: Callable[[Side], None]) -> None:
    """Starts a training run and answers with its first step; what trainers do before that (hooks, freezing) has been done."""
    from swift.arguments import RLHFArguments  # type: ignore[import-not-found]  # only in its own environment
    from swift.pipelines.train.rlhf import SwiftRLHF  # type: ignore[import-not-found]

    pipeline = SwiftRLHF(
        RLHFArguments(
            rlhf_type="dpo",
            beta=BETA,
            loss_type="sigmoid",
            model=str(job.model),
            model_type=SWIFT_MODEL_TYPE,
            use_hf=True,
            check_model=False,  # else it asks a model hub for news
            torch_dtype=job.dtype,
            attn_impl="sdpa",
            use_cpu=True,
            tuner_type="lora",
            target_modules=["all-linear"],
            lora_rank=LORA_RANK,
            lora_alpha=LORA_ALPHA,
            lora_dropout=0.0,
            gradient_checkpointing=False,
            vit_gradient_checkpointing=False,
            dataset=[f"{job.folder}/pairs.jsonl"],
            dataset_shuffle=False,
            train_dataloader_shuffle=False,
            dataloader_num_workers=0,
            per_device_train_batch_size=len(job.pairs),
            gradient_accumulation_steps=1,
            max_steps=1,
            output_dir=f"{job.folder}/ms-swift",
            add_version=False,
            save_strategy="no",
            report_to=["none"],
        )
    )
    start_training = pipeline.train

    def train(trainer: Any) -> None:
        training_step = trainer.training_step

        def first_step(model: Any, batch: dict[str, Any], *others: Any) -> None:
            answer(MsSwift(model, batch, lambda: training_step(model, batch, *others)))
            raise SystemExit  # nothing of the run is wanted but this step

        trainer.training_step = first_step
        start_training(trainer)

    pipeline.train = train
    pipeline.main()


STARTS = {"ms-swift": start_ms_swift, "rayalign": start_rayalign, "rayalign-stored": start_rayalign_stored}


def check_same_setting(sides: Mapping[str, Remote]) -> dict[str, Any]:
    """The versions of all sides' packages; raises SystemExit where threads, weights, torch or any row's tokens differ."""
    facts = {name: side.facts() for name, side in sides.items()}
    theirs, *ours = facts.values()
    for fact in ("threads", "parameters"):
        if any(mine[fact] != theirs[fact] for mine in ours):
            raise SystemExit(f"The sides have different numbers of {fact}: {facts}")
    if any(mine["versions"]["torch"] != theirs["versions"]["torch"] for mine in ours):
        raise SystemExit(f"Put the same torch into both environments, to compare what is written on top of it: {facts}")
    for rows in zip(*(side.rows() for side in sides.values()), strict=True):
        if any(mine != rows[0] for mine in rows[1:]):
            raise SystemExit(f"The sides do not encode pairs alike, of {', '.join(sides)}: {rows}")
    return {name: of_side["versions"] for name, of_side in facts.items()}


def run_case(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    case = CASES[name]
    pythons = {**dict.fromkeys(STARTS, sys.executable), "ms-swift": str(arguments.swift_python)}
    with tempfile.TemporaryDirectory() as temporary:
        job = case.job(Path(temporary), threads=arguments.threads)
        (job.model / "chat_template.jinja").write_text(CHAT_TEMPLATE)
        with ExitStack() as stack:
            sides = {side: stack.enter_context(Remote(__file__, side, job, python=pythons[side])) for side in STARTS}
            versions = check_same_setting(sides)
            report = {"case": name, "versions": versions, **report_of(case, job, sides, rounds=arguments.rounds)}
        if arguments.memory:
            report["memory"] = measure_memory(__file__, tuple(STARTS), job, pythons=pythons)
    return report


def main() -> None:
    parser = step_parser(__doc__, output="swift_step.json", on_device=False)
    parser.add_argument("--swift_python", type=Path, help="the Python of an environment with ms-swift")
    parser.add_argument("--case", nargs="+", choices=CASES, default=["short", "medium"])
    arguments = parser.parse_args()
    if arguments.side:
        answer_requests(lambda answer: STARTS[arguments.side](arguments.job, answer), arguments.job)
        return
    if not arguments.swift_python:
        parser.error("--swift_python is missing")
    set_up(arguments.threads)
    facts, cases = machine_facts(threads=arguments.threads), []
    for name in arguments.case:
        cases.append(run_case(name, arguments))
        write_json(arguments.output, {"machine": facts, "cases": cases})
    print(table_of(cases, rival="ms-swift", title="ms-swift"))


if __name__ == "__main__":
    main()
