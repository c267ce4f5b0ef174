"""What `rayalign serve` does with many clients: requests/s and the time to the first token of 32 clients at once against one
after another, and what a short request waits for that comes while a long one runs.

    python benchmarks/serve.py                     # through Ray Serve, as users start it: some minutes on two cores
    python benchmarks/serve.py --no-ray            # the application alone, in a process of its own

Each request has a picture of its own and streams its response by OpenAI's client; responses of random weights have as many
tokens as they may. Of the greedy responses, those of 32 clients must be those that came one after another.
"""

import argparse
import base64
import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openai
import torch
from job import ROOT
from measuring import installed, machine_facts, parser_of, show, spread, table, write_json
from safetensors.torch import load_file, save_file
from synthetic import QUESTION, SHORT, TINY, draw_pairs, save_model
from transformers import AutoTokenizer

CASES = {"tiny": TINY, "short": SHORT}
START_SECONDS = 300


@dataclass(frozen=True)
class Answer:
    """A response, and the seconds from the request to its first text."""

    text: str
    first: float


class Clients:
    """Asks the server at `url` about pictures, each request about another one."""

    def __init__(self, url: str, pictures: Sequence[bytes]) -> None:
        self._client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        self._urls = ["data:image/png;base64," + base64.b64encode(picture).decode() for picture in pictures]

    def ask(self, number: int, num_tokens: int, *, on_first: Callable[[], None] = lambda: None) -> Answer:
        """`on_first` is called when the first text comes."""
        image: Any = {"type": "image_url", "image_url": {"url": self._urls[number % len(self._urls)]}}
        turn: Any = {"role": "user", "content": [image, {"type": "text", "text": f"{number} {QUESTION}"}]}
        began, first, text = time.monotonic(), 0.0, ""
        stream = self._client.chat.completions.create(
            model="base", messages=[turn], temperature=0, max_tokens=num_tokens, stream=True
        )
        for chunk in stream:
            if said := chunk.choices[0].delta.content:
                if not text:
                    first = time.monotonic() - began
                    on_first()
                text += said
        if not text:
            raise SystemExit("A response has no text.")
        return Answer(text, first)

    def at_once(self, clients: int, requests: int, num_tokens: int) -> tuple[list[Answer], float]:
        """The answers to requests, of which so many are under way at a time, and the seconds of all."""
        began = time.monotonic()
        with ThreadPoolExecutor(clients) as pool:
            answers = list(pool.map(lambda number: self.ask(number, num_tokens), range(requests)))
        return answers, time.monotonic() - began

    def behind(self, number: int, long: int, short: int) -> Answer:
        """The answer to a short request that comes when the first text of a long one has come."""
        begun = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(self.ask, number, long, on_first=begun.set)
            begun.wait()
            answer = self.ask(number + 1, short)
            running.result()
        return answer


def write_words_only(folder: Path) -> None:
    """Makes a model of random weights say words: a token that is none would be no text that a client could see, or the end."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    words = [i for i in range(len(tokenizer)) if (said := tokenizer.decode([i]).strip()).isascii() and said.isalnum()]
    weights = load_file(folder / "model.safetensors")
    (name,) = (name for name in weights if name.endswith("lm_head.weight"))
    head = weights[name]
    weights[name] = torch.zeros_like(head).index_copy(0, torch.tensor(words), head[words])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def run_application(model: str, port: int) -> None:
    """The server's own process, without Ray."""
    import uvicorn

    from rayalign.config.serving import ServeConfig
    from rayalign.models.source import ModelSource
    from rayalign.serving.replica import load_app

    config = ServeConfig(model=model, served_model_name="base")
    app = load_app(config, ModelSource(model), {}, token_digest=None)
    uvicorn.run(app, port=port, log_level="warning", ws="none", lifespan="off")


@contextlib.contextmanager
def served(model: Path, port: int, *, by_ray: bool, log: Path) -> Iterator[str]:
    """The base URL of a server, which ends with the block."""
    own = [__file__, "--application", str(model), "--port", str(port)]
    flags = ["--model", str(model), "--served_model_name", "base", "--engine", "transformers", "--port", str(port)]
    command = [str(ROOT / "pipelines" / "serve.py"), *flags] if by_ray else own
    settings = {"HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "RAY_ADDRESS": "local"}
    paths = {"PYTHONPATH": os.environ.get("PYTHONPATH", str(ROOT))}
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *command], env={**os.environ, **settings, **paths}, stdout=output, stderr=output
        )
    try:
        url = f"http://127.0.0.1:{port}/v1"
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                client.models.list()
                break
            except openai.APIError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"The server did not start:\n{log.read_text()[-3000:]}") from None
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def first_tokens(answers: Sequence[Answer]) -> dict[str, float]:
    first = [answer.first for answer in answers]
    return {f"first_token_p{percent}": float(np.percentile(first, percent)) for percent in (50, 95)}


def measure(clients: Clients, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """One round: the figures of each load by its name."""
    sides = {"one after another": 1, f"{arguments.clients} at once": arguments.clients}
    texts, found = [], {}
    for name, number in sides.items():
        answers, seconds = clients.at_once(number, arguments.requests, arguments.tokens)
        texts.append([answer.text for answer in answers])
        rate = arguments.requests / seconds
        rates = {"requests_per_second": rate, "tokens_per_second": rate * arguments.tokens}
        found[name] = {**rates, **first_tokens(answers)}
    if texts[0] != texts[1]:
        raise SystemExit("The responses of clients at once are not those that came one after another.")
    short = max(1, arguments.tokens // 4)
    behind = [clients.behind(2 * k, arguments.long, short) for k in range(arguments.repeats)]
    alone = [clients.ask(2 * k + 1, short) for k in range(arguments.repeats)]
    for name, answers in (("short, alone", alone), (f"short, behind {arguments.long} tokens", behind)):
        found[name] = first_tokens(answers)
    return found


def main() -> None:
    parser = parser_of(__doc__, output="serve.json", rounds=3)
    parser.add_argument("--case", choices=CASES, default="short")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--long", type=int, default=256, help="tokens of the response that a short request comes behind")
    parser.add_argument("--repeats", type=int, default=5, help="how often that is tried in a round")
    parser.add_argument("--port", type=int, default=18_431)
    parser.add_argument("--no-ray", action="store_true", help="the application alone, without Ray Serve")
    parser.add_argument("--application", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.application:
        run_application(arguments.application, arguments.port)
        return
    shape = CASES[arguments.case]
    facts = machine_facts(threads=1)
    facts["versions"] |= installed("openai", "starlette", "uvicorn")
    rounds = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_words_only(save_model(folder / "model", shape))
        pictures = [pair.png for pair in draw_pairs(shape.image_size, [(1, 1)] * arguments.requests)]
        with served(folder / "model", arguments.port, by_ray=not arguments.no_ray, log=folder / "log") as url:
            clients = Clients(url, pictures)
            clients.at_once(arguments.clients, arguments.clients, 2)  # what is slow the first time
            for _ in range(arguments.rounds):
                rounds.append(measure(clients, arguments))
    loads = {
        name: {figure: spread([found[name][figure] for found in rounds]) for figure in rounds[0][name]} for name in rounds[0]
    }
    settings = {key: getattr(arguments, key) for key in ("case", "clients", "requests", "tokens", "long")}
    write_json(arguments.output, {"machine": facts, **settings, "by_ray": not arguments.no_ray, "loads": loads})
    titles = {
        "requests/s": "requests_per_second",
        "tokens/s": "tokens_per_second",
        "first token, p50, s": "first_token_p50",
        "p95, s": "first_token_p95",
    }
    columns = {"load": lambda name: name} | {
        title: lambda name, figure=figure: show(loads[name].get(figure)) for title, figure in titles.items()
    }
    print(table(columns, [*loads]))


if __name__ == "__main__":
    main()
