"""`credits` and `python -m streams`."""

import signal


def main() -> None:
    """The command line."""
    # Ctrl-C while the program is still being loaded ends it without a word.
    told = signal.signal(signal.SIGINT, signal.SIG_DFL)
    from streams.cli import run

    signal.signal(signal.SIGINT, told)
    run()


if __name__ == "__main__":
    main()
