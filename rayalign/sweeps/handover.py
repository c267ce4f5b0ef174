"""Weights that one trial of a population hands over to another: the one's checkpoint becomes the newest of the other's run.

What Ray Tune carries is a folder with the checkpoint's files and the name of the trial that wrote them.
"""

import json
import logging
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rayalign.config.config import Config
from rayalign.storage import Store
from rayalign.sweeps.trials import HANDED_NOTE, read_handed
from rayalign.training.checkpoint_folder import checkpoint_name
from rayalign.training.run_folder import write_config

logger = logging.getLogger(__name__)

FILES, GIVER = "files", "giver.json"


def pack(checkpoint: Store, target: Path, *, name: str, step: int) -> None:
    """What is carried of a trial's checkpoint after some steps."""
    checkpoint.download(target / FILES)
    (target / GIVER).write_text(json.dumps({"name": name, "step": step}))


def take_over(config: Config, carried: str, *, name: str, flags: Mapping[str, Any]) -> None:
    """Lets a trial's run go on from the weights of another one, with its own new flags; what it carries of itself it has."""
    giver = json.loads((Path(carried) / GIVER).read_text())
    if giver["name"] == name:
        return
    folder = Store.at(str(config.run.output_dir))
    checkpoints = folder / "checkpoints"
    own = checkpoints.list()
    (checkpoints / checkpoint_name(giver["step"], uuid.uuid4().hex[:8])).upload(Path(carried) / FILES)
    for checkpoint in own:
        checkpoint.delete()
    write_config(folder, config)
    line = {"step": giver["step"], "from": giver["name"], "flags": dict(flags)}
    (folder / HANDED_NOTE).write_json([*read_handed(folder), line])
    logger.info("Takes over the weights of %s at step %d", giver["name"], giver["step"])
