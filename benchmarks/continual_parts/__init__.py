"""The parts of continual.py."""
