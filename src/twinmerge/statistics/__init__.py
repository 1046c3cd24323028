"""From data to statistics files: what a model sees, and how sure it is of what it says."""
