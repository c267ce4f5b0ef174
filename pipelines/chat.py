"""A conversation with a model in the terminal."""

from rayalign.main import pipeline

if __name__ == "__main__":
    pipeline(__file__)
