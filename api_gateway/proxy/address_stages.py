"""The stages of address rules, for all routes and by route: see `proxy.address_rules`."""

from api_gateway.errors import AddressDenied
from api_gateway.proxy.address_rules import AddressRules
from api_gateway.proxy.admission import RequestPlan, StageResult
from api_gateway.proxy.header_facts import HeaderFacts
from api_gateway.proxy.stages import ReadOnlyStage


class AddressStage(ReadOnlyStage):
    """Refuses addresses by the rules for all routes. It concerns no request of an address that they accept."""

    def __init__(self, rules: AddressRules) -> None:
        self._rules = rules

    def decide(self, plan: RequestPlan) -> StageResult:
        """Refuse a request whose address is denied or not allowed."""
        address = plan.facts.client_address
        cause = self._rules.cause(address)
        return None if cause is None else AddressDenied(f"The address {address} {cause}.")

    def concerns(self, facts: HeaderFacts) -> bool:
        """See `Stage`."""
        return self._rules.cause(facts.client_address) is not None


class RouteAddressStage(ReadOnlyStage):
    """Refuses addresses by the rules of the route."""

    def decide(self, plan: RequestPlan) -> StageResult:
        """Refuse a request whose address is denied or not allowed."""
        address = plan.facts.client_address
        for route in plan.ruling_routes:
            cause = None if route.addresses is None else route.addresses.cause(address)
            if cause is not None:
                return AddressDenied(f"The address {address} {cause} on the route {route.name!r}.")
        return None
