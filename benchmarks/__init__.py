"""Side-by-side measurements; each prints a figure, none is a test."""
