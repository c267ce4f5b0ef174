"""The parts of a vision-language model, found by their names in it: vision tower, aligner, language model."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from rayalign.models.compat import vision_tower

Part = Literal["vit", "aligner", "llm"]

ALIGNERS_INSIDE_A_TOWER = ("merger", "deepstack_merger_list")
"""Qwen's and GLM's vision modules end in what other models keep beside the tower."""

PART_NAMES: dict[Part, str] = {"vit": "vision tower", "aligner": "aligner", "llm": "language model"}


@dataclass(frozen=True)
class Parts:
    """Where a model's parts are: names of modules, each the root of its part. The aligner is whatever belongs to no other part,
    and `mergers` in the tower."""

    language: tuple[str, ...]
    tower: str | None
    mergers: tuple[str, ...]

    def of(self, name: str) -> Part:
        """The part that a module or parameter of this name belongs to."""
        if any(_is_below(name, root) for root in self.language):
            return "llm"
        if self.tower is None or not _is_below(name, self.tower) or any(_is_below(name, root) for root in self.mergers):
            return "aligner"
        return "vit"

    def linears(self, base: nn.Module, part: Part) -> list[str]:
        """The names of a part's linears, without the output head."""
        head = self.language[-1]
        named = base.named_modules()
        return [name for name, module in named if isinstance(module, nn.Linear) and name != head and self.of(name) == part]


def find_parts(base: Any) -> Parts:
    """The parts of a transformers model; a language model has no tower."""
    names = {id(module): name for name, module in base.named_modules()}
    decoder = names[id(base.get_decoder())]
    module = vision_tower(base)
    tower = names.get(id(module))
    mergers = tuple(f"{tower}.{name}" for name in ALIGNERS_INSIDE_A_TOWER if tower and hasattr(module, name))
    return Parts((decoder, names[id(base.get_output_embeddings())]), tower, mergers)


def _is_below(name: str, root: str) -> bool:
    return name == root or name.startswith(f"{root}.")
