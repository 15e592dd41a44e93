"""`python -m pagelab` is `pagelab`."""

from pagelab.cli import main

if __name__ == "__main__":
    main()
