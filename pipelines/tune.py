"""A sweep over the flags of any training algorithm: many short runs, ranked by a metric."""

from rayalign.main import pipeline

if __name__ == "__main__":
    pipeline(__file__)
