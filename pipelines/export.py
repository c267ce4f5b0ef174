"""A reward model as one folder with a `score` head, which transformers, ms-swift and vLLM load."""

from rayalign.main import pipeline

if __name__ == "__main__":
    pipeline(__file__)
