"""How a picture is fetched, decoded, kept within bounds, and damaged."""
