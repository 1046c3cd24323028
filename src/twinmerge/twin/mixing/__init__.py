"""What runs: mixtures, the experts' parts, the modules that add them row by row, and what plans a pass."""
