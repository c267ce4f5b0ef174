"""The shelf of model families: one file each, holding only what differs from the common path."""

import difflib

from rayalign.models import llava, llava_next
from rayalign.models.family import Family

FAMILIES: dict[str, Family] = {family.model_type: family for family in (llava.FAMILY, llava_next.FAMILY)}
REGISTERED_MODELS: dict[str, str] = {name: hub_id for f in FAMILIES.values() for name, hub_id in f.registered.items()}


def find_family(model_type: str) -> Family:
    """The family of a transformers config's `model_type`; ValueError lists the supported ones."""
    if model_type not in FAMILIES:
        raise ValueError(f"Models of type {model_type!r} are not supported. Supported types: {', '.join(sorted(FAMILIES))}.")
    return FAMILIES[model_type]


def hub_id_of(registered_name: str) -> str:
    """The hub id behind a name that --model_type takes; ValueError suggests near names."""
    if registered_name not in REGISTERED_MODELS:
        near = difflib.get_close_matches(registered_name, REGISTERED_MODELS, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Registered: {', '.join(sorted(REGISTERED_MODELS))}."
        raise ValueError(f"--model_type {registered_name}: no registered model has this name. {hint}")
    return REGISTERED_MODELS[registered_name]


__all__ = ["FAMILIES", "REGISTERED_MODELS", "Family", "find_family", "hub_id_of"]
