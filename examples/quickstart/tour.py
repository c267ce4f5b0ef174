"""A tour of all verbs on the quickstart's task: SFT, DPO, evaluate, export, serve with one request, and two rounds of iterate.

Prints the seconds of each stage, and ends with a table of what came out of them, which is in tour.json, too.
"""

import argparse
import base64
import json
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rounds
import stages
from stages import stage
from task import QUESTION, answer

ROUNDS = 2
START_SECONDS = 180
SERVED = "quickstart"


def run(name: str, *words: object) -> None:
    """Runs one of pipelines/*.py that trains nothing."""
    subprocess.run(stages.command(name, *words), cwd=stages.ROOT, check=True)


def evaluate(task: stages.Task) -> str:
    """DPO's model and SFT's side by side on the held-out pairs; returns both accuracies in words."""
    output = task.folder / "evaluation"
    models = ("--model", task.folder / "dpo" / "model", "--compare", task.folder / "sft" / "model")
    records = ("--dataset", task.folder / "held_out_pairs.jsonl", "--image_checks", "shuffled")
    run("evaluate", *models, *records, "--batch_size", 32, "--output_dir", output, "--overwrite", "true")
    found = json.loads((output / "metrics.json").read_text())
    dpo, sft = (found[role]["dataset"]["metrics"]["accuracy/likelihood"] for role in ("model", "compare"))
    return f"accuracy {dpo['value']:.3f} [{dpo['low']:.3f}, {dpo['high']:.3f}], SFT {sft['value']:.3f}"


def export(task: stages.Task) -> str:
    """Merges DPO's adapter into its base model; returns what is in the folder."""
    output = task.folder / "merged"
    run("export", "--model", task.folder / "dpo" / "model", "--output_dir", output, "--overwrite", "true")
    size = sum(file.stat().st_size for file in output.glob("*.safetensors")) / 2**20
    return f"{size:.1f} MiB of weights, {len(list(output.iterdir()))} files"


@contextmanager
def server(model: Path) -> Iterator[str]:
    """The address of a server of a model, which runs as long."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ("--model", model, "--served_model_name", SERVED, "--engine", "transformers", "--port", port)
    process = subprocess.Popen(stages.command("serve", *words), cwd=stages.ROOT)
    address = f"http://127.0.0.1:{port}/v1"
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _answers(address):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("error: the server did not start.")
            time.sleep(0.2)
        yield address
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/models", timeout=5) as reply:
            return SERVED in reply.read().decode()
    except (urllib.error.URLError, OSError):
        return False


def ask(address: str, picture: Path) -> str:
    """What a server says to a picture, by OpenAI's API."""
    shown = f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": shown}}, {"type": "text", "text": QUESTION}]
    body = {"model": SERVED, "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 16}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as reply:
        said: str = json.load(reply)["choices"][0]["message"]["content"]
    return said


def serve(task: stages.Task) -> str:
    """Serves the merged model for one question about a held-out picture; returns what it said beside what is right."""
    with server(task.folder / "merged") as address:
        said = ask(address, task.folder / task.held_out.files[0])
    return f"it says {said!r}, right is {answer(task.held_out.digits[0])!r}"


ACCURACY = "eval_accuracy/likelihood"


def iterate(task: stages.Task) -> str:
    """Rounds from DPO's model on; returns the accuracy after each."""
    rounds.write_prompts(task, task.folder / "prompts.jsonl")
    dpo = task.folder / "dpo" / "model"
    given: dict[str, Any] = {"responses": rounds.RESPONSES, "pairs_per_prompt": 1, "steps": rounds.STEPS}
    output = rounds.iterate(task, "rounds", model=dpo, rounds=ROUNDS, **given)
    found = json.loads((output / "rounds.json").read_text())
    return "; ".join(f"round {line['number']}: accuracy {line['metrics'][ACCURACY]:.3f}" for line in found)


def accuracy(run: Path) -> str:
    return f"accuracy {json.loads((run / 'summary.json').read_text())[ACCURACY]:.3f}"


def markdown(outcomes: dict[str, str]) -> str:
    rows = [f"| {name} | {seconds:.0f} | {outcomes.get(name, '')} |" for name, seconds in stages.SECONDS.items()]
    return "\n".join(["| stage | seconds | what came of it |", "|---|---|---|", *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=stages.ROOT / "output" / "tour")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored, and the server would not end
    folder, started = options.output_dir.resolve(), time.monotonic()
    outcomes: dict[str, str] = {}
    with stages.cluster():
        task = stages.prepare(folder, options.seed)
        with stage("DPO"):
            stages.align(task, "dpo", "dpo", "--beta", 0.1, "--rpo_alpha", 0.1)
            outcomes["DPO"] = accuracy(folder / "dpo")
        for work in (evaluate, export, serve, iterate):
            with stage(work.__name__):
                outcomes[work.__name__] = work(task)
    seconds = round(time.monotonic() - started)
    lines = {name: {"seconds": round(took, 1), "outcome": outcomes.get(name, "")} for name, took in stages.SECONDS.items()}
    (folder / "tour.json").write_text(json.dumps({"seed": options.seed, "seconds": seconds, "stages": lines}, indent=2) + "\n")
    print(f"\n{markdown(outcomes)}\n\n{seconds} s in all; accuracy: by likelihood, on held-out pairs")
    for page in ("dpo/report.html", "evaluation/evaluation.html", "rounds/rounds.html"):
        print(f"Page: {folder / page}")


if __name__ == "__main__":
    main()
