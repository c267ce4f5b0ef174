"""Responses that grow side by side, a token of each at a time: one may join between any two tokens, and leave as well.

`generation` reads the prompts and has all of a batch begin and end together; `serving.engine` lets them come and go.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from rayalign.policy.generation import Prefilled, layers_of
from rayalign.policy.policy import Policy


class Sequences:
    """The rows of a forward with one cache: of each the prompt's keys and values and those of its response so far, padded in
    front. What a row's next token is does not depend on the others, but for the rounding of sums.

    A row costs the memory of the longest one, and a join or a leave copies what stays, as each step does by itself.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._cache = DynamicCache()
        self._is_token = torch.empty(0, 0, dtype=torch.bool)  # [R, K]: False where a row's cache holds padding
        self._positions = torch.empty(0, 1, dtype=torch.long)  # [R, 1]: of each row's last token

    def __len__(self) -> int:
        return len(self._is_token)

    @property
    def num_places(self) -> int:
        """Tokens of a row with its padding."""
        return self._is_token.shape[1]

    def join(self, prompt: Prefilled) -> None:
        """Adds a row behind the others: a prompt that was read by itself."""
        device = prompt.logits.device
        # The axes of a position (M-RoPE) are the same behind a prompt.
        positions = prompt.position_ids.reshape(-1, 1)[:1].to(device)
        is_token = torch.ones(1, prompt.num_tokens, dtype=torch.bool, device=device)
        if not len(self):
            self._cache, self._is_token, self._positions = prompt.cache, is_token, positions
            return
        longest = max(self.num_places, prompt.num_tokens)
        for layer, new in zip(layers_of(self._cache), layers_of(prompt.cache), strict=True):
            layer.keys = torch.cat([_padded(layer.keys, longest), _padded(new.keys, longest)])
            layer.values = torch.cat([_padded(layer.values, longest), _padded(new.values, longest)])
        rows = [torch.nn.functional.pad(row, (longest - row.shape[1], 0), value=False) for row in (self._is_token, is_token)]
        self._is_token, self._positions = torch.cat(rows), torch.cat([self._positions, positions])

    def keep(self, rows: Sequence[int]) -> None:
        """Leaves only these rows, in their order, and no padding that all of them have."""
        if len(rows) == len(self):
            return
        if not rows:
            self._cache, self._is_token = DynamicCache(), self._is_token[:0]
            return
        kept = torch.tensor(rows, device=self._is_token.device)
        self._is_token, self._positions = self._is_token[kept], self._positions[kept]
        first = int(self._is_token.any(0).int().argmax())
        self._is_token = self._is_token[:, first:]
        for layer in layers_of(self._cache):
            of_layer = kept.to(layer.keys.device)
            layer.keys, layer.values = layer.keys[of_layer, :, first:], layer.values[of_layer, :, first:]

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Puts one token [R] behind each row; the logits [R, V] of what follows it."""
        self._is_token = torch.nn.functional.pad(self._is_token, (0, 1), value=True)
        self._positions = self._positions + 1
        last = torch.tensor(tokens, device=self._is_token.device)[:, None]
        return self._policy.logits_behind_tokens(last, self._positions, self._cache, self._is_token)


def _padded(states: Tensor, num_places: int) -> Tensor:
    """Keys or values [R, heads, K, size] with zeros in front, up to a number of places."""
    return torch.nn.functional.pad(states, (0, 0, num_places - states.shape[-2], 0))
