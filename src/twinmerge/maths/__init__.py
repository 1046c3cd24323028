"""Pure numerics on tensors: low rank, selection, exact sums, keyed random numbers, assignment."""
