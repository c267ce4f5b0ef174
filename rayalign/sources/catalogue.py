"""Registered data set names and where they live; `files` reads what is found here like any other file."""

from dataclasses import dataclass

CATALOGUE = {"rlaif-v": "openbmb/RLAIF-V-Dataset"}
"""Name for --dataset -> data set on the Hugging Face hub, kept as parquet files."""


@dataclass(frozen=True)
class HubFile:
    """A parquet file on the hub at one commit, which the location names, so that its content never changes."""

    location: str
    size: int
    commit: str


def registered_files(name: str) -> list[HubFile]:
    """The parquet files of a registered data set at the hub's newest commit; raises ValueError where the hub can't be asked."""
    import huggingface_hub  # needed for registered names only, and slow to import

    repo = CATALOGUE[name]
    try:
        info = huggingface_hub.HfApi().dataset_info(repo, files_metadata=True)
    except Exception as error:  # the hub's client raises errors of several HTTP libraries
        raise ValueError(
            f"Dataset '{name}' is {repo} on the Hugging Face hub, which can't be reached: {error} "
            f"Download it where there is a network (hf download {repo} --repo-type dataset --local-dir FOLDER) "
            "and pass the FOLDER instead."
        ) from error
    files = [
        HubFile(location=f"hf://datasets/{repo}@{info.sha}/{sibling.rfilename}", size=sibling.size or 0, commit=info.sha or "")
        for sibling in info.siblings or []
        if sibling.rfilename.endswith(".parquet")
    ]
    if not files:
        raise ValueError(
            f"Dataset '{name}': {repo} on the Hugging Face hub holds no parquet file. Pass a local copy by its path."
        )
    return sorted(files, key=lambda file: file.location)
