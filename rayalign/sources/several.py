"""Several data sets side by side: no file is read twice, and none of them is empty."""

import os
from collections.abc import Sequence

from rayalign.sources.files import Dataset, SourceFile, resolve_dataset
from rayalign.storage import Store


def resolve_datasets(arguments: Sequence[str]) -> tuple[Dataset, ...]:
    """The data sets that are read together; raises ValueError as `resolve_dataset`, and for a file that two of them hold: its
    records would count twice, and a copy of what is held out could be trained on."""
    datasets = tuple(resolve_dataset(argument) for argument in arguments)
    holders: dict[str, Dataset] = {}
    for dataset in datasets:
        for file in dataset.files:
            other = holders.setdefault(real_place(file), dataset)
            if other is not dataset:
                raise ValueError(
                    f"Datasets '{other.argument}' and '{dataset.argument}' both hold {file.location}, whose records would be "
                    "read twice. Name it once; NAME#N says how many of a data set's records there are."
                )
    return datasets


def require_records(dataset: Dataset, count: int) -> None:
    """Raises ValueError for a data set with so many records, if that is none."""
    if not count:
        raise ValueError(f"Dataset '{dataset.argument}' holds no records. Name another, or leave it out.")


def real_place(file: SourceFile) -> str:
    """Where a file really is, links followed: the same for two names of one file."""
    local = Store(file.location).local_path
    return file.location if local is None else os.path.realpath(local)
