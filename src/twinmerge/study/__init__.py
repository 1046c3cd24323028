"""Evaluation, reports and the demo."""
