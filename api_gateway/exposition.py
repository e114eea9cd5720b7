"""The metrics as Prometheus and OpenMetrics read them: made at scrape time from what the recorder has counted."""

from collections.abc import Iterator, Mapping, Sequence
from typing import get_args

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder

from api_gateway.breaker_policy import Mode, State
from api_gateway.errors import Reason
from api_gateway.metrics import OUTCOMES, RETRY_CAUSES, Recorder, Tally, UpstreamFigures, value_of
from api_gateway.models import LimiterState, Source
from api_gateway.reload_state import ReloadState
from api_gateway.retry import Why
from api_gateway.shares import ResourceState

# The bounds OpenTelemetry advises for http.server.request.duration, in seconds.
DURATION_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)


class Exposition:
    """A Prometheus collector that reads the recorder and the live objects at scrape time."""

    def __init__(
        self,
        recorder: Recorder,
        upstreams: Mapping[str, UpstreamFigures],
        limiter: LimiterState,
        buckets: int,
        version: str,
        lag: float = 0.0,
        tasks: int = 0,
        resources: Sequence[ResourceState] = (),
        configuration: ReloadState = ReloadState(),  # noqa: B008 - it is frozen
    ) -> None:
        self._recorder = recorder
        self._upstreams = upstreams
        self._limiter = limiter
        self._buckets = buckets
        self._version = version
        self._lag = lag
        self._tasks = tasks
        self._configuration = configuration
        self._resources = resources
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def render(self, accept: str) -> tuple[bytes, str]:
        """Return the exposition text and its content type, OpenMetrics where `accept` asks for it."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    def collect(self) -> Iterator[Metric]:
        """Yield every metric family."""
        yield InfoMetricFamily("gateway_build", "The gateway's version.", value={"version": self._version})
        yield from self._requests()
        yield from self._limits()
        yield from self._upstream_families()
        yield from self._retries()
        yield from self._breakers()
        yield from self._overload()
        yield from self._output()
        yield from self._reloads()
        yield from self._shares()

    def _requests(self) -> Iterator[Metric]:
        recorder = self._recorder
        requests = CounterMetricFamily(
            "gateway_http_requests",
            "Proxied requests, by who made the answer.",
            labels=["route", "method", "code", "source", "tier"],
        )
        for (route, method, status, source, tier), count in recorder.requests.items():
            requests.add_metric([route, method, str(status), source, tier], count)
        yield requests
        yield GaugeMetricFamily("gateway_http_requests_in_flight", "Requests running now.", value=recorder.in_flight)
        durations = HistogramMetricFamily(
            "gateway_http_request_duration_seconds",
            "Time from request to the end of its answer, of requests that reached an upstream; bounds within 1 %.",
            labels=["route"],
        )
        for name, series in recorder.routes.items():
            durations.add_metric([name], _classic(series.total), sum_value=series.total.total_seconds)
        yield durations
        rejections = CounterMetricFamily("gateway_rejections", "Answers made by the gateway.", labels=["reason"])
        for reason in Reason:
            rejections.add_metric([reason.value], recorder.rejections[reason.value])
        yield rejections
        refusals = CounterMetricFamily(
            "gateway_operator_refusals", "Requests to operator endpoints that were refused.", labels=["cause"]
        )
        for cause, count in recorder.operator_refusals.items():
            refusals.add_metric([cause], count)
        yield refusals

    def _limits(self) -> Iterator[Metric]:
        decisions = CounterMetricFamily(
            "gateway_rate_limit_decisions", "Decisions of the rate limiter.", labels=["tier", "decision"]
        )
        for decision, counts in (("allowed", self._recorder.allowed), ("limited", self._recorder.limited)):
            for tier, count in counts.items():
                decisions.add_metric([tier, decision], count)
        yield decisions
        for name, words, by_tier in (
            (
                "gateway_rate_limit_would_limit",
                "Allowed requests a candidate would limit.",
                self._recorder.would_limit,
            ),
            (
                "gateway_rate_limit_would_allow",
                "Limited requests a candidate would allow.",
                self._recorder.would_allow,
            ),
        ):
            family = CounterMetricFamily(name, words, labels=["tier"])
            for tier, count in by_tier.items():
                family.add_metric([tier], count)
            yield family
        settlements = CounterMetricFamily(
            "gateway_rate_limit_settlements", "Costs settled after the decision.", labels=["kind"]
        )
        for kind, count in self._recorder.settlements.items():
            settlements.add_metric([kind], count)
        yield settlements
        sources = CounterMetricFamily(
            "gateway_rate_limit_decision_sources", "Decisions by what they rest on.", labels=["source"]
        )
        modes = GaugeMetricFamily("gateway_rate_limit_mode", "1 for what decisions rest on now.", labels=["mode"])
        for source in get_args(Source):
            sources.add_metric([source], self._recorder.sources[source])
            modes.add_metric([source], source == self._limiter.mode)
        yield sources
        yield modes
        yield CounterMetricFamily(
            "gateway_store_failures",
            "Calls of the store without an answer in time, and attempts to connect.",
            value=self._limiter.failures,
        )
        yield GaugeMetricFamily(
            "gateway_store_evicted_keys",
            "Keys the store has thrown out for want of memory since it began; a bucket among them is full again.",
            value=self._limiter.evicted_keys,
        )
        yield GaugeMetricFamily("gateway_rate_limit_buckets", "Buckets in memory.", value=self._buckets)

    def _upstream_families(self) -> Iterator[Metric]:
        tries = CounterMetricFamily(
            "gateway_upstream_requests",
            "Tries on upstreams, by class of status or cause of failure.",
            labels=["upstream", "outcome"],
        )
        for name, outcomes in self._recorder.outcomes.items():
            for outcome in dict.fromkeys((*OUTCOMES, *outcomes)):
                tries.add_metric([name, outcome], outcomes[outcome])
        yield tries
        durations = HistogramMetricFamily(
            "gateway_upstream_request_duration_seconds",
            "Time from a try to the head of its answer; bounds within 1 %.",
            labels=["upstream"],
        )
        for name, series in self._recorder.upstreams.items():
            durations.add_metric([name], _classic(series.total), sum_value=series.total.total_seconds)
        yield durations
        yield from self._targets()

    def _targets(self) -> Iterator[Metric]:
        """Yield what is known of the targets there are now: the series of one that is gone end."""
        labels = ["upstream", "target"]
        healthy = GaugeMetricFamily(
            "gateway_upstream_healthy",
            "1 while the target passes its health checks, 0 while it fails them; no series while none has come back.",
            labels=labels,
        )
        ejected = GaugeMetricFamily(
            "gateway_upstream_ejected", "1 while live requests keep the target out of rotation.", labels=labels
        )
        ejections = CounterMetricFamily(
            "gateway_upstream_ejections", "Times the target's own breaker opened.", labels=labels
        )
        for name, upstream in self._upstreams.items():
            for key, target in {target.key: target for target in upstream.targets}.items():
                if target.verdict is not None:
                    healthy.add_metric([name, key], target.verdict)
                if target.passive is not None:
                    ejected.add_metric([name, key], target.passive.is_ejected)
                    ejections.add_metric([name, key], target.passive.ejections_total)
        yield healthy
        yield ejected
        yield ejections

    def _retries(self) -> Iterator[Metric]:
        recorder = self._recorder
        for name, words, label, closed, counts in (
            (
                "gateway_retries",
                "Repeated tries, by what the last failed with.",
                "cause",
                RETRY_CAUSES,
                recorder.retries,
            ),
            ("gateway_retries_denied", "Failed tries not repeated.", "why", tuple(Why), recorder.retries_denied),
        ):
            family = CounterMetricFamily(name, words, labels=["upstream", label])
            known = dict.fromkeys((upstream, value) for upstream in recorder.upstreams for value in closed)
            for key in known | dict.fromkeys(counts):
                family.add_metric([str(value) for value in key], counts[key])
            yield family
        fallbacks = CounterMetricFamily(
            "gateway_fallbacks",
            "Fallbacks used, by who answered and the reason of the failure.",
            labels=["route", "fallback", "reason"],
        )
        for labels, count in recorder.fallbacks.items():
            fallbacks.add_metric(list(labels), count)
        yield fallbacks

    def _breakers(self) -> Iterator[Metric]:
        states = GaugeMetricFamily(
            "gateway_circuit_breaker_state",
            "1 for the state the breaker is in.",
            labels=["upstream", "state"],
        )
        modes = GaugeMetricFamily(
            "gateway_circuit_breaker_mode", "1 for the mode an operator has it in.", labels=["upstream", "mode"]
        )
        for name, upstream in self._upstreams.items():
            for state in State:
                states.add_metric([name, state.value.lower()], upstream.breaker.state is state)
            for mode in Mode:
                modes.add_metric([name, mode.value], upstream.breaker.mode is mode)
        yield states
        yield modes
        for key, words in (
            ("opened", "Times the breaker opened."),
            ("rejected", "Requests it refused."),
            ("slow_calls", "Calls that took slow_call_duration or longer."),
            ("would_open", "Times it would have opened, but was only observed."),
            ("would_reject", "Requests it would have refused, but was only observed."),
        ):
            family = CounterMetricFamily(f"gateway_circuit_breaker_{key}", words, labels=["upstream"])
            for name, upstream in self._upstreams.items():
                family.add_metric([name], getattr(upstream.breaker, f"{key.removesuffix('_calls')}_total"))
            yield family

    def _overload(self) -> Iterator[Metric]:
        limits = GaugeMetricFamily(
            "gateway_concurrency_limit", "Requests that may be under way at once.", labels=["upstream"]
        )
        in_flight = GaugeMetricFamily("gateway_concurrency_in_flight", "Requests under way.", labels=["upstream"])
        for name, upstream in self._upstreams.items():
            if upstream.concurrency.limit is not None:
                limits.add_metric([name], upstream.concurrency.limit)
            in_flight.add_metric([name], upstream.concurrency.in_flight)
        yield limits
        yield in_flight
        shed = CounterMetricFamily(
            "gateway_shed", "Requests refused because too much was under way.", labels=["upstream", "tier"]
        )
        for name, counts in self._recorder.shed.items():
            for tier, count in counts.items():
                shed.add_metric([name, tier], count)
        yield shed
        yield GaugeMetricFamily("gateway_event_loop_lag_seconds", "How late the event loop runs.", value=self._lag)
        yield GaugeMetricFamily("gateway_event_loop_tasks", "Tasks the event loop has.", value=self._tasks)

    def _reloads(self) -> Iterator[Metric]:
        state = self._configuration
        yield GaugeMetricFamily(
            "gateway_config_reload_success",
            "1 unless the last reload of the configuration failed.",
            value=state.is_successful,
        )
        yield GaugeMetricFamily(
            "gateway_config_reload_last_success_timestamp_seconds",
            "When the configuration in force was read.",
            value=state.loaded_at,
        )
        reloads = CounterMetricFamily(
            "gateway_config_reload", "Reloads of the configuration, by result.", labels=["result"]
        )
        for result, count in state.counts.items():
            reloads.add_metric([result], count)
        yield reloads

    def _output(self) -> Iterator[Metric]:
        for name, words, counts in (
            ("gateway_output_dropped_lines", "Lines of the gateway's own not written.", self._recorder.dropped_lines),
            ("gateway_output_write_errors", "Failed writes of such lines.", self._recorder.write_errors),
        ):
            family = CounterMetricFamily(name, words, labels=["stream"])
            for stream, count in counts.items():
                family.add_metric([stream], count)
            yield family

    def _shares(self) -> Iterator[Metric]:
        labels = ["resource", "upstream"]
        used = GaugeMetricFamily(
            "gateway_resource_used_ratio", "Share of a bounded resource that is in use, 0 to 1.", labels=labels
        )
        refused = CounterMetricFamily(
            "gateway_resource_refused", "What got no place, or exceeded an address's or client's share.", labels=labels
        )
        for resource in self._resources:
            values = [resource.resource, resource.upstream or ""]
            used.add_metric(values, resource.in_use / resource.limit if resource.limit else 0.0)
            refused.add_metric(values, resource.refused)
        yield used
        yield refused


def _classic(tally: Tally) -> list[tuple[str, float]]:
    """Fold logarithmic buckets into the cumulative ones of a classic histogram."""
    cumulative: list[tuple[str, float]] = [
        (str(bound), sum(count for bucket, count in tally.buckets.items() if value_of(bucket) <= bound))
        for bound in DURATION_BOUNDS
    ]
    return [*cumulative, ("+Inf", sum(tally.buckets.values()))]
