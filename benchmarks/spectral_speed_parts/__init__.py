"""The parts of spectral_speed.py."""
