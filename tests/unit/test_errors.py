"""Every refusal of the gateway has a status, a reason of the closed list, and problem details."""

import math
from collections.abc import Iterator

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import api_gateway.main  # imports all modules with errors, so that the tree is complete
from api_gateway import errors
from api_gateway.errors import (
    QUOTA_EXCEEDED,
    REDUCED_CAPACITY,
    GatewayError,
    HeadersTooLarge,
    Reason,
    RequestRefused,
    RequestTimeout,
    Unavailable,
    UpstreamFailed,
    problem,
)
from api_gateway.limits.limit_reached import LimitReached
from tests.cases import each


def below(cls: type[GatewayError]) -> Iterator[type[GatewayError]]:
    """Yield every class that derives from `cls`."""
    for child in cls.__subclasses__():
        yield child
        yield from below(child)


EVERY = [cls for cls in below(GatewayError) if cls.__module__.startswith(f"{api_gateway.__name__}.")]
BASES = {RequestRefused, Unavailable, UpstreamFailed}
CONCRETE = [cls for cls in EVERY if cls not in BASES and cls is not LimitReached]  # a RateLimited, see test_refusal
SENT = [cls for cls in CONCRETE if cls is not errors.ClientDisconnected]

DOCUMENTED: dict[type[GatewayError], tuple[int, str]] = {
    errors.RateLimited: (429, "rate_limited"),
    errors.ConcurrencyExceeded: (429, "concurrency_exceeded"),
    errors.CostExceedsCapacity: (403, "cost_exceeds_capacity"),
    errors.CircuitOpen: (503, "circuit_open"),
    errors.NoHealthyUpstream: (503, "no_healthy_upstream"),
    errors.Overloaded: (503, "overloaded"),
    errors.LoadShed: (503, "overloaded"),
    errors.Draining: (503, "draining"),
    errors.StoreUnavailable: (503, "store_unavailable"),
    errors.IssuerUnavailable: (503, "issuer_unavailable"),
    errors.UpstreamConnectError: (502, "upstream_connect_error"),
    errors.UpstreamReset: (502, "upstream_reset"),
    errors.UpstreamProtocolError: (502, "upstream_protocol_error"),
    errors.UpstreamTimeout: (504, "upstream_timeout"),
    errors.UpstreamConnectTimeout: (504, "upstream_timeout"),
    errors.NoRoute: (404, "no_route"),
    errors.MethodNotAllowed: (405, "method_not_allowed"),
    errors.ClientIdInvalid: (400, "client_id_invalid"),
    errors.Unauthorized: (401, "unauthorized"),
    errors.Forbidden: (403, "forbidden"),
    errors.AddressDenied: (403, "address_denied"),
    errors.CredentialsRequired: (401, "credentials_required"),
    errors.CredentialsInvalid: (401, "credentials_invalid"),
    errors.CredentialsRepeated: (400, "bad_request"),
    errors.CredentialsInsufficient: (403, "credentials_insufficient"),
    errors.CertificateRequired: (403, "certificate_required"),
    errors.AddressDenied: (403, "address_denied"),
    errors.BodyTooLarge: (413, "body_too_large"),
    HeadersTooLarge: (431, "headers_too_large"),
    RequestTimeout: (408, "request_timeout"),
    errors.BadRequest: (400, "bad_request"),
    errors.InvalidValue: (422, "invalid_value"),
    errors.Conflict: (409, "conflict"),
    errors.LengthRequired: (411, "length_required"),
    errors.LoopDetected: (508, "loop_detected"),
    errors.InternalError: (500, "internal_error"),
    errors.ChangeUnconfirmed: (503, "store_unavailable"),
    errors.ExtensionFailed: (500, "extension_failed"),
    errors.ClientDisconnected: (499, "client_disconnected"),
}


def test_the_documented_responses_are_all_there_are() -> None:
    assert {cls: (cls.status, cls.reason.value) for cls in CONCRETE} == DOCUMENTED


@each("cls", EVERY)
def test_every_error_has_a_status_and_a_reason_of_the_closed_list(cls: type[GatewayError]) -> None:
    assert isinstance(cls.reason, Reason)
    assert 400 <= cls.status <= 599


@each("reason", list(Reason))
def test_every_reason_is_given_by_some_error(reason: Reason) -> None:
    assert reason in {cls.reason for cls in CONCRETE}


def test_a_reason_has_one_status() -> None:
    assert len({(cls.reason, cls.status) for cls in CONCRETE}) == len(Reason)


@each(
    ("base", "statuses"),
    [(RequestRefused, range(400, 500)), (Unavailable, [503]), (UpstreamFailed, [502, 504])],
)
def test_a_branch_of_the_tree_has_its_class_of_status(base: type[GatewayError], statuses: range | list[int]) -> None:
    found = list(below(base))
    assert found
    assert [cls for cls in found if cls.status not in statuses] == []


def test_every_error_stands_in_one_branch() -> None:
    loose = {errors.LoopDetected, errors.InternalError, errors.ExtensionFailed, errors.ClientDisconnected}
    for cls in set(CONCRETE) - loose:
        assert sum(issubclass(cls, base) for base in BASES) == 1, cls
    assert not any(issubclass(cls, base) for cls in loose for base in BASES)


def test_a_retry_is_safe_exactly_where_nothing_reached_an_upstream() -> None:
    safe = {cls for cls in CONCRETE if cls.is_retry_safe}
    assert safe == {*below(Unavailable), errors.UpstreamConnectError, errors.UpstreamConnectTimeout}


# Retry-After


@given(st.floats(0, 1e6))
@example(0.0)
@example(1.0000001)
@example(30.0)
def test_retry_after_is_whole_seconds_rounded_up_and_never_zero(seconds: float) -> None:
    header = GatewayError("", retry_after=seconds).headers["retry-after"]
    assert header.isdecimal()
    assert int(header) == max(1, math.ceil(seconds))


def test_without_a_wait_there_is_no_retry_after() -> None:
    assert GatewayError("", headers={"allow": "GET"}).headers == {"allow": "GET"}


def test_an_error_keeps_its_own_copies() -> None:
    headers, extra = {"a": "1"}, {"b": 2}
    error = GatewayError("", retry_after=1, headers=headers, extra=extra)
    error.headers["c"] = error.extra["c"] = "3"
    assert (headers, extra) == ({"a": "1"}, {"b": 2})


def test_an_error_reads_as_its_detail() -> None:
    assert str(errors.BadRequest("No.")) == "No."


# Problem details


def test_a_problem_says_what_happened_and_why() -> None:
    error = errors.NoRoute("No route matches /api/x.")
    assert problem(error, instance="/api/x", request_id="id-1") == {
        "type": "about:blank",
        "title": "Not Found",
        "status": 404,
        "detail": "No route matches /api/x.",
        "instance": "/api/x",
        "reason": "no_route",
        "request_id": "id-1",
    }


def test_a_problem_of_an_unread_request_has_no_id() -> None:
    assert "request_id" not in problem(errors.BadRequest("No."), instance="")


@given(st.floats(0, 1e6))
@example(0.0004)
@example(0.1234)
@example(30.0)
def test_a_problem_carries_the_wait_in_milliseconds_and_never_a_shorter_one(seconds: float) -> None:
    body = problem(errors.RateLimited("Wait.", retry_after=seconds), instance="/api/x")
    assert -1e-9 <= body["retry_after_seconds"] - seconds <= 0.001 + 1e-9
    assert body["retry_after_seconds"] == round(body["retry_after_seconds"], 3)


def test_a_problem_carries_what_else_is_known() -> None:
    body = problem(errors.RateLimited("Wait.", extra={"tier": "FREE"}), instance="/api/x")
    assert body["tier"] == "FREE"
    assert "retry_after_seconds" not in body


@each("cls", SENT)
def test_every_error_that_is_sent_has_a_problem_with_a_type_and_its_title(cls: type[GatewayError]) -> None:
    """RFC 9457 section 4.2.1: the title of about:blank is the phrase of the status."""
    body = problem(cls("Why."), instance="/")
    assert (body["status"], body["reason"], body["detail"]) == (cls.status, cls.reason.value, "Why.")
    assert body["title"]
    if issubclass(cls, Unavailable):
        assert body["type"] == REDUCED_CAPACITY
    else:
        assert body["type"] == (
            QUOTA_EXCEEDED if cls in (errors.RateLimited, errors.ConcurrencyExceeded) else "about:blank"
        )
    assert body["title"].isascii()


@pytest.mark.parametrize("name", [QUOTA_EXCEEDED, REDUCED_CAPACITY])
def test_a_registered_type_has_a_title_of_its_own(name: str) -> None:
    errors_of_type = [cls for cls in SENT if cls.problem_type == name]
    titles = {problem(cls("Why."), instance="/")["title"] for cls in errors_of_type}
    assert len(titles) == 1
    assert titles.isdisjoint({"Too Many Requests", "Service Unavailable"})
