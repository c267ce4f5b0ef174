"""Models whose configs come along with rayalign, so that a run can be planned without a network."""

from pathlib import Path

from rayalign.models.registry import REGISTERED_MODELS

FOLDER = Path(__file__).parents[1] / "models" / "configs"


def shipped_configs() -> dict[str, Path]:
    """The folders (config.json, preprocessor_config.json) by registered name."""
    return {path.parent.name: path.parent for path in sorted(FOLDER.glob("*/config.json"))}


def shipped_config(hub_id: str) -> Path | None:
    """The folder for a hub id that is registered, if it has one."""
    folders = shipped_configs()
    return next((folders[name] for name, known in REGISTERED_MODELS.items() if known == hub_id and name in folders), None)
