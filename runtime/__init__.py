"""A bundle becomes an image: NumPy only; engines import their library inside functions."""
