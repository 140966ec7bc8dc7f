"""``python -m kvthrift``: the command line."""

from kvthrift.cli import main

if __name__ == "__main__":
    main()
