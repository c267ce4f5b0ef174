"""The check of models that no file of models/ describes: whether the common path computes what the model does by itself.

`worker` calls it before the first step. Every family that has a file is tested beforehand, and at length.
"""

import dataclasses
import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rayalign.data.batch import assemble
from rayalign.data.encode import Encoder
from rayalign.data.encoder_spec import EncoderSpec, image_processing
from rayalign.formats.records import IMAGE_MARK, Message, PreferenceRecord
from rayalign.models.registry import FAMILIES
from rayalign.policy.policy import Policy

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
ROUGH_TOLERANCE = 0.1
"""Allowed difference of a token's mean log-probability; in half precision two kernels differ by a few hundredths."""

# The second response repeats most of the first: where it sees that one, its tokens become far likelier.
CHOSEN = "The first picture shows a bridge over a river in autumn, the second one a red bicycle."
REJECTED = "The first picture shows a bridge over a river in autumn, the second one a black umbrella."


def check_forward(policy: Policy, spec: EncoderSpec) -> None:
    """Compares one sample (for a model with images two of them, of different sizes) with the model's own forward.

    Raises ValueError where image tokens and features disagree, or where the log-probabilities of a row that holds both
    responses are not those of two plain rows.
    """
    contents = [] if policy.family.text_only else [_picture(96, 64), _picture(48, 112)]
    message = Message(role="user", content=IMAGE_MARK * len(contents) + "What do the two pictures show?")
    record = PreferenceRecord(id="check", messages=(message,), images=tuple(contents), chosen=CHOSEN, rejected=REJECTED)
    encoder = Encoder(dataclasses.replace(spec, responses="both", max_length=2**20))
    training = [module for module in policy.model.modules() if module.training]
    policy.model.eval()
    try:
        with torch.no_grad():
            reason = _what_differs(policy, encoder, record)
    except Exception as error:  # an unknown model may raise anything
        raise _refusal(policy, f"{type(error).__name__}: {error}") from error
    finally:
        for module in training:
            module.training = True
    if reason:
        raise _refusal(policy, reason)


def _what_differs(policy: Policy, encoder: Encoder, record: PreferenceRecord) -> str | None:
    """What the common path gets wrong about one record, in words; None where nothing is."""
    contents = [image for image in record.images if isinstance(image, bytes)]
    spec = encoder.spec
    pair = encoder.encode(record, contents)
    # Of the same length, so that the second row differs from the first in nothing that its rejected response may see.
    changed = dataclasses.replace(pair, chosen_ids=pair.chosen_ids[::-1])
    batch, other = (
        assemble([some], layout=spec.layout, process_images=image_processing(spec)).to(policy.device)
        for some in (pair, changed)
    )
    images = policy.image_features(batch)
    made, expected = sum(map(len, images)), pair.prompt_ids.count(spec.layout.image_token_id or 0) if contents else 0
    if len(images) != len(contents) or made != expected:
        return (
            f"{len(contents)} pictures became {len(images)} groups of {made} features, and the prompt has room for {expected}"
        )
    tolerance = TOLERANCE.get(policy.base.dtype, ROUGH_TOLERANCE)
    logps = policy.logps(batch, images)
    for side, ours in (("chosen", logps.chosen), ("rejected", logps.rejected)):
        plain = _plain_logp(policy, encoder.plain_row(record, contents, side), int(ours.tokens))
        difference = float((ours.total - plain).abs() / ours.tokens)
        if not difference <= tolerance:
            return f"beside the other response the {side} one has a log-probability that is off by {difference:.2g} a token"
    again = policy.logps(other, images).rejected
    influence = float((again.total - logps.rejected.total).abs() / again.tokens)
    if not influence <= tolerance / 10:
        return f"the rejected response's log-probability moves by {influence:.2g} a token with the chosen one in its row"
    return None


def _plain_logp(policy: Policy, row: dict[str, Tensor], tokens: int) -> Tensor:
    """[1], of a row's last `tokens` tokens by the model's own forward."""
    inputs = {name: value.to(policy.device) for name, value in row.items()}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(policy.base.dtype)
    logits: Tensor = policy.model(**inputs, use_cache=False).logits[:, -tokens - 1 : -1].float()
    return logits.log_softmax(-1).gather(2, inputs["input_ids"][:, -tokens:, None]).sum((1, 2))


def _picture(width: int, height: int) -> bytes:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _refusal(policy: Policy, reason: str) -> ValueError:
    return ValueError(
        f"Models of type {policy.family.model_type!r} are none of those that are supported for certain, and this one can't be "
        f"trained in the common way: {reason}. Supported: {', '.join(sorted(FAMILIES))}."
    )
