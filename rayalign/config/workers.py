"""--num_workers: a number, or the fewest and the most of an elastic run, which goes on with as many as there is room for."""

import re


def workers_of(value: int | str) -> tuple[int, int]:
    """The fewest and the most workers. Raises ValueError where `value` is neither a number nor MIN:MAX."""
    match = re.fullmatch("([0-9]+)(?::([0-9]+))?", str(value))
    if match is None:
        raise ValueError(f"--num_workers {value}: must be a whole number, or two as MIN:MAX.")
    fewest, most = int(match[1]), int(match[2] or match[1])
    if fewest < 1:
        raise ValueError(f"--num_workers {value}: must be at least 1.")
    if fewest > most:
        raise ValueError(f"--num_workers {value}: MIN is above MAX. Pass {most}:{fewest}.")
    return fewest, most
