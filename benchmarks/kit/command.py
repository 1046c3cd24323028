"""The command line of a benchmark."""

from __future__ import annotations

import argparse


def command_line(about: str | None) -> argparse.ArgumentParser:
    """Its help begins with what the file says of itself."""
    return argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
