"""What the twin of a language model writes."""
