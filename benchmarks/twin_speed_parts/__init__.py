"""The parts of twin_speed.py."""
