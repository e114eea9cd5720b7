"""Header lines with what a credential states about the client, for upstreams: the claims of a token as header fields.

Used only if the configuration names such header fields. Those of a request itself are removed.
"""

from api_gateway.proxy.header_facts import RewrittenHeaders


class IdentifiedHeaders(RewrittenHeaders):
    """Rewritten headers whose lines for the upstream depend on the credential, which is verified later."""

    __slots__ = ()

    @property
    def sent(self) -> bytes:
        """The header lines for the upstream."""
        proof = self.facts.proof
        rewritten = self[2]
        return rewritten if proof is None else rewritten + proof.lines
