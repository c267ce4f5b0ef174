"""Writes what the pages tell of the code's own tables, between `<!-- begin: NAME -->` and `<!-- end: NAME -->`.

python docs/tables.py      # part of `make configs`
"""

import re
from pathlib import Path

from rayalign.config.aliases import aliases_table

PAGE = Path(__file__).with_name("moving-over.md")


def filled(page: str) -> str:
    """The page with its tables as they are today."""
    begin, end = "<!-- begin: aliases -->", "<!-- end: aliases -->"
    assert page.count(begin) == page.count(end) == 1
    return re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n\n{aliases_table().strip()}\n\n{end}", page, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
