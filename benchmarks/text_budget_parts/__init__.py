"""The parts of text_budget.py."""
