"""Which models there are: one file a family, their processors, and where a model's files lie."""
