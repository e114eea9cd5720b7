"""Extensions: their fields, results, loading, and the trial in another process."""

import asyncio
from collections import Counter
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from api_gateway.assembly.extensions import load_extensions
from api_gateway.config import from_values
from api_gateway.errors import ExtensionFailed, StartupError
from api_gateway.extensions.fields import (
    REQUEST_FIXED,
    RESPONSE_FIXED,
    FieldsView,
    changed_lines,
    changed_pairs,
    checked_changes,
)
from api_gateway.extensions.hooks import MOST_LEFT, Hook, HookCall, HookPolicy
from api_gateway.extensions.interface import Identity, Respond, checked_cost, checked_identity
from api_gateway.extensions.loading import ExtensionError, load_extension
from api_gateway.extensions.trial import try_extension
from tests import virtual_time
from tests.cases import each


def test_fields_have_no_letter_case_and_cannot_be_changed() -> None:
    view = FieldsView([(b"X-Tenant", b"a"), (b"x-tenant", b"b"), (b"Accept", b"*/*")])
    assert view["X-TENANT"] == "a, b"
    assert view.all("x-Tenant") == ["a", "b"]
    assert "ACCEPT" in view
    assert dict(view) == {"x-tenant": "a, b", "accept": "*/*"}
    with pytest.raises(TypeError):
        view["x"] = "y"  # type: ignore[index]  # it is not mutable
    assert "*/*" not in repr(view)  # values may be secret


@each("name", ["Content-Length", "transfer-encoding", "CONNECTION", "Host", "Upgrade", "TE", "Via", "X-Request-ID"])
@each("fixed", [REQUEST_FIXED, RESPONSE_FIXED])
def test_framing_and_hop_by_hop_fields_cannot_be_changed(name: str, fixed: frozenset[bytes]) -> None:
    for value in ("1", None):
        with pytest.raises(ValueError, match=name):
            checked_changes({name: value}, fixed)


@each("value", ["a\r\nSet-Cookie: b", "a\nb", "a\rb", "a\0b", " a", "a ", "\x7f", "\u0141", "a\x85b\n"])
def test_a_value_cannot_inject_a_field(value: str) -> None:
    with pytest.raises(ValueError, match="X-Note"):
        checked_changes({"X-Note": value}, REQUEST_FIXED)
    with pytest.raises(ValueError, match="X-Note"):
        Respond(200, headers={"X-Note": value})


@each("name", ["", "a b", "a:b", "a\r\nb", "é"])
def test_a_name_cannot_inject_a_field(name: str) -> None:
    with pytest.raises(ValueError, match="not the name of a header field"):
        checked_changes({name: "x"}, REQUEST_FIXED)


@each("changes", [5, [("a", "b")], {"a": 5}, {"a": b"x"}])
def test_changes_of_another_type_are_refused(changes: Any) -> None:
    with pytest.raises(TypeError):
        checked_changes(changes, REQUEST_FIXED)


def test_changes_of_lines_and_of_pairs_agree() -> None:
    changes = checked_changes({"x-A": "new", "Gone": None}, REQUEST_FIXED)
    lines = b"\r\nX-a: 1\r\nKept: 2\r\ngone: 3\r\nX-A: 4\r\n"
    assert changed_lines(lines, changes) == b"\r\nKept: 2\r\nx-A: new\r\n"
    assert changed_lines(b"HTTP/1.1 200 OK\r\nGone: 1", changes) == b"HTTP/1.1 200 OK\r\nx-A: new"
    assert changed_lines(b"\r\nX_A: forged\r\n", changes) == b"\r\nx-A: new\r\n", "CGI reads X_A as X-A"
    assert changed_lines(b"\r\n", changes) == b"\r\nx-A: new\r\n"
    pairs = [(b"X-a", b"1"), (b"Kept", b"2"), (b"gone", b"3"), (b"X-A", b"4")]
    assert changed_pairs(pairs, changes) == [(b"Kept", b"2"), (b"x-A", b"new")]


@each("result", [-1, float("nan"), float("inf"), 2_000_000_000])
def test_a_cost_out_of_range_is_an_error(result: float) -> None:
    with pytest.raises(ValueError, match="0 to 1000000000"):
        checked_cost(result)


@each("result", [True, "1", None, [1]])
def test_a_cost_is_a_number(result: object) -> None:
    with pytest.raises(TypeError):
        checked_cost(result)


@each("client_id", ["", "a b", "a\n", "é", "x" * 129])
def test_an_identity_has_a_valid_id(client_id: str) -> None:
    with pytest.raises(ValueError, match="visible ASCII"):
        checked_identity(Identity(client_id))
    with pytest.raises(TypeError):
        checked_identity(client_id)


def test_a_response_frames_itself() -> None:
    assert Respond(200, "ü").fields() == [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", b"2"),
    ]
    assert Respond(204).fields() == []
    for status, body in ((204, "x"), (101, ""), (600, "")):
        with pytest.raises(ValueError, match="status"):
            Respond(status, body)


def test_a_response_has_a_status_and_a_body_that_can_be_sent() -> None:
    made = Respond(HTTPStatus.CREATED, memoryview(b"x"))  # type: ignore[arg-type]  # works, though it is not promised
    assert (made.content, made.fields()) == (b"x", [(b"content-length", b"1")])
    for status, body, named in ((200.0, "x", "float"), ("200", "x", "str"), (200, [1], "list"), (200, None, "None")):
        with pytest.raises(TypeError, match=named):
            Respond(status, body)  # type: ignore[arg-type]  # that is the point


# Calls


class Calls:
    def __init__(self) -> None:
        self.results: list[str] = []

    def hook(self, call: Callable[..., Any], budget: float = 5, policy: Any = "refuse") -> Hook:
        return Hook("ext", "cost", call, HookPolicy(budget, policy, policy), checked_cost, self._on_call)

    def _on_call(self, extension: str, hook: str, result: str, took_ns: int) -> None:
        assert (extension, hook) == ("ext", "cost")
        assert took_ns >= 0
        self.results.append(result)


async def outcome(hook: Hook) -> Any:
    """Call a hook, and return its result when it has one. Raises ExtensionFailed."""
    found = hook.begin()
    if not isinstance(found, HookCall):
        return found
    replies: asyncio.Queue[tuple[Any]] = asyncio.Queue()
    found.ask(replies.put_nowait)
    (result,) = await replies.get()
    if isinstance(result, ExtensionFailed):
        raise result
    return result


async def _slow() -> float:
    await asyncio.sleep(60)
    return 1.0


async def _three() -> float:
    return 3.0


def _wrong() -> float:
    raise RuntimeError("wrong")


async def test_results_of_functions_and_coroutines_are_checked_and_counted() -> None:
    calls = Calls()
    assert calls.hook(lambda: 2).begin() == 2
    assert await outcome(calls.hook(_three)) == 3.0
    assert calls.hook(lambda: None).begin() is None
    assert calls.results == ["ok"] * 3


@pytest.mark.parametrize("policy", ["refuse", "ignore"])
async def test_failures_are_contained_counted_and_logged_with_the_name_of_the_hook(
    policy: str, caplog: pytest.LogCaptureFixture
) -> None:
    calls = Calls()
    for call in (_wrong, lambda: -1, lambda: "x"):
        hook = calls.hook(call, policy=policy)
        if policy == "refuse":
            with pytest.raises(ExtensionFailed, match="'ext' failed in cost"):
                hook.begin()
        else:
            assert hook.begin() is None
    slow = calls.hook(_slow, 0.01, policy)
    if policy == "refuse":
        with pytest.raises(ExtensionFailed, match="did not respond in time in cost"):
            await outcome(slow)
    else:
        assert await outcome(slow) is None
    assert calls.results == ["error"] * 3 + ["timeout"]
    assert "extension ext: cost failed" in caplog.text
    assert "not done within 10 ms" in caplog.text


async def test_a_function_that_exceeds_its_budget_is_counted_and_its_result_is_used(
    caplog: pytest.LogCaptureFixture,
) -> None:
    calls = Calls()
    hook = calls.hook(lambda: sum(range(20_000)) and 4, 1e-6)
    assert [hook.begin(), hook.begin()] == [4, 4]
    assert calls.results == ["timeout", "timeout"]
    assert caplog.text.count("cannot be interrupted") == 1  # a line in a second


@pytest.mark.parametrize("error", [SystemExit, asyncio.CancelledError, BaseException])
async def test_a_hook_neither_ends_the_process_nor_leaves_its_request_without_a_response(
    error: type[BaseException],
) -> None:
    async def later() -> float:
        raise error

    def at_once() -> float:
        raise error

    calls = Calls()
    with pytest.raises(ExtensionFailed, match="failed in cost"):
        calls.hook(at_once).begin()
    with pytest.raises(ExtensionFailed, match="failed in cost"):
        await outcome(calls.hook(later))
    assert await outcome(calls.hook(later, policy="ignore")) is None
    assert calls.results == ["error"] * 3


def test_a_coroutine_that_catches_its_cancellation_holds_no_request_and_is_counted_and_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    calls, released = Calls(), False
    seen: list[str] = []

    async def stubborn() -> float:
        while not released:
            try:
                await asyncio.sleep(10)
            except asyncio.CancelledError:
                seen.append("cancelled")
        return 2.0

    async def main() -> None:
        nonlocal released
        try:
            await leave_all()
        finally:
            released = True
        await asyncio.sleep(20)
        assert not hook._left
        assert await outcome(hook) == 2.0

    async def leave_all() -> None:
        loop = asyncio.get_running_loop()
        for number in range(MOST_LEFT):
            began = loop.time()
            assert await outcome(hook) is None
            assert loop.time() == pytest.approx(began + 0.5), "the request goes on after the budget"
            assert len(hook._left) == number + 1
        await asyncio.sleep(2)
        assert len(seen) == MOST_LEFT
        assert Counter(calls.results) == {"timeout": MOST_LEFT, "still_running": MOST_LEFT}
        assert hook.begin() is None, "a further one is not begun"
        assert calls.results[-1] == "timeout"

    hook = calls.hook(stubborn, 0.5, "ignore")
    virtual_time.run(main())
    assert caplog.text.count("continues although its call was cancelled") == 1


# Loading

BAD = {
    "import error": ("import no_such_module\n", "ModuleNotFoundError: No module named 'no_such_module'"),
    "syntax": ("def\n", "SyntaxError"),
    "no object": ("x = 1\n", "has no make"),
    "not callable": ("make = 5\n", "is not callable"),
    "no hook": ("make = dict\n", "dict has no hook; an extension has one or more of identify, cost"),
    "misspelt hook": (
        "class make:\n    def __init__(self, _): ...\n    def cost(self, r, n): ...\n    on_reponse = cost\n",
        "make has 'on_reponse', which is no hook; did you mean 'on_response'?",
    ),
    "misspelt hook alone": (
        "class make:\n    def __init__(self, options): ...\n    def identfy(self, request): ...\n",
        "make has 'identfy', which is no hook; did you mean 'identify'?",
    ),
    "signature": (
        "class make:\n    def __init__(self, options): ...\n    def cost(self, request): ...\n",
        "cost must take 2 positional arguments",
    ),
    "factory": ("def make(options):\n    raise KeyError('table')\n", "KeyError: 'table'"),
    "exit": ("import sys\nsys.exit(3)\n", "has ended the program: SystemExit(3)"),
    "hard exit": ("import os\nos._exit(7)\n", "it ended the process with code 7"),
    "endless": ("while True: pass\n", "it was not loaded within 1.5 s"),
    "children": ("import os\nos.fork()\nwhile True: pass\n", "it was not loaded within 1.5 s"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_extension_is_found_in_another_process(tmp_path: Path, case: str) -> None:
    code, message = BAD[case]
    path = tmp_path / "bad.py"
    path.write_text(code)
    limit = 1.5 if "within" in message else 60.0
    assert message in (try_extension("bad", f"{path}:make", {}, limit) or "it was loaded")


def test_settings_of_a_hook_that_the_extension_lacks_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "only_cost.py"
    path.write_text(
        "class make:\n    def __init__(self, options): ...\n    def cost(self, request, route): ...\n"
        "    costs = {'cost': 1}\n    def on_end(self): ...\n"
    )
    problem = try_extension("x", f"{path}:make", {}, 60, ["cost", "identify"])
    assert problem == "hooks has settings of 'identify', and make has only cost"
    hooks: dict[str, Any] = {"identify": {"budget": 1}}
    section = {"name": "x", "use": f"{path}:make", "hooks": hooks}
    with pytest.raises(StartupError, match=r"extensions\[0\].use: .*hooks has settings of 'identify'"):
        load_extensions(from_values({"extensions": [section], "state_dir": tmp_path}))
    del hooks["identify"]
    assert try_extension("x", f"{path}:make", {}, 60, ["cost"]) is None


def test_two_extensions_have_different_names() -> None:
    sections = [{"name": "one", "use": "a:b"}, {"name": "two", "use": "a:b"}, {"name": "one", "use": "c:d"}]
    with pytest.raises(ValidationError, match=r"extensions\[2\].name: already the name of extensions\[0\] \(a:b\)"):
        from_values({"extensions": sections})


def test_a_good_extension_may_print_and_start_threads(tmp_path: Path) -> None:
    path = tmp_path / "good.py"
    path.write_text(
        "import threading, time\nprint('hello')\nthreading.Thread(target=time.sleep, args=(600,)).start()\n"
        "class make:\n    def __init__(self, options): ...\n    def cost(self, request, route): ...\n"
    )
    assert try_extension("good", f"{path}:make", {}, 60) is None


def test_places_that_do_not_exist_are_named(tmp_path: Path) -> None:
    for use, message in (
        ("no_such_entry", "no entry point 'no_such_entry' in the group api_gateway.extensions"),
        ("no.such.module:x", "ModuleNotFoundError"),
        (f"{tmp_path}/none.py:x", "there is no file"),
    ):
        with pytest.raises(ExtensionError, match=message):
            load_extension("x", use, {})


def test_a_file_is_executed_anew_for_each_load(tmp_path: Path) -> None:
    path, code = (
        tmp_path / "e.py",
        "class make:\n    version = {}\n    def __init__(self, o): ...\n    def cost(self, r, n): ...\n",
    )
    for version in (1, 2):
        path.write_text(code.format(version) + " " * version)
        assert load_extension("e", f"{path}:make", {}).version == version  # type: ignore[attr-defined]
