"""SHELF: one file a benchmark of the field: reads its own files, and turns a model's answers into its metrics."""
