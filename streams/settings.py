"""Every setting of an installation, typed, once; each is an environment variable `CREDITS_*`.

Read once at the door by `from_environment`, then passed down as a value. Unknown `CREDITS_*`
names are refused: a typo must not silently mean "default".
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta, Struct

from schemas.topics import PARTITIONS, Names

PREFIX: Final = "CREDITS_"
# Points tests, demo, chaos and bench at another cluster; means nothing anywhere else.
IGNORED: Final = frozenset({"CREDITS_TEST_BROKER"})
_LOOPBACK: Final = re.compile(r"(localhost|127\.\d+\.\d+\.\d+|\[::1\]):\d+")


class SettingsError(Exception):
    """A setting is wrong. The text says which, why and what next (exit code 2)."""


class Settings(Struct, frozen=True, kw_only=True):
    """The settings of one installation; field x is the variable CREDITS_X."""

    broker: Annotated[
        str,
        Meta(
            pattern=r"^ *[^\s,]+:[0-9]{1,5}( *, *[^\s,]+:[0-9]{1,5})* *$(?!\n)",
            description="host:port, several by comma",
        ),
    ] = "127.0.0.1:9092"
    broker_security: Annotated[
        str,
        Meta(
            pattern="^(auto|plaintext|tls)$",
            description="auto: plaintext to loopback addresses only, TLS to any other",
        ),
    ] = "auto"
    broker_ca_file: Annotated[
        Path | None, Meta(description="PEM file of the authorities to trust with TLS")
    ] = None
    namespace: Annotated[
        str,
        Meta(
            pattern=r"^([a-z0-9][a-z0-9.-]{0,30}-)?$(?!\n)",
            description="prefix of the app id, groups, transactional ids and topics; ends in -",
        ),
    ] = ""
    partitions: Annotated[
        int, Meta(ge=1, le=1024, description="partitions of every topic; never changes in place")
    ] = PARTITIONS
    replication: Annotated[
        int, Meta(ge=1, le=9, description="replication factor of topics we create")
    ] = 1
    call_usage_topic: Annotated[
        str | None, Meta(description="name of the call usage topic, without namespace")
    ] = None
    conference_usage_topic: Annotated[
        str | None, Meta(description="name of the conference usage topic, without namespace")
    ] = None
    requested_topic: Annotated[
        str | None, Meta(description="name of the recharge request topic, without namespace")
    ] = None
    result_topic: Annotated[
        str | None, Meta(description="name of the recharge result topic, without namespace")
    ] = None
    deck: Annotated[
        Path | None, Meta(description="CSV file of the default rate deck; absent: the packaged one")
    ] = None
    coverage: Annotated[
        Path | None,
        Meta(description="TOML file: who pays for which kind of usage; absent: the packaged one"),
    ] = None
    person_keys_file: Annotated[
        Path | None,
        Meta(
            description="JSON file of tenants and their keys, 64 hexadecimal digits each, under "
            "which entries name users and organizers; absent: they name none"
        ),
    ] = None
    linger_ms: Annotated[
        int,
        Meta(
            ge=0,
            le=5_000,
            description="how far apart a shard's batches begin at least, unless a full batch "
            "waits, for a transaction costs about 2 ms; twice as far after 4 to 63 records",
        ),
    ] = 100
    fetch_bytes: Annotated[
        int, Meta(ge=65_536, le=8 << 20, description="most bytes of one partition in one fetch")
    ] = 1 << 18
    session_timeout_s: Annotated[
        int, Meta(ge=6, le=300, description="a silent worker loses its partitions after this")
    ] = 10
    result_timeout_s: Annotated[
        int, Meta(ge=1, le=86_400, description="a recharge request without answer is overdue")
    ] = 900
    metrics_host: Annotated[
        str, Meta(description="address that metrics and probes listen on; 0.0.0.0 is all")
    ] = "127.0.0.1"
    metrics_port: Annotated[
        int, Meta(ge=0, le=65_535, description="/metrics, /livez, /readyz; 0 picks a free port")
    ] = 8090
    log_level: Annotated[
        str,
        Meta(pattern="^(debug|info|warning|error)$", description="debug, info, warning or error"),
    ] = "info"
    log_format: Annotated[
        str,
        Meta(
            pattern="^(auto|console|json)$",
            description="console or json; auto: console on a terminal, JSON elsewhere",
        ),
    ] = "auto"

    @property
    def app_id(self) -> str:
        """The Faust app id, also the consumer group and the prefix of its changelogs."""
        return f"{self.namespace}credits"

    @property
    def topics(self) -> Names:
        """The names of all topics in this installation."""
        return Names(
            namespace=self.namespace,
            call_usage=self.call_usage_topic,
            conference_usage=self.conference_usage_topic,
            requested=self.requested_topic,
            result=self.result_topic,
        )

    @property
    def plaintext(self) -> bool:
        """Whether the broker is spoken to without TLS."""
        if self.broker_security == "auto":
            return all(_LOOPBACK.fullmatch(host.strip()) for host in self.broker.split(","))
        return self.broker_security == "plaintext"

    def transactional_id(self, partition: int) -> str:
        """One id per source partition: whoever starts a producer with it fences the others."""
        return f"{self.app_id}-{partition}"


def _strict_enough(kind: Any, text: str) -> Any:
    return msgspec.convert(text, kind, strict=False, dec_hook=lambda wanted, value: wanted(value))


def from_environment(environment: Mapping[str, str]) -> Settings:
    """Read the settings; an empty value of an optional setting means absent.

    Raises SettingsError for an unknown or unusable `CREDITS_*` variable.
    """
    fields = {field.name: field for field in msgspec.structs.fields(Settings)}
    values: dict[str, Any] = {}
    for name, text in environment.items():
        if not name.startswith(PREFIX) or name in IGNORED:
            continue
        field = fields.get(name.removeprefix(PREFIX).lower())
        if field is None:
            raise SettingsError(
                f"{name} is no setting of this version. `credits config show` lists them all; "
                "unset it or correct its name."
            )
        if text == "" and field.default is None:
            continue
        try:
            values[field.name] = _strict_enough(field.type, text)
        except (msgspec.ValidationError, ValueError) as error:
            raise SettingsError(
                f"{name} cannot be {text!r}: {error}. See `credits config show`."
            ) from None
    return Settings(**values)
