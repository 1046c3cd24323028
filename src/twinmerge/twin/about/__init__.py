"""What a twin folder says of itself: its config.json and its card."""
