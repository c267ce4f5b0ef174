"""SHELF: one file a kind of scorer: responses to prompts in, a number for each out."""
