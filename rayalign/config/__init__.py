"""Every flag once: what it is, its bounds, and how words and YAML become a run's configuration."""
