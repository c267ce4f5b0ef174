"""The picture of a run's report: the quickstart's DPO, logged at every step, as headless Chromium shows the page.

    python docs/drawings/report.py              # runs it first (some minutes), in build/pictures
    python docs/drawings/report.py REPORT.html  # of a report that is there

Chromium comes from the system (`apt-get install chromium`); `CHROMIUM` names another one.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "docs" / "pictures" / "report.png"
RUN = ROOT / "build" / "pictures"
WIDTH, HEIGHT = 1180, 1100
COLOURS = 128
"""Of the PNG's palette: a page of text and curves needs no more, and the file stays small."""


def main(words: list[str]) -> None:
    page = Path(words[0]) if words else train()
    with tempfile.TemporaryDirectory() as folder:
        shown = Path(folder) / "report.html"
        shown.write_text(page.read_text().replace(f"{RUN}/", ""))  # where it was run is of no interest
        taken = screenshot(shown.as_uri(), Path(folder) / "page.png", width=WIDTH, height=HEIGHT)
        Image.open(taken).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(PICTURE, optimize=True)


def train() -> Path:
    """Runs the quickstart's stages up to DPO; returns the report."""
    sys.path.insert(0, str(ROOT / "examples" / "quickstart"))
    import stages  # settles the environment of Ray, so not where a report is there already

    with stages.cluster():
        task = stages.prepare(RUN, seed=0)
        stages.align(task, "dpo", "quickstart-dpo", "--beta", 0.1, "--rpo_alpha", 0.1, "--logging_steps", 1, "--eval_steps", 10)
    return task.folder / "quickstart-dpo" / "report.html"


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
