"""The command line, one verb a file. Knows everything below it; nothing below knows it."""

from kvthrift.cli.app import app


def main() -> None:
    """Entry point of the ``kvthrift`` command."""
    app()


__all__ = ["app", "main"]
