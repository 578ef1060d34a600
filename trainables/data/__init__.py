"""Data sets: listed, decoded, cached, augmented and served in batches."""
