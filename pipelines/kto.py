"""Kahneman-Tversky optimisation: responses that are each labelled good or bad, or pairs."""

from rayalign.main import pipeline

if __name__ == "__main__":
    pipeline(__file__)
