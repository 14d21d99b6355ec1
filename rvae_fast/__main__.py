"""``python -m rvae_fast``: the command line, where its script is not on the path."""

from rvae_fast.cli import main

if __name__ == "__main__":
    main()
