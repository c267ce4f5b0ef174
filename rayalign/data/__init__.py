"""How records become batches: encoded by Ray Data, stored, put in order, and brought to the workers."""
