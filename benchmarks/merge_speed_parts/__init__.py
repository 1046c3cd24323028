"""The parts of merge_speed.py."""
