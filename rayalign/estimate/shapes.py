"""How long a data set's pairs are and what images they have: what all else is computed from."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rayalign.estimate.vision import ImageLoad

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class PairShape:
    """One pair: tokens of the prompt (image tokens included), of both responses (0 where there is none), and its distinct
    images; `image_tokens` counts each place where one stands."""

    prompt: int
    chosen: int
    rejected: int
    image_tokens: int = 0
    images: tuple[ImageLoad, ...] = ()


@dataclass(frozen=True)
class DataShapes:
    """The pairs that were looked at, and how many there are: `total`, `held_out` of them not trained on; evaluations draw from
    `evaluated`, those or a data set's of their own. `origin` says how the lengths were found."""

    pairs: tuple[PairShape, ...]
    total: int
    held_out: int
    evaluated: int
    origin: str

    @property
    def prompt(self) -> Numbers:
        return np.array([p.prompt for p in self.pairs], dtype=np.float64)

    @property
    def chosen(self) -> Numbers:
        return np.array([p.chosen for p in self.pairs], dtype=np.float64)

    @property
    def rejected(self) -> Numbers:
        return np.array([p.rejected for p in self.pairs], dtype=np.float64)

    @property
    def image_tokens(self) -> Numbers:
        return np.array([p.image_tokens for p in self.pairs], dtype=np.float64)

    @property
    def rows(self) -> Numbers:
        """Lengths of the rows `[prompt | chosen | rejected]`."""
        return self.prompt + self.chosen + self.rejected

    @property
    def has_images(self) -> NDArray[np.bool_]:
        return np.array([bool(p.images) for p in self.pairs])

    @property
    def tower_flops(self) -> Numbers:
        return np.array([sum(i.tower_flops for i in p.images) for p in self.pairs], dtype=np.float64)

    @property
    def aligner_flops(self) -> Numbers:
        return np.array([sum(i.aligner_flops for i in p.images) for p in self.pairs], dtype=np.float64)

    @property
    def longest(self) -> PairShape:
        """The pair with the longest row."""
        return self.pairs[int(self.rows.argmax())]

    @property
    def fullest(self) -> PairShape:
        """The pair whose images are the most work."""
        return self.pairs[int(self.tower_flops.argmax())]
