"""The shelf of model families: one file each, holding only what differs from the common path."""

from rayalign.models import llava, llava_next
from rayalign.models.family import Family
from rayalign.models.source import ModelSource, resolve_model

FAMILIES: dict[str, Family] = {family.model_type: family for family in (llava.FAMILY, llava_next.FAMILY)}
REGISTERED_MODELS: dict[str, str] = {name: hub_id for f in FAMILIES.values() for name, hub_id in f.registered.items()}


def find_family(model_type: str) -> Family:
    """The family of a transformers config's `model_type`; ValueError lists the supported ones."""
    if model_type not in FAMILIES:
        raise ValueError(f"Models of type {model_type!r} are not supported. Supported types: {', '.join(sorted(FAMILIES))}.")
    return FAMILIES[model_type]


__all__ = ["FAMILIES", "REGISTERED_MODELS", "Family", "ModelSource", "find_family", "resolve_model"]
