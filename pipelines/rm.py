"""Training of a reward model: a score for each response, from preference pairs."""

from rayalign.main import pipeline

if __name__ == "__main__":
    pipeline(__file__)
