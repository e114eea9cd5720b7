"""The pytest plugin, in a test suite of its own: gateways, tiers, faulty upstreams, and a clock that stands still."""

from importlib.metadata import entry_points

import pytest

from tests.measured import ROOT, coverage_variables

pytest_plugins = ["pytester"]

SUITE = """
import sys
import urllib.error
import urllib.request


def get(url, client="me"):
    request = urllib.request.Request(url, headers={"X-Client-ID": client})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read(), response.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(), error.headers


def test_the_gateway_is_not_imported_for_a_suite_that_does_not_use_it():
    assert not {"fastapi", "api_gateway.config", "uvicorn"} & sys.modules.keys()


def test_tiers_on_a_virtual_clock(start_gateway, faulty_upstream):
    users = faulty_upstream()
    gateway = start_gateway(
        upstreams={"users": users.url}, tiers={"FREE": {"rate": 1, "capacity": 2}}, virtual_clock=True
    )
    assert [get(f"{gateway.url}/api/users")[0] for _ in range(3)] == [200, 200, 429]
    gateway.advance(1)
    assert [get(f"{gateway.url}/api/users")[0] for _ in range(2)] == [200, 429]
    assert [request.target for request in users.requests] == ["/users"] * 3
    assert users.requests[0].headers["x-client-id"] == "me"


def test_what_has_no_effect_is_refused(start_gateway):
    import pytest

    from api_gateway.testing.faulty_upstream import Reply

    for wrong in ({"disconnect": "afterwards"}, {"pieces": 0}, {"delay": -1}):
        with pytest.raises(ValueError, match="disconnect must be|must be at least"):
            Reply(**wrong)
    with pytest.raises(ValueError, match="server.workers: a gateway in a test is one process"):
        start_gateway(server={"workers": 3})


def test_statuses_disconnects_and_slow_bodies(start_gateway, faulty_upstream):
    from api_gateway.testing.faulty_upstream import Reply

    flaky = faulty_upstream(
        Reply(status=503),
        Reply(body=b"abcdef", pieces=3, piece_delay=0.01, delay=0.01, headers={"X-From": "flaky"}),
        Reply(disconnect="before"),
    )
    gateway = start_gateway(upstreams={"flaky": {"targets": [flaky.url], "retry": {"attempts": 1}}})
    assert get(f"{gateway.url}/api/flaky")[0] == 503
    status, body, headers = get(f"{gateway.url}/api/flaky")
    assert (status, body, headers["X-From"]) == (200, b"abcdef", "flaky")
    assert get(f"{gateway.url}/api/flaky")[0] == 502
    flaky.script(Reply(body=b"again"))
    assert get(f"{gateway.url}/api/flaky")[1] == b"again"
    gateway.stop()
    gateway.stop()
"""

MEASURED = """
import sys

sys.path.insert(0, {root!r})
from tests.measured import measure_into

measure_into({data_file!r})
"""


def test_a_suite_of_its_own(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(SUITE)
    for data_file in coverage_variables().values():
        pytester.makeconftest(MEASURED.format(root=str(ROOT), data_file=data_file))
    is_installed = any(point.value == "api_gateway.testing.plugin" for point in entry_points(group="pytest11"))
    options = [] if is_installed else ["-p", "api_gateway.testing.plugin"]
    others = ("-p", "no:asyncio", "-p", "no:cacheprovider")
    result = pytester.runpytest_subprocess("-q", *others, "-W", "error", *options, timeout=150)
    result.assert_outcomes(passed=4)
