"""`python -m bourse_schemas` is `bourse`."""

from bourse_schemas.cli import main

main()
