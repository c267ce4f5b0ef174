"""The upload of an exported folder to the Hugging Face hub, for `export --push_to_hub`."""

import logging
import tempfile
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, and not listed

from rayalign.storage import Store

logger = logging.getLogger(__name__)


def check_push(repo: str, *, api: HfApi | None = None) -> None:
    """Raises ValueError, before any work is done, where an upload to this repository can't be made from here."""
    flag = f"--push_to_hub {repo}"
    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise ValueError(f"{flag}: must be OWNER/NAME, or NAME for a repository of your own.") from None
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"{flag}: HF_HUB_OFFLINE is set, so that nothing is sent to the hub. Unset it, or leave the flag out.")
    try:
        (api or HfApi()).whoami()
    except LocalTokenNotFoundError:
        raise ValueError(f"{flag}: there is no token for the hub. Run `hf auth login`, or set HF_TOKEN.") from None
    except (HfHubHTTPError, OSError) as error:
        raise ValueError(f"{flag}: the hub does not let us in ({str(error).splitlines()[0][:200]}).") from None


def push(output: Store, repo: str, *, private: bool, api: HfApi | None = None) -> str:
    """Uploads a folder's files as one commit, into a repository that is made if need be; returns its address."""
    api = api or HfApi()
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as temporary:
            folder = output.local_path or Path(temporary)
            if output.local_path is None:
                output.download(folder)
            api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Export by rayalign")
    except HfHubHTTPError as error:
        raise ValueError(
            f"--push_to_hub {repo}: the hub refused it ({str(error).splitlines()[0][:200]}). The export is in "
            f"{output.location}."
        ) from None
    logger.info("Uploaded to %s", address)
    return str(address)
