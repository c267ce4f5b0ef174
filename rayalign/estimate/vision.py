"""What images cost: features, operations and memory of the vision tower and the aligner, from the modules' shapes and the image
processor's tensors."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rayalign.estimate.architecture import Skeleton


@dataclass(frozen=True)
class ImageLoad:
    """One image: its features (image tokens of the prompt), the patches that the tower sees of it (class tokens included), the
    bytes of its pixels, and the operations of one forward through tower and aligner."""

    features: int
    patches: int
    pixel_bytes: int
    tower_flops: float
    aligner_flops: float


class VisionCosts:
    """The vision part of one model. Towers of other kinds than transformers over patches are only estimated."""

    def __init__(self, skeleton: Skeleton, config: Any) -> None:
        base, parts = skeleton.base, skeleton.parts
        self._settings = config.vision_config
        inside = {name: module for name, module in base.named_modules() if parts.of(name) == "vit"}
        convolutions = [module for module in inside.values() if isinstance(module, (nn.Conv2d, nn.Conv3d))]
        linears = [module for module in inside.values() if isinstance(module, nn.Linear)]
        aligning = [m for name, m in base.named_modules() if parts.of(name) == "aligner" and isinstance(m, nn.Linear)]
        self._patch_side: int = convolutions[0].kernel_size[-1]
        self.hidden = convolutions[0].out_channels
        self.widest = max((linear.out_features for linear in linears), default=self.hidden)
        self.layers: int = getattr(self._settings, "num_hidden_layers", None) or self._settings.depth
        self._per_patch = 2 * sum(module.weight.numel() for module in (*convolutions[:1], *linears))
        self._aligner_per_group = 2 * sum(linear.weight.numel() for linear in aligning)
        self._group = max(1, aligning[0].in_features // self.hidden) if aligning else 1
        self._class_tokens = sum(name.endswith(("class_embedding", "cls_token")) for name, _ in base.named_parameters())

    def load(self, inputs: Mapping[str, Tensor], features: int) -> ImageLoad:
        """Of one image, from what the image processor makes of it."""
        pixels = inputs["pixel_values"]
        if pixels.ndim == 2:  # [patches, pixels of a patch]: any resolution
            own_patches = patches = len(pixels)
            pairs = self._pairs_in_windows(patches)
        else:  # [..., tiles, 3, height, width]
            tiles = math.prod(pixels.shape[:-3])
            per_tile = (pixels.shape[-2] // self._patch_side) * (pixels.shape[-1] // self._patch_side)
            own_patches, patches = tiles * per_tile, tiles * (per_tile + self._class_tokens)
            pairs = self.layers * tiles * (per_tile + self._class_tokens) ** 2
        tower_flops = self._per_patch * patches + 4 * self.hidden * pairs
        aligner_flops = self._aligner_per_group * own_patches / self._group
        return ImageLoad(features, patches, pixels.numel() * pixels.element_size(), tower_flops, aligner_flops)

    def kept_per_patch(self, *, full: bool) -> int:
        """Numbers that a trainable tower keeps of each patch, by rule of thumb: of each layer its inputs, norms, q, k, v and
        the wide part of its MLP; where all weights are trained, every linear's input, too. It runs without gradient
        checkpointing."""
        return self.layers * ((8 if full else 6) * self.hidden + (2 if full else 1) * self.widest)

    def _pairs_in_windows(self, patches: int) -> int:
        """Queries times keys over all layers; Qwen2.5-VL's see windows only, except for a few."""
        side = getattr(self._settings, "window_size", None)
        if side is None:
            return self.layers * patches**2
        whole: int = len(self._settings.fullatt_block_indexes)
        window: int = min(patches, (side // self._patch_side) ** 2)
        return whole * patches**2 + (self.layers - whole) * patches * window
