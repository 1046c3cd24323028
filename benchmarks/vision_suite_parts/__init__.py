"""The parts of vision_suite.py."""
