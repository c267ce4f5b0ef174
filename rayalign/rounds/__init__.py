"""Rounds of preference learning: a policy's own responses are scored, paired and trained on, several times over."""
