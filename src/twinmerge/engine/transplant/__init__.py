"""A model with the vocabulary of another tokenizer: rows that both have, and new ones out of those."""
