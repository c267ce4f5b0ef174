"""How well a model, adapter or reward model knows what people prefer, and how it does on benchmarks of the field."""

from rayalign.main import pipeline

if __name__ == "__main__":
    pipeline(__file__)
