"""The metrics as Prometheus and OpenMetrics read them: made at scrape time from what the recorder has counted."""

from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from typing import get_args

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder

from api_gateway.errors import Reason
from api_gateway.eventloop.pacing import Steps
from api_gateway.metrics import OUTCOMES, RETRY_CAUSES, Recorder
from api_gateway.models import DecisionSource, LimiterState
from api_gateway.observability.latency_series import WindowedSeries
from api_gateway.reload.outcome import ReloadState
from api_gateway.reporting.metrics_view import UpstreamFigures
from api_gateway.reporting.prometheus_families import SingleMetric, duration_histogram, family_in_pieces, without_head
from api_gateway.resilience.breaker_policy import Mode, State
from api_gateway.resilience.fair_shares import ResourceState
from api_gateway.resilience.retry import RetryDenied

_AT_ZERO = dict.fromkeys(OUTCOMES, 0)
_FEW = 200  # routes and upstreams together
_OPENMETRICS = "application/openmetrics-text"
_END = b"# EOF\n"


class PrometheusExposition:
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
        self._are_few = len(recorder.routes) + len(recorder.upstreams) <= _FEW

    def render(self, accept: str) -> Steps[tuple[bytes, str]]:
        """Return the exposition text and its content type, OpenMetrics where `accept` asks for it."""
        encode, content_type = choose_encoder(accept)
        pieces, last = [], ""
        for metric in self.collect():
            piece = encode(SingleMetric(metric)).removesuffix(_END)
            pieces.append(without_head(piece) if metric.name == last else piece)
            last = metric.name
            yield
        end = _END if content_type.startswith(_OPENMETRICS) else b""
        return b"".join([*pieces, end]), content_type

    def collect(self) -> Iterator[Metric]:
        """Yield every metric family, a large one in pieces.

        Every series is there from the start, so that `increase()` sees its first event. Where there are more than
        `_FEW` routes and upstreams, the counters and histograms of each begin with its first request instead, so that
        a scrape is about as large as what is in use; states and modes are shown of all.
        """
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
        yield from family_in_pieces(
            CounterMetricFamily,
            "gateway_http_requests",
            "Proxied requests, by who made the answer.",
            ["route", "method", "code", "source", "tier"],
            ((map(str, key), count) for key, count in list(recorder.requests.items())),
        )
        yield GaugeMetricFamily("gateway_http_requests_in_flight", "Requests running now.", value=recorder.in_flight)
        yield from duration_histogram(
            "gateway_http_request_duration_seconds",
            "Time from request to the end of its answer, of requests that reached an upstream; bounds within 1 %.",
            "route",
            self._shown(recorder.routes),
        )
        rejections = CounterMetricFamily("gateway_rejections", "Answers made by the gateway.", labels=["reason"])
        for reason in Reason:
            rejections.add_metric([reason.value], recorder.rejections[reason.value])
        yield rejections
        rejected = CounterMetricFamily(
            "gateway_operator_rejections", "Requests to operator endpoints that were rejected.", labels=["reason"]
        )
        for label, count in recorder.operator_rejections.items():
            rejected.add_metric([label], count)
        yield rejected

    def _shown(self, series: Mapping[str, WindowedSeries]) -> list[tuple[str, WindowedSeries]]:
        return [(name, one) for name, one in series.items() if self._are_few or one.is_used]

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
            "gateway_rate_limit_settlements", "Costs settled after the decision.", labels=["result"]
        )
        for result, count in self._recorder.settlements.items():
            settlements.add_metric([result], count)
        yield settlements
        sources = CounterMetricFamily(
            "gateway_rate_limit_decisions_by_source",
            "Decisions of the rate limiter, by what they rest on.",
            labels=["decision_source"],
        )
        current = GaugeMetricFamily(
            "gateway_rate_limit_decision_source", "1 for what decisions rest on now.", labels=["decision_source"]
        )
        for source in get_args(DecisionSource):
            sources.add_metric([source], self._recorder.sources[source])
            current.add_metric([source], source == self._limiter.decision_source)
        yield sources
        yield current
        yield CounterMetricFamily(
            "gateway_store_failures",
            "Calls of the store without an answer in time, and attempts to connect.",
            value=self._limiter.failures,
        )
        yield CounterMetricFamily(
            "gateway_store_evicted_keys_total",
            "Keys the store has thrown out for want of memory since it began; a bucket among them is full again.",
            value=self._limiter.evicted_keys,
        )
        yield GaugeMetricFamily("gateway_rate_limit_buckets", "Buckets in memory.", value=self._buckets)

    def _upstream_families(self) -> Iterator[Metric]:
        yield from family_in_pieces(
            CounterMetricFamily,
            "gateway_upstream_requests",
            "Tries on upstreams, by class of status or cause of failure.",
            ["upstream", "outcome"],
            (
                ((name, outcome), count)
                for name, outcomes in list(self._recorder.outcomes.items())
                if self._is_used(name)
                for outcome, count in {**_AT_ZERO, **outcomes}.items()
            ),
        )
        yield from duration_histogram(
            "gateway_upstream_request_duration_seconds",
            "Time from a try to the head of its answer; bounds within 1 %.",
            "upstream",
            self._shown(self._recorder.upstreams),
        )
        yield from self._targets()

    def _targets(self) -> Iterator[Metric]:
        """Yield what is known of the targets there are now: the series of one that is gone end."""
        labels = ["upstream", "target"]
        targets = [
            ((name, key), target)
            for name, upstream in self._upstreams.items()
            for key, target in {target.key: target for target in upstream.targets}.items()
        ]
        passive = [(key, target.passive) for key, target in targets if target.passive is not None]
        yield from family_in_pieces(
            GaugeMetricFamily,
            "gateway_upstream_healthy",
            "1 while the target passes its health checks, 0 while it fails them; no series while none has come back.",
            labels,
            ((key, target.verdict) for key, target in targets if target.verdict is not None),
        )
        yield from family_in_pieces(
            GaugeMetricFamily,
            "gateway_upstream_ejected",
            "1 while live requests keep the target out of rotation.",
            labels,
            ((key, one.is_ejected) for key, one in passive),
        )
        yield from family_in_pieces(
            CounterMetricFamily,
            "gateway_upstream_ejections",
            "Times the target's own breaker opened.",
            labels,
            ((key, one.ejections_total) for key, one in passive),
        )

    def _retries(self) -> Iterator[Metric]:
        recorder = self._recorder
        used = [name for name in recorder.upstreams if self._is_used(name)]
        for name, words, closed, counts in (
            (
                "gateway_upstream_retries",
                "Repeated attempts, by why the attempt before failed.",
                RETRY_CAUSES,
                recorder.retries,
            ),
            (
                "gateway_upstream_retries_denied",
                "Failed attempts that were not repeated.",
                tuple(RetryDenied),
                recorder.retries_denied,
            ),
        ):
            known = dict.fromkeys((upstream, value) for upstream in used for value in closed)
            rows = [(map(str, key), counts[key]) for key in known | dict.fromkeys(counts)]
            yield from family_in_pieces(CounterMetricFamily, name, words, ["upstream", "reason"], rows)
        fallbacks = CounterMetricFamily(
            "gateway_fallbacks",
            "Fallbacks used, by who answered and the reason of the failure.",
            labels=["route", "fallback", "reason"],
        )
        for labels, count in recorder.fallbacks.items():
            fallbacks.add_metric(list(labels), count)
        yield fallbacks

    def _breakers(self) -> Iterator[Metric]:
        breakers = [(name, upstream.breaker) for name, upstream in self._upstreams.items()]
        used = [(name, breaker) for name, breaker in breakers if self._is_used(name)]
        yield from family_in_pieces(
            GaugeMetricFamily,
            "gateway_circuit_breaker_state",
            "1 for the state the breaker is in.",
            ["upstream", "state"],
            (((name, state.value.lower()), breaker.state is state) for name, breaker in breakers for state in State),
        )
        yield from family_in_pieces(
            GaugeMetricFamily,
            "gateway_circuit_breaker_mode",
            "1 for the mode an operator has it in.",
            ["upstream", "mode"],
            (((name, mode.value), breaker.mode is mode) for name, breaker in breakers for mode in Mode),
        )
        for key, words in (
            ("opened", "Times the breaker opened."),
            ("rejected", "Requests it refused."),
            ("slow_calls", "Calls that took slow_call_duration or longer."),
            ("would_open", "Times it would have opened, but was only observed."),
            ("would_reject", "Requests it would have refused, but was only observed."),
        ):
            figure = attrgetter(f"{key.removesuffix('_calls')}_total")
            rows = (((name,), figure(breaker)) for name, breaker in used)
            yield from family_in_pieces(
                CounterMetricFamily, f"gateway_circuit_breaker_{key}", words, ["upstream"], rows
            )

    def _is_used(self, upstream: str) -> bool:
        """Tell whether the series of an upstream are shown: it has had a request, or its breaker has changed."""
        if self._are_few or self._recorder.outcomes.get(upstream):
            return True
        if upstream not in self._upstreams:
            return False
        breaker = self._upstreams[upstream].breaker
        return bool(
            breaker.state is not State.CLOSED
            or breaker.mode is not Mode.AUTO
            or breaker.rejected_total
            or breaker.opened_total
        )

    def _overload(self) -> Iterator[Metric]:
        running = [(name, upstream.concurrency) for name, upstream in self._upstreams.items()]
        yield from family_in_pieces(
            GaugeMetricFamily,
            "gateway_upstream_concurrency_limit",
            "Requests that may be under way at once.",
            ["upstream"],
            (((name,), one.limit) for name, one in running if one.limit is not None),
        )
        yield from family_in_pieces(
            GaugeMetricFamily,
            "gateway_upstream_requests_in_flight",
            "Requests under way.",
            ["upstream"],
            (((name,), one.in_flight) for name, one in running if one.limit is not None or self._is_used(name)),
        )
        yield from family_in_pieces(
            CounterMetricFamily,
            "gateway_shed_requests",
            "Requests refused because too much was under way.",
            ["upstream", "tier"],
            (
                ((name, tier), count)
                for name, counts in list(self._recorder.shed.items())
                for tier, count in list(counts.items())
                if name not in self._upstreams or self._is_used(name)
            ),
        )
        yield GaugeMetricFamily("gateway_event_loop_lag_seconds", "How late the event loop runs.", value=self._lag)
        yield GaugeMetricFamily("gateway_event_loop_tasks", "Tasks the event loop has.", value=self._tasks)

    def _reloads(self) -> Iterator[Metric]:
        state = self._configuration
        yield GaugeMetricFamily(
            "gateway_config_last_reload_successful",
            "1 unless the last reload of the configuration failed.",
            value=state.is_successful,
        )
        yield GaugeMetricFamily(
            "gateway_config_last_reload_success_timestamp_seconds",
            "When the configuration in force was read.",
            value=state.loaded_at,
        )
        reloads = CounterMetricFamily(
            "gateway_config_reloads", "Reloads of the configuration, by result.", labels=["result"]
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
        resources = [
            ((one.resource, one.upstream or ""), one)
            for one in self._resources
            if one.upstream is None or one.in_use or one.refused or self._is_used(one.upstream)
        ]
        yield from family_in_pieces(
            GaugeMetricFamily,
            "gateway_resource_used_ratio",
            "Share of a bounded resource that is in use, 0 to 1.",
            labels,
            ((key, one.in_use / one.limit if one.limit else 0.0) for key, one in resources),
        )
        yield from family_in_pieces(
            CounterMetricFamily,
            "gateway_resource_rejections",
            "What got no place, or exceeded an address's or client's share.",
            labels,
            ((key, one.refused) for key, one in resources),
        )
