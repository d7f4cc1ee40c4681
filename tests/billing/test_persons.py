"""Persons in entries: pseudonyms for tenants that have a key, nothing for others."""

import hmac
import json
from pathlib import Path

import pytest

from schemas.ledger import LedgerEntry
from streams.billing.persons import PersonKeys, PersonKeysError, parse_person_keys
from streams.persons import load_person_keys
from tests.billing.builders import Book, a_call, an_account, decoded

KEY = bytes(range(32))
USER, ORGANIZER = "someone@contoso.example", "8a1f"


def entry_of(persons: PersonKeys | None, **call: str) -> dict[str, object]:
    (entry,) = Book(an_account("10")).feed(a_call(**call), persons=persons).entries
    return decoded(entry)


def pseudonym(person: str) -> str:
    return hmac.new(KEY, person.encode(), "sha256").hexdigest()[:32]


def test_an_entry_names_persons_under_its_tenants_key_and_never_themselves() -> None:
    keys = parse_person_keys(json.dumps({"t-1": KEY.hex()}).encode())
    entry = entry_of(keys, user_id=USER, organizer_id=ORGANIZER)
    assert (entry["user"], entry["organizer"]) == (pseudonym(USER), pseudonym(ORGANIZER))
    assert USER not in json.dumps(entry)
    assert list(entry)[-1] == "hash"
    assert "organizer" not in entry_of(keys, user_id=USER)


@pytest.mark.parametrize("keys", [None, PersonKeys({}), PersonKeys({"t-2": KEY})])
def test_without_a_key_an_entry_names_nobody(keys: PersonKeys | None) -> None:
    entry = entry_of(keys, user_id=USER, organizer_id=ORGANIZER)
    assert not {"user", "organizer"} & entry.keys()
    assert {"user", "organizer"} <= set(LedgerEntry.__struct_fields__)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"t-1": 5}', b"\xff", b'{"t-1": "00"}'])
def test_a_file_that_is_none_of_keys_is_refused_and_not_shown(
    content: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "keys.json"
    path.write_bytes(content)
    with pytest.raises(PersonKeysError) as caught:
        load_person_keys(path)
    assert "00" not in str(caught.value)
    with pytest.raises(PersonKeysError, match="cannot be read"):
        load_person_keys(tmp_path / "none")
    assert load_person_keys(None) is None
