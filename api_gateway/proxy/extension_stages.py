"""The stages of admission that call hooks of extensions, and the calls on heads of responses.

A gateway without extensions has none of these stages.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from api_gateway.clients.registry import ClientRegistry
from api_gateway.errors import ExtensionFailed, GatewayError
from api_gateway.extensions.fields import FieldChange, FieldsView, changed_lines
from api_gateway.extensions.hooks import Hook, HookCall
from api_gateway.extensions.interface import CheckedResponse, Identity, RequestClient, RequestView, ResponseView
from api_gateway.http1.fast_parser import pairs_of
from api_gateway.models import Client
from api_gateway.proxy.admission import ExtensionCall, RequestPlan, Stage, StageResponse, StageResult, Wait
from api_gateway.proxy.cors import with_cors_fields
from api_gateway.proxy.header_facts import HeaderFacts
from api_gateway.resilience.fair_shares import principal_of
from api_gateway.resilience.priorities import PriorityClasses

NO_RESULT = "no result"
NOT_EVALUATED = "not evaluated: it is called for real requests only"


def request_view(plan: RequestPlan, *, is_explained: bool = False) -> RequestView:
    """Return the view that hooks get of a request at this moment."""
    exchange, client = plan.exchange, plan.exchange.client
    return RequestView(
        id=exchange.id,
        method=exchange.method,
        path=exchange.path,
        query=plan.raw_target.partition(b"?")[2].decode("latin-1"),
        headers=FieldsView(pairs_of(plan.headers.received)),
        host=plan.facts.host,
        client_address=exchange.client_address,
        client=None if client is None else RequestClient(client.id, client.quota.name),
        route=exchange.route,
        cost=exchange.cost,
        is_explained=is_explained,
    )


class _Step(NamedTuple):
    """A hook that is called: the request that it sees, its place among the hooks, and where its result is noted."""

    view: RequestView
    number: int
    calls: list[ExtensionCall] | None  # None: the request is a real one


class HookStage:
    """Calls hooks in their order, and waits for those that are coroutines. Subclasses know what results mean."""

    def __init__(self, hooks: Sequence[Hook]) -> None:
        self._hooks = tuple(hooks)

    def decide(self, plan: RequestPlan) -> StageResult:
        """Call the hooks."""
        return self._go_on(plan, _Step(request_view(plan), 0, None))

    def inspect(self, plan: RequestPlan) -> StageResult:
        """Call the hooks with a view that says so; they change nothing then."""
        calls = plan.extension_calls
        return self._go_on(plan, _Step(request_view(plan, is_explained=True), 0, calls))

    def concerns(self, _facts: HeaderFacts) -> bool:
        """See `Stage`."""
        return True

    def _arguments(self, plan: RequestPlan, view: RequestView) -> tuple[object, ...]:  # noqa: ARG002 - of subclasses
        return (view,)

    def _take(self, plan: RequestPlan, step: _Step, found: Any) -> "StageResult | _Step":
        """Use a result that is not None: end the stage by returning its result, or return the next step."""
        raise NotImplementedError

    def _end(self, plan: RequestPlan, step: _Step) -> StageResult:  # noqa: ARG002 - of subclasses
        """Return the result of the stage after the last hook."""
        return None

    def _go_on(self, plan: RequestPlan, step: _Step) -> StageResult:
        while step.number < len(self._hooks):
            hook = self._hooks[step.number]
            try:
                found = hook.begin(*self._arguments(plan, step.view))
            except ExtensionFailed as error:
                return error.with_traceback(None)
            if isinstance(found, HookCall):
                return Wait(found.ask, partial(self._resume, step=step))
            outcome = self._took(plan, step, found)
            if not isinstance(outcome, _Step):
                return outcome
            step = outcome
        return self._end(plan, step)

    def _resume(self, plan: RequestPlan, reply: "tuple[Any]", *, step: _Step) -> StageResult:
        if isinstance(reply[0], ExtensionFailed):
            return reply[0]
        outcome = self._took(plan, step, reply[0])
        return self._go_on(plan, outcome) if isinstance(outcome, _Step) else outcome

    def _took(self, plan: RequestPlan, step: _Step, found: Any) -> "StageResult | _Step":
        if step.calls is not None:
            hook = self._hooks[step.number]
            step.calls.append(ExtensionCall(hook.extension, hook.name, NO_RESULT if found is None else str(found)))
        following = step._replace(number=step.number + 1)
        return following if found is None else self._take(plan, following, found)


class ExtensionIdentityStage(HookStage):
    """Asks extensions who the client is, unless a credential of the gateway has proved it.

    The result is that of one request, and not remembered with its header set. Without one, `fallback` decides.
    """

    def __init__(
        self, hooks: Sequence[Hook], fallback: Stage, clients: ClientRegistry, priorities: PriorityClasses
    ) -> None:
        super().__init__(hooks)
        self._fallback = fallback
        self._clients = clients
        self._priorities = priorities

    def decide(self, plan: RequestPlan) -> StageResult:
        """Set client, priority and principal."""
        return None if plan.exchange.credential is not None else super().decide(plan)

    def inspect(self, plan: RequestPlan) -> StageResult:
        """See `HookStage`. A refused credential has left its request to the client's address."""
        return super().inspect(plan) if plan.exchange.client is None else None

    def concerns(self, facts: HeaderFacts) -> bool:
        """See `Stage`."""
        return self._fallback.concerns(facts)

    def _take(self, plan: RequestPlan, step: _Step, found: Identity) -> StageResult | _Step:  # noqa: ARG002 - the first one decides
        client = self._clients.try_get(found.id)
        if client is None:
            return Wait.on(partial(self._clients.look_up, found.id), partial(self._set, tier=found.tier))
        return self._set(plan, client, tier=found.tier)

    def _end(self, plan: RequestPlan, step: _Step) -> StageResult:
        return self._fallback.decide(plan) if step.calls is None else self._fallback.inspect(plan)

    def _set(self, plan: RequestPlan, client: Client, *, tier: str | None) -> StageResult:
        client = self._clients.proved(client, None if tier is None else tier.upper())
        plan.exchange.client = client
        plan.principal = principal_of(client, plan.facts.client_address)
        plan.priority = self._priorities.of(client.quota.name)
        return None


class ExtensionCostStage(HookStage):
    """Asks extensions what a request costs; each sees the cost that the one before has set."""

    def inspect(self, plan: RequestPlan) -> StageResult:
        """See `HookStage`; a request without a route has no cost."""
        return None if plan.route is None else super().inspect(plan)

    def _arguments(self, plan: RequestPlan, view: RequestView) -> tuple[object, ...]:
        return (view, plan.exchange.route)

    def _take(self, plan: RequestPlan, step: _Step, found: Any) -> StageResult | _Step:
        plan.exchange.cost = float(found)
        return step._replace(view=replace(step.view, cost=plan.exchange.cost))


class ExtensionRequestStage(HookStage):
    """Lets extensions change the header fields of an admitted request for the upstream, or respond to it."""

    def inspect(self, plan: RequestPlan) -> StageResult:
        """See `Stage`; nothing is called, because the hooks may have effects."""
        calls = [ExtensionCall(hook.extension, hook.name, NOT_EVALUATED) for hook in self._hooks]
        plan.extension_calls.extend(calls)
        return None

    def _take(self, plan: RequestPlan, step: _Step, found: CheckedResponse | list[FieldChange]) -> StageResult | _Step:
        if isinstance(found, CheckedResponse):
            return StageResponse(found.status, with_cors_fields(plan.exchange.cors, found.fields), found.content)
        plan.headers = plan.headers._replace(sent=changed_lines(plan.headers.sent, found))
        return step._replace(view=replace(step.view, headers=step.view.headers.changed(found)))


class ResponseHooks:
    """The hooks on heads of responses, the last extension first."""

    def __init__(self, hooks: Sequence[Hook]) -> None:
        self._hooks = tuple(reversed(hooks))

    def __repr__(self) -> str:
        return f"<ResponseHooks {self._hooks}>"

    @property
    def calls(self) -> list[ExtensionCall]:
        """The calls that are shown for a described request, which has no response."""
        return [ExtensionCall(hook.extension, hook.name, NOT_EVALUATED) for hook in self._hooks]

    def begin(
        self,
        plan: RequestPlan,
        response: ResponseView,
        on_end: Callable[[list[FieldChange] | GatewayError], None],
    ) -> bool:
        """Call the hooks, and `on_end` once with the changes or an error. Returns False if that happens later."""
        return self._go_on(request_view(plan), response, [], 0, on_end)

    def _go_on(
        self,
        request: RequestView,
        response: ResponseView,
        changes: list[FieldChange],
        index: int,
        on_end: Callable[[list[FieldChange] | GatewayError], None],
    ) -> bool:
        while index < len(self._hooks):
            try:
                found = self._hooks[index].begin(request, response)
            except ExtensionFailed as error:
                on_end(error.with_traceback(None))
                return True
            if isinstance(found, HookCall):
                found.ask(partial(self._on_reply, request, response, changes, index, on_end))
                return False
            response, changes = _with(response, changes, found)
            index += 1
        on_end(changes)
        return True

    def _on_reply(
        self,
        request: RequestView,
        response: ResponseView,
        changes: list[FieldChange],
        index: int,
        on_end: Callable[[list[FieldChange] | GatewayError], None],
        reply: Any,
    ) -> None:
        if isinstance(reply[0], ExtensionFailed):
            on_end(reply[0])
            return
        response, changes = _with(response, changes, reply[0])
        self._go_on(request, response, changes, index + 1, on_end)


def _with(
    response: ResponseView, changes: list[FieldChange], found: list[FieldChange] | None
) -> tuple[ResponseView, list[FieldChange]]:
    """Return a response and all changes with those of one more hook."""
    if not found:
        return response, changes
    names = {name.lower() for name, _ in found}
    kept = [change for change in changes if change[0].lower() not in names]
    return replace(response, headers=response.headers.changed(found)), kept + found
