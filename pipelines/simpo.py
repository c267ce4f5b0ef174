"""Simple preference optimisation: rewards per token, without a reference."""

from rayalign.main import pipeline

if __name__ == "__main__":
    pipeline(__file__)
