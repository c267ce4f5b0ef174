"""Many runs: the search space, and Ray Tune over it."""
