"""The drawings of README and docs, as SVG: how a record becomes a gradient, what a row is, and which folder may import which.

    python docs/drawings/draw.py      # writes flow.svg, row.svg and layers.svg into docs/pictures

The layers are import-linter's, and each folder's sentence is its docstring's, so the drawing says what the code says.
"""

import ast
import re
import textwrap
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "docs" / "pictures"

INK, SOFT, LINE, PAPER = "#1c2733", "#5a6875", "#8a97a3", "#ffffff"
BLUE, GREEN, SAND, PLAIN = "#e3eefb", "#e4f4e8", "#fbf1dc", "#f4f6f8"
FONT = "font-family=\"system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif\""
MONO = "font-family=\"ui-monospace, SFMono-Regular, Menlo, 'DejaVu Sans Mono', monospace\""


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    (PICTURES / "flow.svg").write_text(flow())
    (PICTURES / "row.svg").write_text(row())
    (PICTURES / "layers.svg").write_text(layers())


def flow() -> str:
    """From a raw row to weights: what is made, and which folder makes it."""
    parts = [
        _lane(20, 20, 920, 108, BLUE, "Preparation, once for a data set", "Ray Data tasks on all nodes"),
        _box(40, 62, 120, 46, "raw row"),
        _arrow(160, 85, 310, 85, "formats, sources"),
        _box(310, 62, 170, 46, "PreferenceRecord"),
        _arrow(480, 85, 630, 85, "data, images"),
        _box(630, 62, 140, 46, "EncodedPair"),
        _lane(20, 160, 920, 108, SAND, "Storage", "a disk, a shared folder, s3://"),
        _box(70, 202, 240, 46, "reference's log-probs"),
        _box(630, 202, 140, 46, "shards, index"),
        _arrow(700, 108, 700, 202, "data/store", beside=True),
        _arrow(630, 225, 310, 225, "reference: Ray Data actors, before the training"),
        _lane(20, 300, 920, 178, GREEN, "Training, on every worker", "Ray Train; the loop is plain torch"),
        _box(40, 342, 240, 46, "sampler", "which pairs make step k"),
        _arrow(700, 248, 700, 342, "data/stream", beside=True),
        _arrow(190, 248, 190, 284, ""),
        f'<path d="M190 284 H640 V342" {_stroke()} marker-end="url(#head)"/>',
        _box(600, 342, 140, 46, "PairBatch"),
        _arrow(280, 365, 600, 365, "the same order on any number of workers"),
        f'<path d="M740 365 H850 V410" {_stroke()} marker-end="url(#head)"/>',
        _label(795, 358, "policy, ops"),
        _box(780, 410, 140, 46, "PairLogps"),
        _arrow(780, 433, 610, 433, "algorithms"),
        _box(470, 410, 140, 46, "LossOutput"),
        _arrow(470, 433, 280, 433, "training"),
        _box(40, 410, 240, 46, "weights, metrics,", "checkpoint, report"),
    ]
    return _svg(960, 498, "How a record becomes a gradient", parts)


def row() -> str:
    """A pair as one row: its tokens with their positions, and who sees whom."""
    segments = (("prompt", 5, BLUE), ("chosen", 3, GREEN), ("rejected", 4, SAND))
    positions = [*range(5), *range(5, 8), *range(5, 9)]
    cell, left, top = 26, 24, 62
    parts = [_text(left, 34, "One row: tokens and their positions", INK, 14, bold=True)]
    start = 0
    for name, count, colour in segments:
        x = left + start * cell
        parts += [
            f'<rect x="{x + i * cell}" y="{top}" width="{cell}" height="{cell}" fill="{colour}" stroke="{LINE}"/>'
            + _text(x + i * cell + cell / 2, top + 18, str(positions[start + i]), INK, 12.5, centred=True)
            for i in range(count)
        ]
        parts.append(_text(x + count * cell / 2, top + cell + 20, name, SOFT, 13, centred=True))
        start += count
    lines = (
        "The images stand in the prompt. Prompt and images are computed",
        "once; both responses go on where the prompt ends.",
    )
    parts += [_text(left, 146 + 20 * i, line, SOFT, 13) for i, line in enumerate(lines)]
    size, x0, y0 = 15, 520, 70
    names = [name for name, count, _ in segments for _ in range(count)]
    colours = {"prompt": "#a9cdf3", "chosen": "#a3d9b1", "rejected": "#f0cd85"}
    parts.append(_text(x0, 34, "Who sees whom", INK, 14, bold=True))
    parts.append(_text(x0, 56, "each token's line: the filled columns are seen", SOFT, 12.5))
    for line, own in enumerate(names):
        for column, other in enumerate(names):
            sees = column <= line and other in ("prompt", own)
            fill = colours[other] if sees else PAPER
            parts.append(
                f'<rect x="{x0 + column * size}" y="{y0 + line * size}" width="{size}" height="{size}" fill="{fill}" '
                f'stroke="{LINE}" stroke-width="0.5"/>'
            )
    start = 0
    for name, count, _ in segments:
        y = y0 + (start + count / 2) * size + 4
        parts.append(_text(x0 + len(names) * size + 12, y, name, SOFT, 13))
        start += count
    return _svg(830, 270, "A pair as one row", parts)


def layers() -> str:
    """The folders of rayalign, the upper ones importing the lower ones only."""
    project = (ROOT / "pyproject.toml").read_text()
    ray = {name.split(".")[1] for name in _strings(project, "allowed_importers")}
    gap, left, width = 8, 20, 830
    parts: list[str] = []
    y = 20.0
    for names in (layer.split(" | ") for layer in _strings(project, "layers")):
        each = (width - gap * (len(names) - 1)) / len(names)
        indents = {name: 112.0 if len(names) == 1 else 26 + 8.6 * len(name) for name in names}
        told = {
            name: textwrap.wrap(_docstring_of(name), int((each - indent - 12) / 6.2), break_on_hyphens=False)
            for name, indent in indents.items()
        }
        height = 24 + 15 * max(2, *map(len, told.values()))
        for place, (name, lines) in enumerate(told.items()):
            x = left + place * (each + gap)
            parts.append(_folder(x, y, each, height, name, lines, indent=indents[name], uses_ray=name in ray))
        y += height + gap
    bottom = y - gap
    parts += [
        f'<path d="M872 24 V{bottom - 4:g}" {_stroke()} marker-end="url(#head)"/>',
        f'<text x="890" y="{(20 + bottom) / 2:g}" {FONT} font-size="13" fill="{SOFT}" text-anchor="middle" '
        f'transform="rotate(90 890 {(20 + bottom) / 2:g})">imports only what lies below</text>',
        f'<rect x="{left}" y="{bottom + 14:g}" width="14" height="14" rx="3" fill="{BLUE}" stroke="{LINE}"/>',
        _text(left + 22, bottom + 26, "has modules that import Ray; all else is tested without a cluster", SOFT, 13),
    ]
    return _svg(910, bottom + 44, "The folders of rayalign, from top to bottom", parts)


def _folder(
    x: float, y: float, width: float, height: float, name: str, lines: list[str], *, indent: float, uses_ray: bool
) -> str:
    top = y + height / 2 + 4.5 - 7.5 * (len(lines) - 1)
    words = [_text(x + indent, top + 15 * i, line, SOFT, 12) for i, line in enumerate(lines)]
    colour = BLUE if uses_ray else PLAIN
    frame = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" fill="{colour}" stroke="{LINE}"/>'
    title = (
        f'<text x="{x + 14:g}" y="{y + height / 2 + 5:g}" {MONO} font-size="14" font-weight="600" fill="{INK}">{name}</text>'
    )
    return frame + title + "".join(words)


def _docstring_of(name: str) -> str:
    """The first sentence of a folder's or module's docstring."""
    folder = ROOT / "rayalign" / name
    file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    words = " ".join((ast.get_docstring(ast.parse(file.read_text())) or "").split())
    return re.split(r"(?<=\.) |: (?=every )", words)[0].rstrip(".") + "."


def _strings(project: str, key: str) -> list[str]:
    """The strings of a list in pyproject.toml."""
    found = re.search(rf"^{key} = \[(.*?)\n\]", project, re.DOTALL | re.MULTILINE)
    assert found is not None, f"pyproject.toml has no list {key}"
    return re.findall(r'"([^"]+)"', found[1])


def _svg(width: int, height: float, title: str, parts: list[str]) -> str:
    head = (
        f'<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 z" fill="{LINE}"/></marker>'
    )
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:g}" '
        f'width="{width}" height="{height:g}" role="img">\n'
        f"<title>{escape(title)}</title>\n<defs>{head}</defs>\n"
        f'<rect width="{width}" height="{height:g}" rx="8" fill="{PAPER}"/>\n{body}\n</svg>\n'
    )


def _lane(x: int, y: int, width: int, height: int, colour: str, title: str, words: str) -> str:
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="{colour}"/>'
        f'<text x="{x + 16}" y="{y + 24}" {FONT} font-size="14" font-weight="600" fill="{INK}">{escape(title)}'
        f'<tspan font-weight="400" fill="{SOFT}" dx="10">{escape(words)}</tspan></text>'
    )


def _box(x: int, y: int, width: int, height: int, title: str, words: str = "") -> str:
    middle, base = x + width / 2, y + height / 2 + 5
    frame = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{PAPER}" stroke="{LINE}"/>'
    if not words:
        return frame + _text(middle, base, title, INK, 14, centred=True, bold=True)
    lines = _text(middle, base - 9, title, INK, 14, centred=True, bold=True) + _text(
        middle,
        base + 9,
        words,
        INK if title.endswith(",") else SOFT,
        13 if not title.endswith(",") else 14,
        centred=True,
        bold=title.endswith(","),
    )
    return frame + lines


def _arrow(x1: int, y1: int, x2: int, y2: int, label: str, *, beside: bool = False) -> str:
    """A line with its label above the middle, or to the right of it; without a label no head, since another line follows."""
    head = ' marker-end="url(#head)"' if label else ""
    line = f'<path d="M{x1} {y1} L{x2} {y2}" {_stroke()}{head}/>'
    if not label:
        return line
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    return line + (_label(x + 10, y + 4, label, centred=False) if beside else _label(x, y - 8, label))


def _label(x: float, y: float, words: str, *, centred: bool = True) -> str:
    return _text(x, y, words, SOFT, 12.5, centred=centred)


def _text(x: float, y: float, words: str, colour: str, size: float, *, centred: bool = False, bold: bool = False) -> str:
    anchor = ' text-anchor="middle"' if centred else ""
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}" {FONT} font-size="{size:g}"{weight} fill="{colour}"{anchor}>{escape(words)}</text>'


def _stroke() -> str:
    return f'fill="none" stroke="{LINE}" stroke-width="1.5"'


if __name__ == "__main__":
    main()
