"""bitsandbytes' AdamW with moments of 8 bits, for weights that are whole or sharded; this module needs bitsandbytes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import bitsandbytes
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class AdamW8bit(bitsandbytes.optim.AdamW8bit):  # type: ignore[misc, name-defined]  # which has no types
    """Of a sharded weight each worker keeps the moments of its own rows, with scales for each 256 of these, and updates them as
    it would a weight of its own. Which weights are so small that their moments stay float32 depends on all of their rows."""

    def init_state(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        with self._own_rows(p) as own:
            super().init_state(group, own, gindex, pindex)

    def update_step(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        with self._own_rows(p) as own:
            super().update_step(group, own, gindex, pindex)

    def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
        config: dict[str, Any] = super().get_config(gindex, pindex, group)
        of_all_rows = group["params"][pindex].numel()
        # It's compared with the number of a worker's own elements.
        return config | {"min_8bit_size": 0 if of_all_rows >= config["min_8bit_size"] else of_all_rows + 1}

    @contextmanager
    def _own_rows(self, p: Tensor) -> Iterator[Tensor]:
        """Within it, a weight's rows on this worker, with their gradient and state; they share the weight's memory."""
        if not isinstance(p, DTensor):
            yield p
            return
        own = nn.Parameter(p.to_local().detach())
        if isinstance(p.grad, DTensor):
            own.grad = p.grad.to_local()
        self.state[own] = self.state[p]
        yield own
        del self.state[own]
