"""The linear head of a reward model: scores the last token's state. Its file stands beside the adapter or the weights.

Names and keys are those that LLaMA-Factory and TRL's value-head models use (`v_head.summary.weight` [1, H],
`v_head.summary.bias` [1]).
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SAFETENSORS, BIN = "value_head.safetensors", "value_head.bin"


class ValueHead(nn.Module):
    """Scores states [n, H]: w h + b, in float32 or better whatever the type of the states.

    A new head is all zeros. Only w is trained: a Bradley-Terry loss can't see b, so a head made here keeps b = 0 and its scores
    are those of a head without bias; a head made elsewhere keeps the b that it came with.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.summary = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.summary.weight)
        nn.init.zeros_(self.summary.bias)
        self.summary.bias.requires_grad_(False)

    def forward(self, states: Tensor) -> Tensor:
        """[n], from states [n, H]."""
        scores: Tensor = self.summary(states.to(self.summary.weight.dtype))
        return scores.squeeze(-1)


def save_value_head(head: ValueHead, folder: Path, *, safe_serialization: bool) -> None:
    """Writes value_head.safetensors, or value_head.bin, in PyTorch's own format, for loaders that know no other."""
    weights = {f"v_head.{name}": value.detach().cpu().contiguous() for name, value in head.state_dict().items()}
    if safe_serialization:
        save_file(weights, folder / SAFETENSORS)
    else:
        torch.save(weights, folder / BIN)


def find_value_head(folder: Path) -> Path | None:
    """The file of a folder's value head, if it has one."""
    return next((folder / name for name in (SAFETENSORS, BIN) if (folder / name).is_file()), None)


def load_value_head(folder: Path, hidden_size: int) -> ValueHead:
    """The value head of a folder, or a new one where it has none. A .bin file is read as tensors only: nothing in it is run.

    Raises ValueError for a file that is damaged, of other keys or of another size.
    """
    head = ValueHead(hidden_size)
    path = find_value_head(folder)
    if path is None:
        return head
    weights = _read_weights(path)
    expected = {f"v_head.{name}": tuple(value.shape) for name, value in head.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if found != expected:
        raise ValueError(
            f"{path}: holds {found}, and the value head of this model is {expected}. Was it made for another model?"
        )
    head.load_state_dict({name.removeprefix("v_head."): value for name, value in weights.items()})
    return head


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        weights = load_file(path) if path.name == SAFETENSORS else torch.load(path, weights_only=True, map_location="cpu")
    except OSError:
        raise
    except Exception as error:  # a file of other content may raise anything
        raise ValueError(_unreadable(path)) from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(_unreadable(path))
    return weights


def _unreadable(path: Path) -> str:
    return (
        f"{path}: is damaged, or holds something else than named tensors, which is not read since it could run code. "
        "Copy the value head again from the run that wrote it."
    )
