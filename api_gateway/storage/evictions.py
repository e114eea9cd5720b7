"""The keys that a store has evicted for lack of memory, and its policy."""

from typing import NamedTuple


class Evictions(NamedTuple):
    """Number of keys that a store has evicted for lack of memory, and its eviction policy; None if it evicts nothing.

    On a cluster the sum over all nodes, and the policy of any node that evicts.
    """

    keys: int
    policy: str | None

    @property
    def warning(self) -> str | None:
        """The text of a warning if the store may evict buckets; None if it does not, or with the least effect."""
        if self.policy is None or self.policy == "volatile-ttl":  # evicts the fullest buckets first
            return None
        return f"the store has maxmemory-policy {self.policy}: evicted buckets are full again; it should be noeviction"
