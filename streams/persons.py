"""Where the keys of persons come from: `CREDITS_PERSON_KEYS_FILE`."""

from pathlib import Path

from streams.billing.persons import PersonKeys, PersonKeysError, parse_person_keys


def load_person_keys(path: Path | None) -> PersonKeys | None:
    """The keys by tenant; None when no file is given. Raises PersonKeysError."""
    if path is None:
        return None
    try:
        return parse_person_keys(path.read_bytes())
    except OSError as error:
        raise PersonKeysError(f"{path} cannot be read: {error.strerror}") from None
