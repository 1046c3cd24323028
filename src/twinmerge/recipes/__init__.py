"""What is to be merged, as data: recipes of our own and of mergekit, and how depth scales them."""
