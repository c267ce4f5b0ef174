"""Writes what the pages show of the code itself, between `<!-- begin: NAME -->` and `<!-- end: NAME -->`.

python docs/tables.py      # part of `make configs`
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

DOCS = Path(__file__).parent


def aliases() -> str:
    """Other tools' flags, one by one."""
    from rayalign.config.aliases import aliases_table

    return aliases_table().strip()


def template() -> str:
    """The file to copy for a loss of one's own."""
    return f"```python\n{(DOCS.parent / 'examples' / 'template' / 'my_loss.py').read_text()}```"


TABLES: Mapping[str, Callable[[], str]] = {"moving-over.md": aliases, "python.md": template}
"""What stands in which page, under the function's name."""


def filled(page: str) -> str:
    """The text of a page with what it shows as it is today."""
    text, table = (DOCS / page).read_text(), TABLES[page]
    begin, end = f"<!-- begin: {table.__name__} -->", f"<!-- end: {table.__name__} -->"
    assert text.count(begin) == text.count(end) == 1
    return re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n\n{table()}\n\n{end}", text, flags=re.DOTALL)


if __name__ == "__main__":
    for page in TABLES:
        (DOCS / page).write_text(filled(page))
