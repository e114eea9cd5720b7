"""The section of the store that holds buckets and registered clients."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, SecretStr

from api_gateway.settings.secret import Secret, SecretFile
from api_gateway.settings.setting_types import PREFIX, Seconds, Section
from api_gateway.settings.store_url import MEMORY, StoreUrl


def _store_url(url: SecretStr) -> SecretStr:
    if url.get_secret_value() != MEMORY:
        StoreUrl.parse(url.get_secret_value())
    return url


class StoreSection(Section):
    """Where buckets are kept. All but the first and the last speak of shared stores.

    Several workers with `memory://` share an embedded store that the gateway starts for them.
    """

    url: Annotated[Secret, AfterValidator(_store_url)] = SecretStr(MEMORY)
    url_file: SecretFile = None
    on_failure: Literal["local_share", "deny", "allow"] = "local_share"
    decision_timeout: Seconds = Field(default=0.02, description="How long a request waits for the store.")
    timeout: Seconds = Field(default=1, description="For everything else that is asked of the store.")
    min_gateway_processes: int = Field(
        default=1, ge=1, description="How many gateway processes there are at least, on all machines."
    )
    prefix: str = Field(default="gateway", pattern=PREFIX, description="Begins every key.")
    max_buckets: int = Field(default=1_000_000, ge=1)
    clients: Literal["auto", "sqlite", "store"] = Field(
        default="auto",
        description="Where registered clients are kept: a file in state_dir, or the store. auto: in a shared store.",
    )
    max_cached_clients: int = Field(default=100_000, ge=1, description="Registered clients held in memory.")

    @property
    def keeps_clients(self) -> bool:
        """True when registered clients are kept in the store itself, not in a file in `state_dir`."""
        return self.is_shared if self.clients == "auto" else self.clients == "store"

    @property
    def is_shared(self) -> bool:
        """True if buckets are kept elsewhere than in this process."""
        return self.url.get_secret_value() != MEMORY
