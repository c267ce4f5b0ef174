"""The layout of a shared-prefix row `[prompt | chosen | rejected]`, as `data` writes it and `attention` reads it."""

PAD, PROMPT, CHOSEN, REJECTED = -1, 0, 1, 2
"""Segment ids: what a token of a row belongs to."""

RowLengths = tuple[tuple[int, int], ...]
"""Of each row the number of its prompt's tokens, and of all of its tokens."""
