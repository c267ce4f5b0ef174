"""Odds ratio preference optimisation: fine-tuning and preference in one stage, without a reference."""

from rayalign.main import pipeline

if __name__ == "__main__":
    pipeline(__file__)
