"""Logs for people and for programs: short lines, inert whatever peers send, and JSON with chosen fields."""

import json
import logging
import random
from typing import Any

import pytest
from pydantic import ValidationError

from api_gateway.config import GatewayConfig
from api_gateway.models import Client, Decision, Exchange, Quota, Trace
from api_gateway.observability.access_log import LINE_FIELDS, AccessLog
from api_gateway.observability.selected_lines import sampled, with_fields
from api_gateway.observability.text_log import MAX_VALUE, TextLog
from api_gateway.printable_text import printable
from api_gateway.process.message_log import JsonFormatter, TextFormatter
from tests.cases import each

HOSTILE = "a\x1b[31mred\r\nforged line\x00\u202egnp.exe\u2028<script>alert(1)</script>"
QUOTA = Quota.per_second("FREE", 1, 10)


def exchange(**fields: Any) -> Exchange:
    client = Client("acme", "client:acme", QUOTA, "default")
    one = Exchange("id-1", "GET", "/api/users/1", "192.0.2.7", 100.0, client, "users", "users", "http://10.0.0.1")
    one.decision = Decision(client.key, QUOTA, True, 9, 0, 0)
    one.status, one.source, one.attempts = 200, "upstream", 1
    one.finished = 100.0125
    for name, value in fields.items():
        setattr(one, name, value)
    return one


def line_of(**fields: Any) -> str:
    return TextLog().line(exchange(**fields), 0.0)


def test_a_line_is_short() -> None:
    time, rest = line_of().split("  ", 1)
    assert len(time) == len("12:00:00.000")
    assert rest == "200  GET  /api/users/1  12.5 ms  acme (FREE)  -> users\n"


def test_a_refusal_has_its_reason_and_the_id_of_the_request() -> None:
    refused = line_of(
        status=429, source="gateway", reason="rate_limited", detail="too many", upstream=None, attempts=0
    )
    assert refused.endswith("429  GET  /api/users/1  12.5 ms  acme (FREE)  -  rate_limited: too many  [id-1]\n")
    trace = Trace()
    trace.fields = b"\r\ntraceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    assert line_of(reason="rate_limited", trace=trace).endswith("  [id-1 trace 0af7651916cd43dd8448eb211c80319c]\n")
    assert "3 attempts" in line_of(attempts=3)
    assert "  -  -> users" in line_of(client=None)


@each("field", ["path", "detail", "id"])
def test_a_line_is_inert(field: str) -> None:
    line = line_of(**{"reason": "upstream_reset", "detail": "x", field: HOSTILE})
    assert line.endswith("\n")
    assert line[:-1].isprintable()
    assert "\\x1b[31mred\\r\\nforged line" in line


@pytest.mark.parametrize("field", ["path", "detail"])
def test_a_line_stays_short_whatever_a_client_sends(field: str) -> None:
    line = line_of(**{"reason": "no_route", "detail": "x", field: "/\x1b" * 30_000})
    assert len(line) < 700
    assert line[:-1].isprintable()
    assert "..." in line


def test_no_part_of_a_secret_is_left_where_a_path_is_shortened() -> None:
    lines: list[str] = []
    for length in range(MAX_VALUE - 20, MAX_VALUE + 2):
        log = TextLog(lambda text: text.replace("secret", "-"))
        lines.append(log.line(exchange(path="/" * length + "secret" * 4), 0.0))
    assert not any("s" in line.split("/", 1)[1].split("  ")[0] for line in lines)


def test_what_is_printable_stays() -> None:
    assert printable("Größe 日本 €") == "Größe 日本 €"
    assert printable("a\tb") == "a\\tb"


def test_a_line_in_json_has_the_chosen_fields_in_their_order() -> None:
    line = with_fields(AccessLog().line, frozenset({"status", "path", "time"}))
    assert line(exchange(), 0.0) == '{"time":"1970-01-01T00:00:00.000+00:00","path":"/api/users/1","status":200}\n'


def test_the_list_of_fields_is_that_of_a_line() -> None:
    names = list(json.loads(AccessLog().line(exchange(), 0.0)))
    assert [name for name in LINE_FIELDS if name in names] == names
    assert set(LINE_FIELDS) - set(names) == {"has_keys", "organisation", "credential_check", "trace_id"}


def test_successes_are_sampled_and_errors_are_not() -> None:
    written: list[int] = []
    write = sampled(lambda one, _: written.append(one.status), 0.1, random.Random(1).random)
    for _ in range(1000):
        for fields in ({"status": 200}, {"status": 404}, {"status": 503}, {"status": 201, "reason": "upstream_reset"}):
            write(exchange(**fields), 0.0)
    assert [written.count(status) for status in (404, 503, 201)] == [1000] * 3
    assert 60 < written.count(200) < 140


def record(message: str, *arguments: object, exc_info: Any = None) -> logging.LogRecord:
    return logging.LogRecord("api_gateway.test", logging.WARNING, "file", 1, message, arguments, exc_info)


def test_a_message_is_inert_in_text_and_whole_in_json() -> None:
    text = TextFormatter("worker 1: ").format(record("upstream says %s", HOSTILE))
    assert text.isprintable()
    assert "WARNING worker 1: api_gateway.test: upstream says a\\x1b[31mred" in text
    line = json.loads(JsonFormatter("worker 1: ").format(record("upstream says %s", HOSTILE)))
    assert line["message"] == f"upstream says {HOSTILE}"
    assert (line["level"], line["logger"], line["process"]) == ("warning", "api_gateway.test", "worker 1")
    assert "process" not in json.loads(JsonFormatter("").format(record("x")))


def test_a_traceback_is_inert_too() -> None:
    error = ValueError(HOSTILE)
    failed = record("failed", exc_info=(type(error), error, None))
    lines = TextFormatter("").format(failed).split("\n")
    assert all(line.isprintable() for line in lines)
    assert lines[1].startswith("ValueError: a\\x1b[31mred")
    found = json.loads(JsonFormatter("").format(failed))
    assert found["message"] == "failed"
    assert "ValueError: a" in found["traceback"]


@each(
    ("log", "place"),
    [
        ({"format": "xml"}, "log.format"),
        ({"fields": ["status", "colour"]}, "log.fields.1"),
        ({"fields": []}, "log.fields"),
        ({"sample_successes": 1.5}, "log.sample_successes"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_place(log: dict[str, Any], place: str) -> None:
    with pytest.raises(ValidationError) as raised:
        GatewayConfig.model_validate({"log": log})
    assert ".".join(map(str, raised.value.errors()[0]["loc"])) == place
