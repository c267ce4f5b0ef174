"""Direct preference optimisation of a vision-language model."""

from rayalign.main import pipeline

if __name__ == "__main__":
    pipeline(__file__)
