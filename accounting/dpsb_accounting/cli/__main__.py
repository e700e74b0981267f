"""`python -m dpsb_accounting.cli`."""

from dpsb_accounting.cli import main

main()
