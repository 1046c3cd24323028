"""`python -m twinmerge`: the command."""

from twinmerge.cli import main

main()
