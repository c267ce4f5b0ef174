"""One run: driver, workers, the loop, checkpoints, metrics, and the run's folder."""
