"""However a hook ends, its request gets one reply, and nothing of the call stays behind."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from api_gateway.assembly.extensions import LoadedExtension, hooks_by_name
from api_gateway.errors import ExtensionFailed
from api_gateway.extensions.hooks import Hook, HookCall
from api_gateway.extensions.interface import Identity, Respond
from api_gateway.settings.extensions import ExtensionSection, HookName
from tests.cases import each

HOOKS: tuple[HookName, ...] = ("identify", "cost", "on_request", "on_response")
ARGUMENTS: Mapping[HookName, int] = {"identify": 1, "cost": 2, "on_request": 1, "on_response": 2}


class Raising(BaseException):
    """Neither an Exception nor one that asyncio knows."""


def _raise(*_: Any) -> Any:
    raise Raising


class RaisingMapping(dict[str, str]):
    items = keys = values = __iter__ = __getitem__ = _raise


class RaisingText(str):
    __slots__ = ()
    encode = lower = upper = isascii = isprintable = _raise  # type: ignore[assignment]  # that is the point


class WrongText(str):
    """Text whose methods return something else: it would fail where the result is used, after its check."""

    __slots__ = ()

    def encode(self, *_: Any) -> Any:
        return None

    upper = lower = isascii = encode


class RaisingNumber(float):
    __float__ = __le__ = __ge__ = __lt__ = __gt__ = _raise


class RaisingBytes(bytes):
    __bytes__ = _raise


class RaisingResponse(Respond):
    @property
    def content(self) -> bytes:
        raise Raising

    def fields(self) -> Any:
        raise Raising


async def cancels_itself() -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()


async def cancels_itself_and_waits() -> None:
    await cancels_itself()
    await asyncio.sleep(0)


async def waits_for_a_cancelled_future() -> None:
    future = asyncio.get_running_loop().create_future()
    future.cancel()
    await future


def raises(error: type[BaseException]) -> Callable[[], Any]:
    def at_once() -> Any:
        raise error

    return at_once


RAISED = (Exception, SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError, StopIteration, Raising)
# Results that are invalid for each hook.
WRONG: dict[str, Any] = {
    "object": object(),
    "text": RaisingText("a"),
    "mapping": RaisingMapping(a="b"),
    "boolean": True,
    "endless number": float("inf"),
    "identity of another type": Identity("a", 5),  # type: ignore[arg-type]  # that is the point
}
# Results of a valid type with methods of their own, and the hook that may return them.
OWN_METHODS: dict[str, tuple[HookName, Any, Any]] = {
    "number": ("cost", RaisingNumber(1), None),
    "huge number": ("cost", 10**400, None),
    "identity": ("identify", Identity(RaisingText("a"), WrongText("free")), Identity("a", "free")),
    "field": ("on_response", {WrongText("X-A"): RaisingText("b")}, [(b"X-A", b"b")]),
    "body of bytes": ("on_request", Respond(200, RaisingBytes(b"x")), None),
    "body of text": ("on_request", Respond(200, WrongText("x")), b"x"),
    "response": ("on_request", RaisingResponse(200, "x"), b"x"),
}


def hook_of(name: HookName, result: Callable[[], Any], results: list[str], *, policy: str = "refuse") -> Hook:
    """Return a hook with the check of a gateway, whose results are counted in `results`."""
    arguments = ", ".join("ab"[: ARGUMENTS[name]])
    call = eval(f"lambda self, {arguments}: result()", {"result": result})  # noqa: S307 - our own text
    extension = type("Extension", (), {name: call})()
    section = ExtensionSection(name="x", use="a:b", on_error=policy, on_timeout=policy, budget=60)
    hooks = hooks_by_name([LoadedExtension(section, extension)], ["FREE"], lambda *call: results.append(call[2]))
    (hook,) = hooks[name]
    return hook


async def reply_of(hook: Hook, name: HookName) -> Any:
    """Return the result or the error of a call; fail if there is no reply, or more than one."""
    try:
        found = hook.begin(*[None] * ARGUMENTS[name])
    except ExtensionFailed as error:
        return error
    if not isinstance(found, HookCall):
        return found
    replies: list[Any] = []
    found.ask(replies.append)
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    await asyncio.wait(tasks, timeout=5)
    await asyncio.sleep(0)
    assert len(replies) == 1, "the request gets one reply"
    assert found._timer is not None
    assert found._timer.cancelled()
    return replies[0][0]


def later(result: Callable[[], Any]) -> Callable[[], Any]:
    """Return a coroutine function that ends as a function does."""

    async def hook() -> Any:
        return result()

    return hook


async def _check(name: HookName, result: Callable[[], Any]) -> None:
    """Both policies: one reply, the failure is counted, and no task is left."""
    results: list[str] = []
    hook = hook_of(name, result, results)
    found = await reply_of(hook, name)
    assert isinstance(found, ExtensionFailed)
    assert f"failed in {name}" in str(found)
    assert await reply_of(hook_of(name, result, results, policy="ignore"), name) is None
    assert results == ["error", "error"]
    assert not hook._left
    assert asyncio.all_tasks() == {asyncio.current_task()}


def check(name: HookName, result: Callable[[], Any]) -> None:
    asyncio.run(_check(name, result))


@each("name", HOOKS)
@each("error", RAISED)
def test_whatever_a_hook_raises_is_its_failure(name: HookName, error: type[BaseException]) -> None:
    check(name, raises(error))
    check(name, later(raises(error)))


@each("name", HOOKS)
@each("end", [cancels_itself, cancels_itself_and_waits, waits_for_a_cancelled_future])
def test_a_coroutine_that_is_cancelled_from_within_has_failed(name: HookName, end: Callable[[], Any]) -> None:
    check(name, end)


@each("name", HOOKS)
@each("case", WRONG)
def test_an_invalid_result_is_a_failure_whatever_its_methods_do(name: HookName, case: str) -> None:
    check(name, lambda: WRONG[case])
    check(name, later(lambda: WRONG[case]))


@each("case", OWN_METHODS)
@each("wrap", [lambda result: result, later])
def test_methods_of_a_result_are_called_by_its_check_alone(case: str, wrap: Callable[[Any], Any]) -> None:
    """A result passes its check as values of the exact types, or is a failure."""
    name, result, expected = OWN_METHODS[case]
    if expected is None:
        check(name, wrap(lambda: result))
        return
    results: list[str] = []
    found = asyncio.run(reply_of(hook_of(name, wrap(lambda: result), results), name))
    assert results == ["ok"]
    assert getattr(found, "content", found) == expected
    if isinstance(found, Identity):
        assert type(found.id) is type(found.tier) is str


@each("name", HOOKS)
def test_a_call_at_the_end_of_the_event_loop_is_replied_to(name: HookName) -> None:
    """`asyncio.run` cancels all tasks at its end."""
    results: list[str] = []
    replies: list[Any] = []

    async def main() -> None:
        found = hook_of(name, lambda: asyncio.sleep(60), results).begin(*[None] * ARGUMENTS[name])
        found.ask(replies.append)
        await asyncio.sleep(0)

    asyncio.run(main())
    ((error,),) = replies
    assert isinstance(error, ExtensionFailed)
    assert results == ["error"]


async def test_an_awaitable_that_is_no_coroutine_works() -> None:
    future = asyncio.get_running_loop().create_future()
    future.set_result(2)
    assert await reply_of(hook_of("cost", lambda: future, []), "cost") == 2


def test_an_awaitable_that_cannot_be_awaited_has_failed() -> None:
    class Unawaitable:
        __await__ = _raise

    check("cost", Unawaitable)
