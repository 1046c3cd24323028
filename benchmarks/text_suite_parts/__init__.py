"""The parts of text_suite.py."""
