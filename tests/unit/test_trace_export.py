"""The thread that exports traces, what it sends, and OpenTelemetry's environment variables."""

import json
import random
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api_gateway.assembly.tracing import tracing_plan
from api_gateway.config import GatewayConfig, from_values, load_config
from api_gateway.errors import StartupError
from api_gateway.models import AttemptFailure, Client, Decision, Exchange, Quota, Trace
from api_gateway.observability import trace_exporter
from api_gateway.observability.access_log import LINE_FIELDS, AccessLog
from api_gateway.observability.trace_exporter import EXPORT_BATCH, MAX_DELIVERIES, RESULTS, TraceExporter
from api_gateway.observability.trace_sender import Delivery, OtlpSender
from api_gateway.observability.tracing import Sampling
from api_gateway.process.start_check import file_errors
from api_gateway.resilience.breaker_policy import State
from api_gateway.settings.diagnostics import ConfigError
from tests.cases import each
from tests.kit import PATIENCE, eventually, refusing_url
from tests.trace_kit import CLIENT, ERROR, SERVER, UNSET, Collector, collector, spans_of

encoding = pytest.importorskip("api_gateway.observability.trace_encoding")

ACCEPTED = Delivery("accepted")


def traced(number: int = 0, attempts: int = 0, **values: Any) -> Exchange:
    """Return an ended exchange with a trace."""
    found = Exchange(f"id-{number}", "GET", "/api/x", "192.0.2.1", 10.0, status=200, finished=10.5)
    found.trace = Trace()
    found.trace.fields = b"\r\ntraceparent: 00-%032x-00000000000000aa-03" % (number + 1)
    found.trace.is_sampled = True
    for index in range(attempts):
        if index:
            found.trace.next_attempt()
        found.trace.attempt = "up", "http://10.0.0.1:81", b"/x?secret=1", State.CLOSED, 10.1
    for name, value in values.items():
        setattr(found, name, value)
    return found


class FakeSender:
    """Records what it sends; its results are those of `results`, then `accepted`."""

    place = "http://collector"

    def __init__(self, *results: Delivery) -> None:
        self.results = list(results)
        self.bodies: list[bytes] = []
        self.limits: list[float | None] = []
        self.is_closed = False
        self.gate = threading.Event()
        self.gate.set()

    def send(self, body: bytes, within: float | None) -> Delivery:
        self.gate.wait(PATIENCE)
        self.bodies.append(body)
        self.limits.append(within)
        return self.results.pop(0) if self.results else ACCEPTED

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_exporter, "EXPORT_INTERVAL", 0.01)
    monkeypatch.setattr(trace_exporter, "FIRST_EXPORT_DELAY", 0.01)
    monkeypatch.setattr(trace_exporter, "MAX_EXPORT_DELAY", 0.02)


def exporter(sender: Any, max_queue: int = 1000) -> tuple[TraceExporter, Counter[str]]:
    counts: Counter[str] = Counter()
    encoder = encoding.SpanEncoder({"service.name": "test"}, "1")
    found = TraceExporter(
        encoder,
        sender,
        counts,
        max_queue=max_queue,
        clock=lambda: 20.0,
        wall_clock=lambda: 1020.0,
        source=random.Random(1),
    )
    found.start()
    return found, counts


# The thread


def test_spans_are_sent_in_batches_and_counted() -> None:
    sender = FakeSender()
    sender.gate.clear()
    one, counts = exporter(sender)
    for number in range(EXPORT_BATCH + 10):
        one.add(traced(number, attempts=1))
    sender.gate.set()
    eventually(lambda: counts["exported"] == 2 * (EXPORT_BATCH + 10), "all are exported")
    assert sum(len(spans_of(body)) for body in sender.bodies) == 2 * (EXPORT_BATCH + 10)
    assert max(len(spans_of(body)) for body in sender.bodies) <= 2 * EXPORT_BATCH
    one.close()
    assert sender.is_closed
    assert not one._thread.is_alive()


def test_a_full_queue_drops_and_counts_spans_and_never_blocks() -> None:
    sender = FakeSender()
    sender.gate.clear()
    one, counts = exporter(sender, max_queue=5)
    one.add(traced())
    eventually(lambda: len(one) == 0, "the thread has taken the first")
    for number in range(8):
        one.add(traced(number, attempts=2))
    assert len(one) == 5
    assert counts["queue_full"] == 3 * 3
    sender.gate.set()
    eventually(lambda: counts["exported"] == 1 + 5 * 3, "the others are exported")
    one.close()


def test_a_batch_is_sent_again_and_the_first_failure_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    sender = FakeSender(*[Delivery("retry", "status 503")] * 2, ACCEPTED)
    with caplog.at_level("INFO"):
        one, counts = exporter(sender)
        one.add(traced())
        eventually(lambda: counts["exported"] == 1, "it is exported")
        one.close()
    assert len(set(sender.bodies)) == 1
    assert len(sender.bodies) == 3
    assert [record.getMessage() for record in caplog.records] == [
        "tracing: spans cannot be delivered: status 503 (collector http://collector)",
        "tracing: spans are delivered to http://collector again",
    ]


def test_a_batch_is_given_up_and_counted_while_the_collector_is_unavailable() -> None:
    sender = FakeSender(*[Delivery("retry", "refused", retry_after=1000)] * MAX_DELIVERIES)
    one, counts = exporter(sender)
    one.add(traced(attempts=1))
    eventually(lambda: counts["failed"] == 2, "it is given up")
    assert len(sender.bodies) == MAX_DELIVERIES
    one.add(traced())
    eventually(lambda: counts["exported"] == 1, "the next one is delivered")
    one.close()


def test_what_a_collector_refuses_or_rejects_is_counted() -> None:
    sender = FakeSender(Delivery("refused", "status 400"), Delivery("accepted", "too old", rejected=1))
    one, counts = exporter(sender)
    one.add(traced(attempts=1))
    eventually(lambda: counts["rejected"] == 2, "the first is refused")
    one.add(traced(attempts=1))
    eventually(lambda: counts["exported"] == 1, "the second is accepted in part")
    assert (counts["rejected"], len(sender.bodies)) == (3, 2)
    one.close()


def test_the_end_delivers_what_waits_and_takes_no_longer_than_it_may() -> None:
    sender = FakeSender()
    one, counts = exporter(sender)
    for number in range(50):
        one.add(traced(number))
    one.close()
    assert counts["exported"] == 50
    failing = FakeSender(*[Delivery("retry", "refused")] * 1000)
    one, counts = exporter(failing)
    for number in range(3 * EXPORT_BATCH):
        one.add(traced(number))
    began = time.monotonic()
    one.close(within=PATIENCE)
    assert time.monotonic() - began < PATIENCE
    assert counts["failed"] == 3 * EXPORT_BATCH
    assert all(limit is not None for limit in failing.limits[-2:]), "a delivery at the end has a limit"
    one.close()


def test_a_collector_that_does_not_respond_does_not_hold_the_end_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        sender = OtlpSender(f"http://127.0.0.1:{silent.getsockname()[1]}/v1/traces", {}, PATIENCE, lambda _: (0, ""))
        one, counts = exporter(sender)
        one.add(traced())
        began = time.monotonic()
        one.close(within=0.2)
        assert time.monotonic() - began < PATIENCE / 2
    eventually(lambda: counts["failed"] == 1, "the closed socket ends the delivery")


def test_a_defect_does_not_end_the_thread(caplog: pytest.LogCaptureFixture) -> None:
    sender = FakeSender()
    one, counts = exporter(sender)
    one.add(traced(method=b"not text"))
    eventually(
        lambda: any("could not be exported" in record.getMessage() for record in caplog.records), "it is logged"
    )
    one.add(traced())
    eventually(lambda: counts["exported"] == 1, "the next one is exported")
    assert counts["failed"] == 1
    one.close()


def test_a_change_takes_effect_with_the_next_batch() -> None:
    first, second = FakeSender(), FakeSender()
    one, counts = exporter(first)
    one.add(traced(1))
    eventually(lambda: counts["exported"] == 1, "the first is exported")
    one.change(encoding.SpanEncoder({"service.name": "other"}, "1"), second, 10)
    one.add(traced(2))
    eventually(lambda: counts["exported"] == 2, "the second is exported")
    one.close()
    assert first.is_closed
    assert second.is_closed
    assert [span.resource["service.name"] for body in second.bodies for span in spans_of(body)] == ["other"]


# The sender


@pytest.fixture
def receiver() -> Iterator[Collector]:
    with collector() as found:
        yield found


def sender_to(url: str, **headers: str) -> OtlpSender:
    return OtlpSender(url, headers, PATIENCE, encoding.rejected_spans)


def test_a_request_is_otlp_over_http(receiver: Collector) -> None:
    sender = sender_to(f"{receiver.url}/custom?x=1", Authorization="Bearer t")
    body, count = encoding.SpanEncoder({}, "1").request([traced()], 0.0)
    assert sender.send(body) == sender.send(body) == ACCEPTED
    path, headers = receiver.requests[0]
    assert (path, headers["content-type"], headers["authorization"]) == (
        "/custom?x=1",
        "application/x-protobuf",
        "Bearer t",
    )
    assert (count, receiver.bodies) == (1, [body, body])
    sender.close()


@pytest.mark.parametrize(
    ("status", "result"),
    [
        (429, "retry"),
        (502, "retry"),
        (503, "retry"),
        (504, "retry"),
        (500, "refused"),
        (400, "refused"),
        (302, "refused"),
    ],
)
def test_the_status_says_whether_to_send_again(receiver: Collector, status: int, result: str) -> None:
    receiver.statuses, receiver.fields = [status], {"Retry-After": "7"}
    sender = sender_to(receiver.url)
    assert sender.send(b"") == Delivery(result, f"status {status}", retry_after=7.0)  # type: ignore[arg-type]  # literals
    sender.close()


def test_a_partial_success_says_how_many_were_rejected(receiver: Collector) -> None:
    response = encoding.ExportTraceServiceResponse()
    response.partial_success.rejected_spans, response.partial_success.error_message = 3, "too large"
    receiver.content = response.SerializeToString()
    sender = sender_to(receiver.url)
    assert sender.send(b"") == Delivery("accepted", "too large", rejected=3)
    receiver.content = b"\xff\xff not protobuf"
    assert sender.send(b"") == ACCEPTED
    sender.close()


def test_a_collector_that_is_down_is_an_outcome_and_no_error(receiver: Collector) -> None:
    sender = sender_to(refusing_url())
    delivery = sender.send(b"")
    assert (delivery.result, "refused" in delivery.detail) == ("retry", True)
    again = sender_to(receiver.url)
    receiver.fields = {"Connection": "close"}
    assert again.send(b"") == again.send(b"") == ACCEPTED, "a closed connection is opened again"
    again.close()
    assert sender_to("https://127.0.0.1:1/").send(b"").result == "retry"


# The encoding


@given(st.text(max_size=300), st.text(max_size=300), st.integers(0, 10), st.sampled_from([0, 200, 404, 499, 500, 503]))
def test_any_text_is_encoded_as_the_library_decodes_it(path: str, request_id: str, attempts: int, status: int) -> None:
    one = traced(attempts=attempts, path=path, id=request_id, status=status)
    body, count = encoding.SpanEncoder({"a": "b"}, "1").request([one], 1000.0)
    spans = spans_of(body)
    assert len(spans) == count == 1 + attempts
    assert spans[0].attributes["url.path"] == path.encode("utf-8", "replace").decode()
    assert spans[0].attributes["gateway.request.id"] == request_id.encode("utf-8", "replace").decode()
    assert (spans[0].start, spans[0].end) == (1_010_000_000_000, 1_010_500_000_000)
    assert {span.parent_id for span in spans[1:]} <= {spans[0].span_id}
    assert len({span.span_id for span in spans}) == 1 + attempts
    assert spans[0].resource == {"a": "b"}


@each("size", [0, 1, 90, 100, 127, 128, 16_383, 16_384, 100_000])
def test_a_text_of_any_length_is_encoded_as_the_library_decodes_it(size: int) -> None:
    one = traced(path="x" * size, attempts=1)
    assert one.trace is not None
    one.trace.attempt = "up", "http://10.0.0.1:81", b"/" + b"y" * size, State.OPEN, 10.1
    own, attempt = spans_of(encoding.SpanEncoder({}, "1").request([one], 0.0)[0])
    assert own.attributes["url.path"] == "x" * size
    assert attempt.attributes["url.full"] == f"http://10.0.0.1:81/{'y' * size}"
    assert attempt.attributes["gateway.circuit_breaker.state"] == "open"


@given(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 2**22))
def test_any_number_is_encoded_as_the_library_decodes_it(remaining: int) -> None:
    decision = Decision("client:c", Quota.per_second("FREE", 1, 10), True, remaining, 0, 0)
    (own,) = spans_of(encoding.SpanEncoder({}, "1").request([traced(decision=decision)], 0.0)[0])
    assert own.attributes["gateway.tokens.remaining"] == remaining


def test_optional_parts_are_encoded_as_the_library_decodes_them() -> None:
    one = traced(client=Client("c", "client:c", Quota.per_second("FREE", 1, 10), "default"))
    assert one.trace is not None
    one.trace.host, one.trace.parent_id, one.trace.state, one.trace.link = "h", "b" * 16, b"a=1", ("c" * 32, "d" * 16)
    (own,) = spans_of(encoding.SpanEncoder({}, "1", has_client=True).request([one], 0.0)[0])
    assert (own.parent_id, own.state, own.links, own.flags) == ("b" * 16, "a=1", [("c" * 32, "d" * 16)], 0x303)
    found = {name: own.attributes[name] for name in ("server.address", "client.address", "gateway.client.id")}
    assert found == {"server.address": "h", "client.address": "192.0.2.1", "gateway.client.id": "c"}


@pytest.mark.parametrize(("method", "original"), [("BREW", "BREW"), ("a-credential", None)])
def test_a_span_of_an_unknown_method_has_no_method_in_its_name(method: str, original: str | None) -> None:
    own, attempt = spans_of(encoding.SpanEncoder({}, "1").request([traced(attempts=1, method=method)], 0.0)[0])
    for span in (own, attempt):
        assert span.name == "HTTP"
        assert span.attributes["http.request.method"] == "_OTHER"
        assert span.attributes.get("http.request.method_original") == original


@pytest.mark.parametrize(
    ("row", "values", "expected"),
    [
        (None, {"source": "upstream", "head_at": 10.3}, (200, None, 10.5)),
        (None, {"status": 499, "reason": "client_disconnected"}, (None, "client_disconnected", 10.5)),
        ((10.2, None, "upstream_reset"), {"status": 502, "reason": "upstream_reset"}, (None, "upstream_reset", 10.2)),
        (  # within the body of a response
            (10.4, None, "upstream_reset"),
            {"source": "upstream", "head_at": 10.2, "reason": "upstream_reset"},
            (200, "upstream_reset", 10.4),
        ),
        ((10.2, 503, None), {"source": "upstream", "head_at": 10.2, "status": 503}, (503, "503", 10.5)),
        ((10.2, 503, None), {"head_at": 10.2, "status": 504, "reason": "timeout"}, (503, "503", 10.5)),
    ],
)
def test_the_last_attempt_ends_as_its_failure_says_or_with_the_exchange(
    row: tuple[float, int | None, str | None] | None, values: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    failures = () if row is None else (AttemptFailure("up", "http://10.0.0.1:81", 10.1, *row, ""),)
    one = traced(attempts=1, failures=failures, **values)
    _, span = spans_of(encoding.SpanEncoder({}, "1").request([one], 0.0)[0])
    status, error, ended = expected
    assert span.attributes.get("http.response.status_code") == status
    assert span.attributes.get("error.type") == error
    assert span.end == round(ended * 1e9)


def test_an_attempt_has_the_attributes_of_a_client() -> None:
    failed = AttemptFailure("up", "http://10.0.0.1:81", 10.1, 10.2, 503, None, "")
    one = traced(attempts=2, source="upstream", head_at=10.4, failures=(failed,))
    own, refused, served = spans_of(encoding.SpanEncoder({}, "1").request([one], 0.0)[0])
    assert (own.kind, own.status, refused.kind, served.kind) == (SERVER, UNSET, CLIENT, CLIENT)
    assert (refused.status, served.status) == (ERROR, UNSET)
    assert refused.attributes == {
        "http.request.method": "GET",
        "url.full": "http://10.0.0.1:81/x",
        "server.address": "10.0.0.1",
        "server.port": 81,
        "network.protocol.version": "1.1",
        "http.response.status_code": 503,
        "error.type": "503",
        "gateway.upstream": "up",
        "gateway.circuit_breaker.state": "closed",
    }
    assert served.attributes["http.request.resend_count"] == 1
    assert "error.type" not in served.attributes
    assert (refused.end, served.end) == (10_200_000_000, 10_500_000_000)
    assert (own.flags, served.flags) == (0x103, 0x103)


def test_secrets_in_paths_are_redacted() -> None:
    encoder = encoding.SpanEncoder({}, "1", redact=lambda text: text.replace("/x", "/***"))
    own, attempt = spans_of(encoder.request([traced(attempts=1)], 0.0)[0])
    assert (own.attributes["url.path"], attempt.attributes["url.full"]) == ("/api/***", "http://10.0.0.1:81/***")


def test_the_access_log_has_the_trace_id_while_tracing_is_on() -> None:
    log = AccessLog()
    first, second = (json.loads(log.line(one, 1000.0)) for one in (traced(), traced(trace=None)))
    assert first["trace_id"] == f"{1:032x}"
    assert list(first) == [name for name in LINE_FIELDS if name in first]
    assert "trace_id" not in second


# Settings and environment


def config(**tracing: Any) -> GatewayConfig:
    return from_values({"tracing": {"enabled": True, **tracing}})


def test_tracing_is_off_by_default_and_if_the_environment_disables_it() -> None:
    assert tracing_plan(from_values({}), {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c"}) is None
    assert tracing_plan(config(), {"OTEL_SDK_DISABLED": "TRUE"}) is None


@each(
    ("settings", "variables", "endpoint"),
    [
        ({}, {}, "http://localhost:4318/v1/traces"),
        ({"endpoint": "http://c:4318"}, {}, "http://c:4318/v1/traces"),
        ({"endpoint": "https://c/"}, {}, "https://c/v1/traces"),
        ({"endpoint": "https://c/own"}, {}, "https://c/own"),
        ({}, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:1"}, "http://c:1/v1/traces"),
        ({}, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:1/base/"}, "http://c:1/base/v1/traces"),
        (
            {},
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://t/x"},
            "http://t/x",
        ),
        ({"endpoint": "http://own"}, {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://t/x"}, "http://own/v1/traces"),
        ({}, {"OTEL_EXPORTER_OTLP_ENDPOINT": "c:4317"}, "http://localhost:4318/v1/traces"),
    ],
)
def test_settings_precede_the_environment(settings: dict[str, Any], variables: dict[str, str], endpoint: str) -> None:
    plan = tracing_plan(config(**settings), variables)
    assert plan is not None
    assert plan.endpoint == endpoint


@each(
    ("settings", "variables", "parent", "ratio"),
    [
        ({}, {}, "obey", 1.0),
        ({}, {"OTEL_TRACES_SAMPLER": "always_off"}, "ignore", 0.0),
        ({}, {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.25"}, "obey", 0.25),
        ({}, {"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "much"}, "ignore", 1.0),
        ({}, {"OTEL_TRACES_SAMPLER": "jaeger_remote"}, "obey", 1.0),
        ({"ratio": 0.5, "parent": "restart"}, {"OTEL_TRACES_SAMPLER": "always_on"}, "restart", 0.5),
    ],
)
def test_the_sampler_of_the_environment_is_known(
    settings: dict[str, Any], variables: dict[str, str], parent: str, ratio: float
) -> None:
    plan = tracing_plan(config(**settings), variables)
    assert plan is not None
    assert plan.sampling == Sampling(ratio, parent)  # type: ignore[arg-type]  # literals


def test_the_resource_is_merged_and_headers_are_not(caplog: pytest.LogCaptureFixture) -> None:
    variables = {
        "OTEL_SERVICE_NAME": "from-name",
        "OTEL_RESOURCE_ATTRIBUTES": "service.name=listed, deployment.environment.name=a%20b,team=x",
        "OTEL_EXPORTER_OTLP_HEADERS": "api-key=s%2Cs",
    }
    plan = tracing_plan(config(resource={"team": "y"}), variables)
    assert plan is not None
    found = {name: plan.resource[name] for name in ("service.name", "deployment.environment.name", "team")}
    assert found == {"service.name": "from-name", "deployment.environment.name": "a b", "team": "y"}
    assert plan.headers == {"api-key": "s,s"}
    plan = tracing_plan(config(service_name="own", headers="Authorization=Bearer%20t"), variables)
    assert plan is not None
    assert (plan.resource["service.name"], plan.headers) == ("own", {"Authorization": "Bearer t"})
    plan = tracing_plan(config(), {"OTEL_RESOURCE_ATTRIBUTES": "broken", "OTEL_EXPORTER_OTLP_HEADERS": "a=b%0Ac"})
    assert plan is not None
    assert (plan.resource["service.name"], plan.headers) == ("api-gateway", {})
    assert len(caplog.records) == 2


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("endpoint", "collector:4318", "must be a URL that begins with http:// or https://"),
        ("endpoint", "http://user:hidden@c", "must not contain a user name or password; set headers instead"),
        ("endpoint", "http://c:99999", "port must be 1 to 65535"),
        ("endpoint", "http://c d", "must be visible ASCII characters without '#'"),
        ("ratio", 1.5, "less than or equal to 1"),
        ("parent", "trust", "must be one of obey, ignore, restart"),
        ("max_queue", 0, "greater than or equal to 1"),
        ("keep_slower_than", 0, "greater than 0"),
        ("rate", 1, "ratio"),
    ],
)
def test_a_wrong_setting_names_place_and_value(tmp_path: Path, key: str, value: Any, message: str) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text(f"tracing:\n  {key}: {value!r}\n")
    with pytest.raises(ConfigError) as error:
        load_config(file)
    (problem,) = error.value.problems
    assert f"gateway.yaml:2: tracing.{key}: " in problem
    assert message in problem
    assert "hidden" not in problem


def test_headers_are_secrets(tmp_path: Path) -> None:
    found = config(headers="Authorization=Bearer secret-of-tests")
    assert "secret-of-tests" not in repr(found) + str(found.model_dump())


@pytest.mark.parametrize("headers", ["hidden", "=hidden", "a b=hidden", "a=hidden%0Ab", "a=hidden%C3%A9"])
def test_wrong_headers_are_refused_without_being_shown(tmp_path: Path, headers: str) -> None:
    (tmp_path / "headers").write_text(headers)
    for section in (f"headers: {headers!r}", f"headers_file: '{tmp_path / 'headers'}'"):
        file = tmp_path / "gateway.yaml"
        file.write_text(f"tracing:\n  {section}\n")
        with pytest.raises(ConfigError) as error:
            load_config(file)
        (problem,) = error.value.problems
        assert "tracing.headers" in problem
        assert "must " in problem
        assert "hidden" not in problem


def test_headers_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "headers").write_text("Authorization=Bearer%20t, x-team=a\n")
    plan = tracing_plan(config(headers_file=str(tmp_path / "headers")), {"OTEL_EXPORTER_OTLP_HEADERS": "a=b"})
    assert plan is not None
    assert plan.headers == {"Authorization": "Bearer t", "x-team": "a"}


def test_a_missing_package_is_named_at_start_and_by_a_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "api_gateway.observability.trace_encoding", None)
    with pytest.raises(StartupError, match=r"tracing.enabled: needs .* pip install 'api-gateway\[otel\]'"):
        tracing_plan(config())
    (finding,) = file_errors(config())
    assert "tracing.enabled: needs the package opentelemetry-proto" in str(finding)
    assert tracing_plan(from_values({})) is None


def test_every_result_has_a_series() -> None:
    assert set(RESULTS) == {"exported", "queue_full", "failed", "rejected"}
