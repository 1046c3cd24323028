"""Names on disk and in modules, ties, heads: what a checkpoint means."""
