"""`python -m dpsb.cli`."""

from dpsb.cli import main

main()
