"""Supervised fine-tuning on the chosen responses, the stage before preference alignment."""

from rayalign.main import pipeline

if __name__ == "__main__":
    pipeline(__file__)
