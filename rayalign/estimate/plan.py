"""What a run will need, as text: with the real encoder where the model's processor is at hand, else by estimate.

`estimate` does the sums; this module brings model and data, on Ray where records are encoded. Encoded records stay in the
cache, where the run finds them.
"""

import dataclasses
import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor

from rayalign.config.config import Config
from rayalign.config.plan import PlanConfig
from rayalign.data.prepare import prepare_run
from rayalign.downloads import model_folder
from rayalign.estimate.advice import held_out_of, schedule_of
from rayalign.estimate.architecture import Blueprint
from rayalign.estimate.catalogue import shipped_config, shipped_configs
from rayalign.estimate.estimate import Estimate
from rayalign.estimate.lengths import ImageLook, ImageTokensUnknown, estimated, measured
from rayalign.estimate.shapes import DataShapes
from rayalign.estimate.table import plan_text
from rayalign.estimate.vision import VisionCosts
from rayalign.joining import start_ray
from rayalign.models.processors import check_resized, load_processor, process_images
from rayalign.models.registry import REGISTERED_MODELS
from rayalign.models.source import ModelSource, require_description, resolve_model
from rayalign.nodes import wait_for_cpus
from rayalign.sources.whole_paths import with_whole_paths

logger = logging.getLogger(__name__)


def plan_run(config: Config, plan: PlanConfig | None = None, *, several_runs: bool = False) -> str:
    """The plan of a run as text; `several_runs`: it is one of a sweep.

    Raises ValueError for what the user can correct: flags, model, data.
    """
    return plan_text(estimate_run(config, plan, several_runs=several_runs))


def estimate_run(config: Config, plan: PlanConfig | None = None, *, several_runs: bool = False) -> Estimate:
    """What the plan tells, as figures, most of which are computed when they are first asked for."""
    config.check_inputs()
    name = config.model.model_type or config.model.model or config.model.adapter or ""
    config = with_whole_paths(_with_folder(config))
    source = resolve_model(config.model, REGISTERED_MODELS)
    processor, folder, origin = None, source.base, f"config of {source.base}"
    try:
        require_description(config.model, REGISTERED_MODELS)
    except ValueError as error:
        shipped = shipped_config(source.base)
        if shipped is None:
            brought = ", ".join(shipped_configs())
            raise ValueError(f"{error} (A plan needs no files of {brought}, whose configs come with rayalign.)") from None
        folder, origin = str(shipped), "config that comes with rayalign; the model's files are not at hand"
        logger.info("%s: not at hand, lengths are estimated", source.base)
    else:
        processor = _processor_of(source, config)
        folder = model_folder(source.base, weights=False)
        if source.adapter is not None:
            source = dataclasses.replace(source, adapter=model_folder(source.adapter, weights=True))
    model_config = AutoConfig.from_pretrained(folder, trust_remote_code=config.model.trust_remote_code)
    blueprint = Blueprint(model_config, source, config.model, config.tuner, config.algorithm.needs)
    look = _image_look(blueprint, processor, folder, config.data.max_pixels)
    data = _measure(config, blueprint, look) if processor is not None else estimated(config, look)
    known = config.precomputes_reference(several_epochs=schedule_of(config, data).epochs > 1, several_runs=several_runs)
    blueprint = dataclasses.replace(blueprint, reference_known=known)
    return Estimate(config, plan or PlanConfig(), blueprint, data, name, origin)


def _with_folder(config: Config) -> Config:
    """The same configuration where --model names a folder's config.json."""
    model = config.model.model
    if model is None or Path(model).name != "config.json" or not Path(model).expanduser().is_file():
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, model=str(Path(model).expanduser().parent)))


def _processor_of(source: ModelSource, config: Config) -> Any | None:
    """The model's processor; None where its files are not there and can't be fetched."""
    try:
        return load_processor(source.base, trust_remote_code=config.model.trust_remote_code)
    except (OSError, ValueError, TypeError) as error:  # what transformers raises for a folder without a tokenizer differs
        logger.info("No processor of %s (%s): lengths are estimated", source.base, str(error).splitlines()[0])
        return None


def _image_look(blueprint: Blueprint, processor: Any | None, folder: str, max_pixels: int | None) -> ImageLook | None:
    """What tells images' loads; None for a language model."""
    config, family = blueprint.config, blueprint.family
    if family.text_only:
        return None

    def process(image: Image.Image) -> Mapping[str, Tensor]:
        if processor is not None:
            return process_images(processor, family, config, [image], alone=[True]).tensors
        image_processor = _image_processor(folder)
        check_resized(image_processor, *image.size)  # as preparation does
        given = [[image]] if family.one_sample_an_image else [image]
        inputs: Mapping[str, Tensor] = image_processor(given, return_tensors="pt")
        return inputs

    return ImageLook(process, family, config, VisionCosts(blueprint.build(), config), max_pixels=max_pixels)


@functools.cache
def _image_processor(folder: str) -> Any:
    try:
        return AutoImageProcessor.from_pretrained(folder)
    except (OSError, ValueError):
        raise ImageTokensUnknown(
            f"{folder}: has no preprocessor_config.json, which says how many tokens an image becomes. Put the model's "
            "beside its config.json."
        ) from None


def _measure(config: Config, blueprint: Blueprint, look: ImageLook | None) -> DataShapes:
    start_ray(config)
    wait_for_cpus(config)
    data = prepare_run(config)
    held_out = 0 if data.held_out else held_out_of(config, total=data.training.num_rows)
    token = None if look is None else blueprint.config.image_token_id
    shapes = measured(data.training, held_out, image_token_id=token, look=look)
    return dataclasses.replace(shapes, evaluated=data.held_out.num_rows) if data.held_out else shapes
