"""--gradient_checkpointing auto in a run: how many layers its workers recompute, by the memory of their GPUs and its data."""

import dataclasses

from rayalign.config.config import Config
from rayalign.data.prepare import RunData
from rayalign.estimate.architecture import Blueprint
from rayalign.estimate.lengths import ImageLook, measured
from rayalign.estimate.memory import MicroBatch
from rayalign.estimate.vision import VisionCosts
from rayalign.estimate.worker_memory import WorkerMemory
from rayalign.models.processors import process_images

LOOKED_AT = 100
"""Records whose images are looked at, beside the longest record."""


def layers_to_recompute(config: Config, data: RunData, gpu_bytes: int) -> int:
    """The fewest layers of the language model that must run again in the backward for a run to fit GPUs of so much memory; all
    where it does not fit by the estimate.

    Raises ValueError for flags that do not fit the model or its adapter.
    """
    spec, source = data.spec, data.source.here()
    known = data.training.reference is not None
    blueprint = Blueprint(spec.model_config, source, config.model, config.tuner, config.algorithm.needs, reference_known=known)
    look, token = None, None
    if not spec.family.text_only:
        look = ImageLook(
            lambda image: process_images(spec.processor, spec.family, spec.model_config, [image], alone=[True]).tensors,
            spec.family,
            spec.model_config,
            VisionCosts(blueprint.build(), spec.model_config),
            max_pixels=config.data.max_pixels,
        )
        token = spec.layout.image_token_id
    training = dataclasses.replace(data.training, reference=None)
    shapes = measured(training, 0, image_token_id=token, look=look, looked_at=LOOKED_AT)
    rows = config.optimizer.rows_at_a_time(int(shapes.rows.max()))
    batch = MicroBatch(rows, shapes.longest, shapes.fullest)
    return WorkerMemory(config, blueprint, bool(shapes.has_images.any())).num_recomputed(batch, gpu_bytes)
