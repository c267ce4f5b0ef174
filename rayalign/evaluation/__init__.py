"""What is done with a trained model over many rows: it responds to prompts, and responses and models are scored."""
