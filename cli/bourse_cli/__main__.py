"""`python -m bourse_cli` is `bourse`."""

from bourse_cli.root import main

main()
