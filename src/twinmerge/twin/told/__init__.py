"""What a twin says of itself, and who is told of its mixtures."""
