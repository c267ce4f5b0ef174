"""The reference's log-probabilities as data: what they depend on, and the pass that computes them."""
