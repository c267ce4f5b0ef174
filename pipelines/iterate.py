"""Rounds of preference learning on a policy's own responses, in one command."""

from rayalign.main import pipeline

if __name__ == "__main__":
    pipeline(__file__)
