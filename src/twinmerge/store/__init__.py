"""Bytes: where models lie, how their tensors are read, and how an output appears whole or not at all."""
