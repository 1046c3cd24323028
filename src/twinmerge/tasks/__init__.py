"""Suites of tasks with data, encoding of their rows, metrics."""
