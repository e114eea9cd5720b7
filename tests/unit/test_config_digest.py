"""The hash of the configuration in force, by which machines are compared, and the first samples of metrics."""

import pytest
from pydantic import SecretStr

from api_gateway.config import from_values
from api_gateway.metrics import Recorder
from api_gateway.reload.outcome import ReloadOutcome, ReloadResult, ReloadState
from api_gateway.reload.reloader import Reloader
from api_gateway.reload.serialization import digest_of
from api_gateway.reporting.process_figures import FIGURES
from api_gateway.reporting.prometheus import PrometheusExposition
from api_gateway.reporting.snapshot import WorkerSnapshot
from api_gateway.settings.diagnostics import ConfigError
from tests.unit.test_surface import labels_of

ONE = {"upstreams": {"up": {"targets": [{"url": "http://127.0.0.1:1"}]}}}


def test_the_digest_depends_on_settings_and_not_on_the_machine() -> None:
    digest = digest_of(from_values(ONE))
    assert len(digest) == 16
    assert digest == digest_of(from_values(ONE | {"state_dir": "/elsewhere"}))
    assert digest != digest_of(from_values(ONE | {"default_tier": "BASIC"}))


def test_the_digest_tells_nothing_of_secrets() -> None:
    tokens = [from_values(ONE | {"admin": {"token": SecretStr(letter * 40)}}) for letter in "ab"]
    assert digest_of(tokens[0]) == digest_of(tokens[1]) != digest_of(from_values(ONE))


async def test_the_digest_follows_reloads_that_succeed() -> None:
    first, second = from_values(ONE), from_values(ONE | {"default_tier": "BASIC"})

    async def apply(_: object) -> None:
        pass

    reloader = Reloader(first, lambda: second, apply, wall_clock=lambda: 1.0)
    assert reloader.state.digest == digest_of(first)
    await reloader.reload("a test")
    assert reloader.state.digest == digest_of(second)

    def broken() -> None:
        raise ConfigError(["wrong"])

    reloader._read = broken  # type: ignore[assignment]  # it raises
    await reloader.reload("a test")
    assert (reloader.state.digest, reloader.state.is_successful) == (digest_of(second), False)
    assert ReloadState().after(ReloadOutcome(ReloadResult.SUCCESS), 2.0, "a test", "x").digest == "x"


@pytest.mark.parametrize("routes", [[], ["one"]])
def test_each_family_without_labels_has_a_sample_from_the_start(routes: list[str]) -> None:
    snapshot = WorkerSnapshot("", Recorder(routes, routes, [], [50], 0.0), process=dict.fromkeys(FIGURES, 0.0))
    samples: dict[str, int] = {}
    unlabelled = set()
    for family in PrometheusExposition(snapshot, "0").collect():
        samples[family.name] = samples.get(family.name, 0) + len(family.samples)
        if not labels_of(family):
            unlabelled.add(family.name)
    assert len(unlabelled) > 10
    assert {name for name in unlabelled if not samples[name]} == set()
