"""What is computed with tensors alone: attention, log-probabilities, LoRA linears, the value head."""
