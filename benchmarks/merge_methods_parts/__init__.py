"""The parts of merge_methods.py."""
