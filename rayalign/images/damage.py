"""Damages an image so that little of what it shows is left: the rejected side of mDPO's conditional preference."""

import hashlib
import math

import numpy as np
from PIL import Image

LEAST_AREA, MOST_AREA = 0.01, 0.2
LEAST_ASPECT, MOST_ASPECT = 3 / 4, 4 / 3


def damage_image(image: Image.Image, *, seed: str) -> Image.Image:
    """A random piece of the image, 1 to 20 % of its area, scaled up to the image's own size, so that it takes as many tokens.

    As in mDPO (https://arxiv.org/abs/2406.11839). Area (uniform), aspect ratio (log-uniform, 3:4 to 4:3 of the image's) and
    place are drawn from `seed` alone: a pair's damage is the same in every epoch, on every worker and after a resume.
    """
    draw = np.random.default_rng(list(hashlib.sha256(seed.encode()).digest()))
    area = draw.uniform(LEAST_AREA, MOST_AREA)
    aspect = math.exp(draw.uniform(math.log(LEAST_ASPECT), math.log(MOST_ASPECT)))
    width, height = math.sqrt(area * aspect) * image.width, math.sqrt(area / aspect) * image.height
    left, top = draw.uniform(0, image.width - width), draw.uniform(0, image.height - height)
    box = (left, top, left + width, top + height)
    return image.resize(image.size, Image.Resampling.BICUBIC, box=box)
