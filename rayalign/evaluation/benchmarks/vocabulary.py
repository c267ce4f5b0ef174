"""The objects that a caption names: words of a closed list, in singular and plural, of one word or several.

A word's singular is looked for by rules, not by a lemmatiser: each form that it may have counts only where it is on the list,
so that no word is cut by mistake (`glass`, `bus`), and no tagger or dictionary is needed.
"""

import re
from collections.abc import Iterator, Mapping

TOKEN = re.compile(r"[a-z]+(?:['-](?!s\b)[a-z]+)*")
"""A word, also with hyphens, without the end of a genitive: the dog of `the dog's bowl`."""

IRREGULAR = {
    "men": "man",
    "children": "child",
    "people": "person",
    "mice": "mouse",
    "geese": "goose",
    "teeth": "tooth",
    "feet": "foot",
    "oxen": "ox",
}
"""Plurals without a rule, also at the end of longer words: women, firemen, schoolchildren."""


class Vocabulary:
    """A list of names, each of which stands for an object, or for none: `objects` by name."""

    def __init__(self, objects: Mapping[str, str | None]) -> None:
        self._objects = dict(objects)
        self._longest = max((len(name.split()) for name in objects), default=1)

    def find(self, text: str) -> list[str]:
        """The objects that a text names, in order, as often as it names them; of names that begin at the same word the longest
        counts."""
        tokens = TOKEN.findall(text.lower())
        found: list[str | None] = []
        start = 0
        while start < len(tokens):
            for size in range(min(self._longest, len(tokens) - start), 0, -1):
                name = self._name_of(tokens[start : start + size])
                if name is not None:
                    found.append(self._objects[name])
                    start += size
                    break
            else:
                start += 1
        return [own for own in found if own is not None]

    def object_of(self, name: str) -> str | None:
        """The object that a name stands for."""
        return self._objects.get(name)

    def _name_of(self, tokens: list[str]) -> str | None:
        *before, last = tokens
        names = (" ".join([*before, form]) for form in singulars(last))
        return next((name for name in names if name in self._objects), None)


def singulars(word: str) -> Iterator[str]:
    """A word, and what it may be the plural of."""
    yield word
    for plural, singular in IRREGULAR.items():
        if word.endswith(plural):
            yield word.removesuffix(plural) + singular
    if word.endswith("ies"):
        yield word.removesuffix("ies") + "y"
    if word.endswith("ves"):
        yield word.removesuffix("ves") + "f"
        yield word.removesuffix("ves") + "fe"
    if word.endswith("es"):
        yield word.removesuffix("es")
    if word.endswith("s") and not word.endswith("ss"):
        yield word.removesuffix("s")
