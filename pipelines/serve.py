"""A model and its adapters behind an OpenAI-compatible address; a reward model's scores."""

from rayalign.main import pipeline

if __name__ == "__main__":
    pipeline(__file__)
