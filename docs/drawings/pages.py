"""Pictures of the pages that runs write, as headless Chromium shows their first screens: of a DPO run, a sweep, an evaluation
and rounds, all on the quickstart's task.

    python docs/drawings/pages.py                         # runs all of it (twenty minutes), in build/pictures
    python docs/drawings/pages.py sweep=output/sweep.html   # of pages that are there

Chromium comes from the system (`apt-get install chromium`); `CHROMIUM` names another one.
"""

import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "docs" / "pictures"
RUNS = ROOT / "build" / "pictures"
QUICKSTART = ROOT / "examples" / "quickstart"
WIDTH, HEIGHT = 1180, 1100
COLOURS = 128
"""Of the PNG's palette: a page of text and curves needs no more, and the file stays small."""


def main(words: list[str]) -> None:
    given = {name: Path(page) for name, _, page in (word.partition("=") for word in words)}
    if unknown := given.keys() - PAGES.keys():
        sys.exit(f"error: {', '.join(sorted(unknown))}: must be one of {', '.join(PAGES)}, each with =PAGE.html.")
    for name, make in PAGES.items():
        if name in given or not given:
            take(given.get(name) or make(), PICTURES / f"{name}.png")


def take(page: Path, picture: Path) -> None:
    """Writes the picture of a page's first screen."""
    with tempfile.TemporaryDirectory() as folder:
        shown, text = Path(folder) / "page.html", page.read_text()
        for place in (page.resolve().parents[1], ROOT):  # where it was run is of no interest
            text = text.replace(f"{place}/", "")
        shown.write_text(text)
        taken = screenshot(shown.as_uri(), Path(folder) / "page.png", width=WIDTH, height=HEIGHT)
        Image.open(taken).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(picture, optimize=True)


def report() -> Path:
    """Runs the quickstart's stages up to DPO; returns the report."""
    sys.path.insert(0, str(QUICKSTART))
    import stages  # settles the environment of Ray, so not where a report is there already

    with stages.cluster():
        task = stages.prepare(RUNS, seed=0)
        stages.align(task, "dpo", "quickstart-dpo", "--beta", 0.1, "--rpo_alpha", 0.1, "--logging_steps", 1, "--eval_steps", 10)
    return task.folder / "quickstart-dpo" / "report.html"


@functools.cache
def output_of(example: str) -> Path:
    """Runs an example of the quickstart; returns its folder."""
    folder = RUNS / example
    subprocess.run([sys.executable, QUICKSTART / f"{example}.py", "--output_dir", folder], check=True)
    return folder


PAGES = {
    "report": report,
    "sweep": lambda: output_of("sweep") / "sweep" / "sweep.html",
    "evaluation": lambda: output_of("tour") / "evaluation" / "evaluation.html",
    "rounds": lambda: output_of("rounds") / "rounds" / "rounds.html",
}
"""What makes each page, by the name of its picture."""


def screenshot(address: str, file: Path, *, width: int, height: int) -> Path:
    """A page as Chromium shows it in a window of so many pixels."""
    browser = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        sys.exit("error: there is no chromium: `apt-get install chromium`, or name one by the variable CHROMIUM.")
    # Chromium's sandbox needs rights that root in a container does not have.
    flags = ["--headless", "--hide-scrollbars", *(["--no-sandbox"] if os.getuid() == 0 else [])]
    subprocess.run(
        [browser, *flags, f"--screenshot={file}", f"--window-size={width},{height}", address], check=True, capture_output=True
    )
    return file


if __name__ == "__main__":
    main(sys.argv[1:])
