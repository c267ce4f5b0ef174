"""What mkdocs does beside its own: a page may include a Markdown file of the repository, `<!-- include: PATH -->`, and no page
may load scripts, styles or pictures from elsewhere."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def on_page_markdown(markdown: str, **_: Any) -> str:
    return re.sub(r"^<!-- include: (\S+) -->$", lambda found: _without_title(ROOT / found[1]), markdown, flags=re.MULTILINE)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    loaded = re.findall(r"<(?:script|img|link rel=.stylesheet.)[^>]*(?:src|href)=.(https?:[^\"' >]*)", output)
    assert not loaded, f"{page.file.src_uri} loads {', '.join(loaded)}"
    return output


def _without_title(file: Path) -> str:
    first, _, rest = file.read_text().partition("\n")
    assert first.startswith("# "), f"{file} has no title"
    return rest.strip()
