"""What is done with a trained model: its export to other tools."""
