"""Recipe, plan, passes, tiles, files: the only floor that opens the experts' tensors in bulk."""
