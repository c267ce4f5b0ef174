"""Scores of responses: by reward models, policies, a function, or a judge."""

from rayalign.main import pipeline

if __name__ == "__main__":
    pipeline(__file__)
