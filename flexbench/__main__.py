"""`python -m flexbench`."""

from flexbench.cli import main

if __name__ == "__main__":
    main()
