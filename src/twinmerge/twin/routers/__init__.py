"""Routers: from what a twin reads of an input to one logit for each expert. One file for each, found by its name."""
