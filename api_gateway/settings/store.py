"""Section of the store of buckets and registered clients."""

from typing import Annotated, Literal

from pydantic import Field, SecretStr

from api_gateway.settings.secret import Secret, SecretFile
from api_gateway.settings.setting_types import PREFIX, Seconds, Section
from api_gateway.settings.store_url import MEMORY, StoreUrl
from api_gateway.settings.value_checks import ValueCheck


def _store_url(url: SecretStr) -> SecretStr:
    if url.get_secret_value() != MEMORY:
        StoreUrl.parse(url.get_secret_value())
    return url


class StoreSection(Section):
    """Where buckets and registered clients are kept. `on_failure`, `timeout` and `prefix` are for shared stores only.

    Several workers with `memory://` share an embedded store that the supervisor starts.
    """

    url: Annotated[Secret, ValueCheck(_store_url)] = Field(
        default=SecretStr(MEMORY),
        description="memory://, redis://, rediss:// (TLS), unix:///path, redis+sentinel:// or redis+cluster://.",
    )
    url_file: SecretFile = None
    on_failure: Literal["local_share", "deny", "allow"] = Field(
        default="local_share",
        description="While a shared store is unavailable: each process applies its share, refuses, or admits.",
    )
    decision_timeout: Seconds = Field(default=0.02, description="The longest time that a request waits for the store.")
    timeout: Seconds = Field(default=1, description="For all other operations of the store.")
    min_gateway_processes: int = Field(
        default=1,
        ge=1,
        description="The minimum number of gateway processes on all machines; sets each one's local share.",
    )
    prefix: str = Field(default="gateway", pattern=PREFIX, description="The beginning of every key.")
    max_buckets: int = Field(default=1_000_000, ge=1, description="Buckets that are kept in memory.")
    clients: Literal["auto", "sqlite", "store"] = Field(
        default="auto",
        description="Where registered clients are kept: in state_dir, or in the store. auto: in a shared store.",
    )
    max_cached_clients: int = Field(
        default=100_000, ge=1, description="Registered clients kept in memory; others are looked up."
    )

    @property
    def keeps_clients(self) -> bool:
        """True if registered clients are kept in the store, false if in a file in `state_dir`."""
        return self.is_shared if self.clients == "auto" else self.clients == "store"

    @property
    def is_shared(self) -> bool:
        """True if buckets are kept outside this process."""
        return self.url.get_secret_value() != MEMORY
