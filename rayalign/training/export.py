"""The whole of the verb `export`: the model of a run or of a checkpoint as a folder, and its upload to the hub."""

from huggingface_hub import HfApi

from rayalign.config.serving import ExportConfig
from rayalign.serving import export as of_model
from rayalign.serving import hub
from rayalign.storage import Store
from rayalign.training import checkpoint_export as of_checkpoint


def run(flags: ExportConfig, *, api: HfApi | None = None) -> Store:
    """Writes what the flags name, uploads it where --push_to_hub says so, and returns its folder.

    Raises ValueError for what can't be exported, and, before any work is done, for an upload that can't be made.
    """
    if flags.push_to_hub:
        hub.check_push(flags.push_to_hub, api=api)
    output = of_checkpoint.run(flags) if flags.checkpoint or flags.run_dir else of_model.run(flags)
    if flags.push_to_hub:
        hub.push(output, flags.push_to_hub, private=flags.hub_private, api=api)
    return output
