"""`python -m flexbench`."""

from flexbench.cli import main

main()
