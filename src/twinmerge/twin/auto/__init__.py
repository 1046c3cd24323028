"""Twins as transformers opens them by its auto classes and pipelines."""
