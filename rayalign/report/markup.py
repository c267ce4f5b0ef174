"""What pages are made of: headers, tiles, sections and tables, as plain functions from texts to markup."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any


def header(title: str, facts: Mapping[str, str], *, state: str = "") -> str:
    """The head of a page: its title, facts beside each other, and how far it has come."""
    rows = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    told = f'<p class="state">{escape(state)}</p>' if state else ""
    return f'<header><h1>{escape(title)}</h1><dl class="facts">{rows}</dl>{told}</header>'


def tiles(values: Mapping[str, str]) -> str:
    """Figures by name, each with what follows its first space as a note."""
    return f'<div class="tiles">{"".join(_tile(name, *value.partition(" ")[::2]) for name, value in values.items())}</div>'


def _tile(name: str, value: str, note: str) -> str:
    inner = f'<div class="value"><span>{escape(value)}</span></div><div class="note">{escape(note)}</div>'
    return f'<div class="tile"><div class="name">{escape(name)}</div>{inner}</div>'


def flags_section(flags: Mapping[str, Any]) -> str:
    """All flags, folded away."""
    rows = [(name, value if isinstance(value, str) else json.dumps(value, default=str)) for name, value in flags.items()]
    panel = f'<details class="panel"><summary>All flags</summary>{table(("name", "value"), rows)}</details>'
    return section("Flags", "", panel)


def section(title: str, words: str, content: str) -> str:
    """A section of the page under a heading; `content` is markup, the rest is text."""
    lead = f'<p class="soft">{escape(words)}</p>' if words else ""
    return f"<section><h2>{escape(title)}</h2>{lead}{content}</section>"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts; columns of numbers are aligned to the right."""

    def is_number(text: str) -> bool:
        return text.lstrip("-").replace(",", "").replace(".", "", 1).isdigit()

    kinds = [' class="number"' if rows and all(is_number(row[k]) for row in rows) else "" for k in range(len(heads))]
    head = "".join(f"<th{kind}>{escape(name)}</th>" for name, kind in zip(heads, kinds, strict=True))
    body = ["".join(f"<td{kind}>{escape(text)}</td>" for text, kind in zip(row, kinds, strict=True)) for row in rows]
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(f'<tr>{row}</tr>' for row in body)}</tbody></table>"
