"""The parts of generative_suite.py."""
