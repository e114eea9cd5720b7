"""Admission: the decisions on a request before it is forwarded, in one place and one order.

The order is a tuple of stages. A stage completes the plan of the request, refuses it, or waits for the reply to a
question. `decide` charges the request, for the server's own protocol and for ASGI alike; `inspect` changes nothing and
explains what `decide` would do.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

from api_gateway.errors import GatewayError
from api_gateway.limits.concurrency import SlotUse
from api_gateway.models import NANOSECONDS, Decision, Exchange, HeaderList
from api_gateway.proxy.deadline import Deadline
from api_gateway.proxy.header_facts import HeaderFacts, RewrittenHeaders
from api_gateway.proxy.request_id import new_request_id
from api_gateway.proxy.route_table import Route

OnReply = Callable[[Any], None]


class ExtensionCall(NamedTuple):
    """The call of a hook of an extension for a described request, and its result in words."""

    extension: str
    hook: str
    result: str


class RequestPlan:
    """The decisions about a request: its exchange with client, cost, charges and decision; route and deadline.

    `raw_target` is the request target as received, `target` that for the upstream. `now_ns` (of the monotonic clock)
    is the time of the last step: the arrival of the request or of a reply. `inspected` are the decisions of the
    buckets, each alone, `slot_uses` the slots of concurrency limits, `extension_calls` what extensions have said, and
    `direct` the response in place of an upstream's; only `Admission.inspect` sets them. `headers` are the header lines
    as received and as sent upstream.
    """

    __slots__ = (
        "deadline",
        "direct",
        "exchange",
        "extension_calls",
        "facts",
        "headers",
        "inspected",
        "now_ns",
        "principal",
        "priority",
        "raw_target",
        "route",
        "slot_uses",
        "target",
    )

    target: bytes
    route: Route | None  # None only if an inspected request has none
    principal: str | None  # for circuit breakers and fair shares
    priority: int
    inspected: Sequence[Decision]
    slot_uses: Sequence[SlotUse]
    extension_calls: list[ExtensionCall]
    direct: "StageResponse | None"
    headers: RewrittenHeaders

    def __init__(self, exchange: Exchange, facts: HeaderFacts, raw_target: bytes, now_ns: int) -> None:
        self.exchange = exchange
        self.facts = facts
        self.raw_target = raw_target
        self.now_ns = now_ns
        self.deadline: Deadline | None = None

    def __repr__(self) -> str:
        return f"<RequestPlan of {self.exchange.method} {self.exchange.path}>"

    @property
    def ruling_routes(self) -> tuple[Route, ...]:
        """The routes whose rules of access apply: that of the request, and those of other readings of its path."""
        return () if self.route is None else (self.route, *self.route.others)


class StageResponse:
    """A response of a stage that is not a refusal.

    `headers` have the length of a body, and come before those of all.
    """

    __slots__ = ("body", "headers", "status")

    def __init__(self, status: int, headers: HeaderList, body: bytes = b"") -> None:
        self.status = status
        self.headers = headers
        self.body = body

    def __repr__(self) -> str:
        return f"<StageResponse {self.status}>"


class Wait:
    """A question whose reply a stage needs: `ask` calls back once with the reply, and `resume` continues the stage."""

    __slots__ = ("ask", "rest", "resume")

    def __init__(self, ask: Callable[[OnReply], None], resume: Callable[[RequestPlan, Any], "StageResult"]) -> None:
        self.ask = ask
        self.resume = resume
        self.rest: tuple[Decide, ...] = ()  # the stages that follow, set by `Admission`

    @classmethod
    def on(
        cls,
        question: Callable[[], Awaitable[Any]],
        resume: Callable[[RequestPlan, Any], "StageResult"],
    ) -> "Wait":
        """Return a wait for the result of a coroutine; if it fails, the reply is the exception."""
        return cls(partial(_ask_in_task, question), resume)

    async def reply(self) -> Any:
        """Ask, and return the reply. Cancelling this does not cancel the question."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.ask(partial(_resolve, future))
        return await future


StageResult = GatewayError | StageResponse | Wait | None
Decide = Callable[[RequestPlan], StageResult]


class Stage(Protocol):
    """One decision. Both methods return the error that refuses the request, a response, a wait, or None to go on."""

    def decide(self, plan: RequestPlan) -> StageResult:
        """Decide, and charge what the decision costs."""
        ...

    def inspect(self, plan: RequestPlan) -> StageResult:
        """Find out what `decide` would return, without a change. Earlier stages may have refused the request."""
        ...

    def concerns(self, facts: HeaderFacts) -> bool:
        """Return False if `decide` never has an effect on a request with these header fields."""
        ...


class Admission:
    """The stages under one configuration. A request is admitted, also after a wait, by those with which it began.

    Of header fields that are used again, it remembers which stages they concern.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = tuple(stages)
        self._decide = tuple([stage.decide for stage in stages])
        self._inspect = tuple([stage.inspect for stage in stages])
        self._selections: dict[tuple[Decide, ...], tuple[Decide, ...]] = {}  # so that equal ones are one object

    def __repr__(self) -> str:
        return f"<Admission {' '.join(type(stage).__name__ for stage in self.stages)}>"

    @staticmethod
    def plan(facts: HeaderFacts, method: str, path: str, raw_target: bytes, now_ns: int) -> RequestPlan:
        """Return the plan of a request that has just arrived, with its exchange; `path` is percent-decoded."""
        exchange = Exchange(
            facts.request_id or new_request_id(), method, path, facts.client_address, now_ns / NANOSECONDS
        )
        return RequestPlan(exchange, facts, raw_target, now_ns)

    def decide(self, plan: RequestPlan) -> StageResult:
        """Decide on a request: None if it is admitted. The reply to a `Wait` goes to `resume`."""
        facts = plan.facts
        stages: tuple[Decide, ...]
        if facts.admission is not self:
            facts.admission, facts.stages = self, None
            stages = self._decide
        elif facts.stages is None:
            stages = facts.stages = self._select(facts)
        else:
            stages = facts.stages
        for decide in stages:
            outcome = decide(plan)
            if outcome is not None:
                return _with_rest(outcome, stages, decide) if isinstance(outcome, Wait) else outcome
        return None

    def _select(self, facts: HeaderFacts) -> "tuple[Decide, ...]":
        """Return the decisions that the header fields concern."""
        chosen = tuple(
            [decide for stage, decide in zip(self.stages, self._decide, strict=True) if stage.concerns(facts)]
        )
        return self._selections.setdefault(chosen, chosen)

    @staticmethod
    def resume(plan: RequestPlan, wait: Wait, reply: Any, now_ns: int) -> StageResult:
        """Continue after the reply to a question. Raises the reply if it is an exception."""
        if isinstance(reply, Exception):
            raise reply
        plan.now_ns = now_ns
        outcome = wait.resume(plan, reply)
        if isinstance(outcome, Wait):
            outcome.rest = wait.rest
            return outcome
        return _run(wait.rest, plan) if outcome is None else outcome

    async def inspect(self, plan: RequestPlan) -> GatewayError | None:
        """Return the error with which `decide` would refuse the request.

        All stages are inspected, also after a refusal, so that the plan has all figures. `plan.direct` is the response
        that `decide` would return, whatever later stages say.
        """
        plan.route, plan.principal, plan.priority, plan.inspected = None, None, 0, ()
        plan.slot_uses, plan.extension_calls, plan.direct = (), [], None
        first: GatewayError | None = None
        for inspect in self._inspect:
            outcome = inspect(plan)
            while isinstance(outcome, Wait):
                reply = await outcome.reply()
                if isinstance(reply, Exception):
                    raise reply
                outcome = outcome.resume(plan, reply)
            if isinstance(outcome, GatewayError):
                first = first or outcome
            elif isinstance(outcome, StageResponse) and first is None and plan.direct is None:
                plan.direct = outcome
        return first


def _run(stages: tuple[Decide, ...], plan: RequestPlan) -> StageResult:
    for decide in stages:
        outcome = decide(plan)
        if outcome is not None:
            return _with_rest(outcome, stages, decide) if isinstance(outcome, Wait) else outcome
    return None


def _with_rest(wait: Wait, stages: tuple[Decide, ...], decide: Decide) -> Wait:
    """Return the wait of a stage with the stages that follow."""
    wait.rest = stages[stages.index(decide) + 1 :]
    return wait


def _resolve(future: asyncio.Future[Any], reply: Any) -> None:
    if not future.done():  # done if the request was cancelled meanwhile
        future.set_result(reply)


def _ask_in_task(question: Callable[[], Awaitable[Any]], on_reply: OnReply) -> None:
    task = asyncio.ensure_future(question())
    _ASKING.add(task)  # the event loop holds tasks by weak references only
    task.add_done_callback(_ASKING.discard)
    task.add_done_callback(partial(_pass_on, on_reply))


def _pass_on(on_reply: OnReply, task: asyncio.Future[Any]) -> None:
    if not task.cancelled():  # at the end of the event loop
        on_reply(task.exception() or task.result())


_ASKING: set[asyncio.Future[Any]] = set()
