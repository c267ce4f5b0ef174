"""Sections and tables of the page: plain functions from texts to markup."""

from collections.abc import Sequence
from html import escape


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
