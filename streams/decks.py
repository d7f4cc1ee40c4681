"""Where the default rate deck comes from: `CREDITS_DECK`, or the one in the package."""

from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Final

from streams.billing.rates import Tariff
from streams.billing.tariff import DeckError, parse_deck

DEFAULT_DECK: Final = "default"


def deck_bytes(path: Path | None) -> bytes:
    """The deck file's bytes; the packaged deck when no path is given. Raises OSError."""
    if path is None:
        return files("streams").joinpath("default_deck.csv").read_bytes()
    return path.read_bytes()


def load_deck(path: Path | None) -> Tariff:
    """The default deck; its version is derived from its bytes. Raises DeckError, OSError."""
    content = deck_bytes(path)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DeckError([f"the file is no UTF-8 text (byte {error.start})"]) from None
    version = f"file-{sha256(content).hexdigest()[:12]}"
    return parse_deck(text, deck=DEFAULT_DECK, version=version)
