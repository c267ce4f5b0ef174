"""Contrastive preference optimisation: without a reference, held to the chosen responses."""

from rayalign.main import pipeline

if __name__ == "__main__":
    pipeline(__file__)
