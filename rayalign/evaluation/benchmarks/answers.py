"""What a model's text says to a closed question, and the yes/no metrics that several benchmarks share."""

import re
from collections.abc import Sequence

from rayalign.evaluation.benchmarks.benchmark import SEED, YES_NO, Item, Metrics, Said
from rayalign.evaluation.statistics import estimate

WORD = re.compile(r"[A-Za-z']+")
ARTICLE = r"A[ \t]+(?!(?:is|was|has|and|or|but|as|for|because|since|would|seems|appears|matches|shows|fits|describes)\b)[a-z]"
"""An A that may be no option's letter: a word in small letters follows on its line that can stand behind an article."""


def option_in(text: str, item: Item) -> str | None:
    """The option of a question that a text means; None where it means none, or several."""
    if item.responses == YES_NO:
        return yes_or_no(text)
    return letter_in(text, item.responses)


def yes_or_no(text: str) -> str | None:
    """By the first word, else by the first sentence: No where it holds no or not, Yes where it holds yes."""
    words: list[str] = [word.lower() for word in WORD.findall(text.strip().partition(".")[0])]
    if words and words[0] in ("yes", "no"):
        return words[0].capitalize()
    if "no" in words or "not" in words:
        return "No"
    return "Yes" if "yes" in words else None


def letter_in(text: str, letters: Sequence[str]) -> str | None:
    """By the text's beginning (`B`, `B.`, `(B)`, `**B**`, `B - a dog`), else by `answer is B`, else by the only option's letter
    that stands alone in it."""
    kinds = "".join(letters)
    begins = re.match(rf"""[\s*`_"(\[]*([{kinds}])(?:[).:,;*`_"\]]|[ \t]+[(\-\u2013\u2014]|[ \t]*$)""", text, re.MULTILINE)
    if begins:
        return begins[1]
    told = re.search(rf"""(?i:answer|option|choice)(?i:\s+is)?[\s:*`_"(\[]*([{kinds}])(?:[^A-Za-z']|$)""", text)
    if told:
        return told[1]
    found = set(re.findall(rf"(?<![A-Za-z'])(?!{ARTICLE})([{kinds}])(?![A-Za-z'])", text))
    return found.pop() if len(found) == 1 else None


def yes_no_metrics(answers: Sequence[Said], *, positive: str) -> Metrics:
    """Accuracy, and precision, recall and F1 of the answer that counts as `positive` (0 where they are not defined); the share
    of yes among the model's answers."""
    said = [answer.text == positive for answer in answers]
    true = [answer.item.answer == positive for answer in answers]
    hits = sum(s and t for s, t in zip(said, true, strict=True))
    precision, recall = _share(hits, sum(said)), _share(hits, sum(true))
    return {
        "accuracy": estimate([answer.text == answer.item.answer for answer in answers], seed=SEED),
        "precision": precision,
        "recall": recall,
        "f1": _share(2 * precision * recall, precision + recall),
        "yes_share": _share(sum(answer.text == "Yes" for answer in answers), len(answers)),
    }


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
