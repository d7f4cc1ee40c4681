"""`credits` and `python -m streams`."""

from streams.cli import run


def main() -> None:
    """The command line."""
    run()


if __name__ == "__main__":
    main()
