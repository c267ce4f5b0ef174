"""A model's own responses to the prompts of data sets, as a data set."""

from rayalign.main import pipeline

if __name__ == "__main__":
    pipeline(__file__)
