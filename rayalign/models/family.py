"""What differs between model families, as data: each file of this folder fills one `Family` in."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

Grid = tuple[int, int]
"""Rows and columns of an image's features."""


@dataclass(frozen=True)
class Family:
    """One model family of transformers.

    `model_type` is the `model_type` of its config; `registered` maps the names that --model_type takes to hub ids.
    `image_token_counts` says, from the MODEL's config and the processor's image inputs, how many features each image will
    yield; None where that isn't known beforehand: each image's features then come apart from the others'.
    `attention_projections` are the linears that --lora_target_modules DEFAULT means: q, k and v, or one that is all three.
    `text_only`: a language model.

    `bidirectional`: the tokens that also see what comes after them: none, those of an image all of the same image, those of the
    prompt all of the prompt. `first_position` is the position of a row's first token. `image_grids`: an image's tokens have
    positions in three dimensions (M-RoPE, https://arxiv.org/abs/2409.12191, section 2.1), which follow from each image's grid.
    `deepstack`: the tower's features also enter later layers (https://arxiv.org/abs/2406.04334). `features_by_company`: an
    image that is alone in its record yields other features than one that is not. `one_sample_an_image`: the image processor
    puts all of a list's images into one sample, so that each image comes as a list of its own.

    `chat_template` is for processors that have none, and `text_prompt` finishes a rendered prompt without images, which the
    processor itself would not take.
    """

    model_type: str
    image_token_counts: Callable[[Any, Mapping[str, Any]], list[int]] | None = None
    registered: Mapping[str, str] = field(default_factory=dict)
    attention_projections: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value")
    text_only: bool = False
    bidirectional: Literal["none", "image", "prompt"] = "none"
    first_position: int = 0
    image_grids: Callable[[Any, Mapping[str, Any]], list[Grid]] | None = None
    deepstack: bool = False
    features_by_company: bool = False
    one_sample_an_image: bool = False
    chat_template: str | None = None
    text_prompt: Callable[[str, Any], str] = lambda prompt, tokenizer: prompt

    @property
    def auto_class(self) -> Any:
        """The class of transformers that loads the family's models."""
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText  # here: seconds, for whoever reads configs

        return AutoModelForCausalLM if self.text_only else AutoModelForImageTextToText


@dataclass(frozen=True)
class ImageInputs:
    """Some images as the model takes them: the tensors, and of each image the number of its features and, where positions need
    it, its grid (both empty where they aren't known beforehand)."""

    tensors: Mapping[str, "Tensor"] = field(default_factory=dict)
    lengths: tuple[int, ...] = ()
    grids: tuple[Grid, ...] = ()


@dataclass(frozen=True)
class RowLayout:
    """What the rows of a model's batches depend on; see `Family`."""

    pad_token_id: int
    image_token_id: int | None = None
    first_position: int = 0
    features_by_company: bool = False
