"""Twin-Merging: one shared model, a low-rank exclusive part per expert, a router, an exact runtime."""
