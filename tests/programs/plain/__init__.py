"""A program of several files, as `python -m plain.train`."""
