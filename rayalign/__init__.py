"""rayalign aligns vision-language models with human preferences on a Ray cluster."""

__version__ = "0.1.0"
