"""Where the coverage table comes from: `CREDITS_COVERAGE`, or the one in the package."""

from importlib.resources import files
from pathlib import Path

from streams.billing.coverage_table import Coverage, CoverageError, parse_coverage


def coverage_bytes(path: Path | None) -> bytes:
    """The table's bytes; those of the packaged one when no path is given. Raises OSError."""
    if path is None:
        return files("streams").joinpath("default_coverage.toml").read_bytes()
    return path.read_bytes()


def load_coverage(path: Path | None) -> Coverage:
    """The coverage table. Raises CoverageError."""
    try:
        text = coverage_bytes(path).decode("utf-8-sig")
    except OSError as error:
        raise CoverageError([f"{path} cannot be read: {error.strerror}"]) from None
    except UnicodeDecodeError as error:
        raise CoverageError([f"the file is no UTF-8 text (byte {error.start})"]) from None
    return parse_coverage(text)
