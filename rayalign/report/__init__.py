"""The page of a run, for a person to read, and its charts."""
