"""Data and scores of the eight image tasks of CLIP."""
