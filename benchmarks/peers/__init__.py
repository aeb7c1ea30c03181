"""The loaders that others would write for the same recipe, to measure ours against."""
