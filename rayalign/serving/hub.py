"""The upload of an exported folder to the Hugging Face hub, for `export --push_to_hub`."""

import logging
import tempfile
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.errors import HTTPError as ClientError  # type: ignore[attr-defined]  # httpx's or httpx2's, by version
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, and not listed

from rayalign.serving.export_folder import CHECKPOINT_NOTE
from rayalign.storage import Store

logger = logging.getLogger(__name__)

UNREACHED = (ClientError, OSError, RuntimeError)
"""What calls of the hub raise where the network is not there, is too slow or ends; RuntimeError where a large file is sent."""


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
    except HfHubHTTPError as error:
        raise ValueError(f"{flag}: the hub does not let us in ({_reason(error)}).") from None
    except UNREACHED as error:
        raise ValueError(
            f"{flag}: the hub can't be reached ({_reason(error)}). Leave the flag out, or try again with a network."
        ) from None


def push(output: Store, repo: str, *, private: bool, api: HfApi | None = None) -> str:
    """Uploads a folder's files as one commit, into a repository that is made if need be; returns its address."""
    api = api or HfApi()
    with tempfile.TemporaryDirectory() as temporary:
        folder = output.local_path or Path(temporary)
        if output.local_path is None:
            output.download(folder)
        try:
            address = api.create_repo(repo, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                commit_message="Export by rayalign",
                ignore_patterns=CHECKPOINT_NOTE,  # which has paths of this machine
            )
        except HfHubHTTPError as error:
            raise ValueError(
                f"--push_to_hub {repo}: the hub refused it ({_reason(error)}). The export is in {output.location}."
            ) from None
        except UNREACHED as error:
            raise ValueError(
                f"--push_to_hub {repo}: the upload broke off ({_reason(error)}). The export is in {output.location}: pass "
                "--overwrite true to make and upload it again, or send that folder with `hf upload`."
            ) from None
    logger.info("Uploaded to %s", address)
    return str(address)


def _reason(error: Exception) -> str:
    """The first line of what an error says; its name where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]
