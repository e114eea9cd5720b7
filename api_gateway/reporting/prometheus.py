"""Rendering of the metrics in the Prometheus text format and in OpenMetrics, at scrape time.

Long because it has the names, labels and descriptions of all metrics, each once.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from platform import python_version
from typing import Any, get_args

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder

from api_gateway.errors import Reason
from api_gateway.eventloop.steps import Steps
from api_gateway.metrics import ATTEMPT_RESULTS, DURATION_BOUNDS, RETRY_CAUSES
from api_gateway.models import DecisionSource
from api_gateway.observability.latency_series import WindowedSeries
from api_gateway.reporting.prometheus_families import (
    SingleMetric,
    access_families,
    duration_histogram,
    family_in_pieces,
    history_families,
    hook_families,
    limit_families,
    mirror_families,
    process_families,
    tls_families,
    trace_families,
    without_head,
)
from api_gateway.reporting.snapshot import WorkerSnapshot
from api_gateway.resilience.breaker_policy import Mode, State
from api_gateway.resilience.retry import RetryDenied
from api_gateway.system.build import variant

_AT_ZERO = dict.fromkeys(ATTEMPT_RESULTS, 0)
# Routes plus upstreams up to which all series are shown from the start; a scrape then has at most about 0.9 MB. Above,
# a route and an upstream together have about 1 KB, most of it in the bounds of the route's histogram.
MAX_DETAILED = 300
_FEW_BOUNDS = (0.1, 2.5)  # seconds, of histograms above MAX_DETAILED; the alert GatewaySlow needs the last
_OPENMETRICS = "application/openmetrics-text"
_END = b"# EOF\n"


class PrometheusExposition:
    """A Prometheus collector over one snapshot."""

    def __init__(self, snapshot: WorkerSnapshot, version: str) -> None:
        self._snapshot = snapshot
        self._version = version
        self._recorder = recorder = snapshot.recorder
        self._upstreams = snapshot.upstreams
        self._is_detailed = len(recorder.routes) + len(recorder.upstreams) <= MAX_DETAILED

    def render(self, accept: str) -> Steps[tuple[bytes, str]]:
        """Return the text and its content type, in steps; OpenMetrics if `accept`, a field value, requests it."""
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
        """Yield every metric family, large ones in pieces.

        Every series exists from the start, so that `increase()` counts its first event. With more than
        `MAX_DETAILED` routes and upstreams the size of a scrape is limited instead. Series of a route, upstream or
        target are then omitted while they are 0 (except `gateway_upstream_healthy`), and the mode `auto` is; routes
        have histograms with few bounds, and upstreams have the number and the sum of their durations only.
        """
        build = {"version": self._version, "python": python_version(), "variant": variant()}
        yield InfoMetricFamily("gateway_build", "The gateway's version, and what runs it.", value=build)
        yield from self._requests()
        yield from self._limits()
        yield from self._upstream_families()
        yield from self._retries()
        yield from self._breakers()
        yield from self._overload()
        yield from self._process()
        yield from self._reloads()
        yield from self._shares()
        yield from hook_families(self._recorder)
        yield from mirror_families(self._recorder)
        yield from trace_families(self._recorder)
        yield from tls_families(self._recorder, self._snapshot.tls)
        yield from process_families(self._snapshot.process)

    def _requests(self) -> Iterator[Metric]:
        recorder = self._recorder
        yield from family_in_pieces(
            CounterMetricFamily,
            "gateway_http_requests",
            "Proxied requests, by source of the response.",
            ["route", "method", "code", "source", "tier"],
            ((map(str, key), count) for key, count in list(recorder.requests.items())),
        )
        yield GaugeMetricFamily("gateway_http_requests_in_flight", "Requests in flight.", value=recorder.in_flight)
        yield from duration_histogram(
            "gateway_http_request_duration_seconds",
            "Time from the request to the end of its response, if it reached an upstream; within 1 %.",
            "route",
            self._shown(recorder.routes),
            DURATION_BOUNDS if self._is_detailed else _FEW_BOUNDS,
            recorder.exemplars,
        )
        for name, words, figure in (
            ("request", "Bytes of request bodies.", attrgetter("bytes_in")),
            ("response", "Bytes of response bodies.", attrgetter("bytes_out")),
        ):
            rows = (((route,), series.sum_of(figure)) for route, series in recorder.routes.items())
            yield from self._family(CounterMetricFamily, f"gateway_http_{name}_body_bytes", words, ["route"], rows)
        refusals = CounterMetricFamily(
            "gateway_refusals", "Responses generated by the gateway, by reason.", labels=["reason"]
        )
        counts = recorder.refusals
        for reason in Reason:
            refusals.add_metric([reason.value], counts[reason.value])
        yield refusals
        yield from access_families(recorder)

    def _shown(self, series: Mapping[str, WindowedSeries]) -> list[tuple[str, WindowedSeries]]:
        return [(name, one) for name, one in series.items() if self._is_detailed or one.is_used]

    def _family(
        self,
        kind: Callable[..., Any],
        name: str,
        words: str,
        labels: Sequence[str],
        rows: Iterable[tuple[Iterable[str], float]],
    ) -> Iterator[Metric]:
        """Yield a family of routes, upstreams or targets in pieces; see `collect` for the rows that it has."""
        shown = rows if self._is_detailed else (row for row in rows if row[1])
        return family_in_pieces(kind, name, words, labels, shown)

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
                "gateway_rate_limit_would_refuse",
                "Allowed requests that a candidate would have refused.",
                self._recorder.would_refuse,
            ),
            (
                "gateway_rate_limit_would_allow",
                "Refused requests that a candidate would have allowed.",
                self._recorder.would_allow,
            ),
        ):
            family = CounterMetricFamily(name, words, labels=["tier"])
            for tier, count in by_tier.items():
                family.add_metric([tier], count)
            yield family
        yield from limit_families(self._recorder)
        settlements = CounterMetricFamily(
            "gateway_rate_limit_settlements", "Costs settled after the response.", labels=["result"]
        )
        for result, count in self._recorder.settlements.items():
            settlements.add_metric([result], count)
        yield settlements
        sources = CounterMetricFamily(
            "gateway_rate_limit_decisions_by_source",
            "Decisions of the rate limiter, by source.",
            labels=["decision_source"],
        )
        current = GaugeMetricFamily(
            "gateway_rate_limit_decision_source", "1 for the current source of decisions.", labels=["decision_source"]
        )
        for source in get_args(DecisionSource):
            sources.add_metric([source], self._recorder.sources[source])
            current.add_metric([source], source == self._snapshot.limiter.decision_source)
        yield sources
        yield current
        yield CounterMetricFamily(
            "gateway_store_failures",
            "Calls of the store without a response in time, and failed attempts to connect.",
            value=self._snapshot.limiter.failures,
        )
        yield CounterMetricFamily(
            "gateway_store_evicted_keys_total",
            "Keys that the store has evicted since it started; the bucket of an evicted key is full again.",
            value=self._snapshot.limiter.evicted_keys,
        )
        yield GaugeMetricFamily("gateway_rate_limit_buckets", "Buckets in memory.", value=self._snapshot.buckets)

    def _upstream_families(self) -> Iterator[Metric]:
        known = _AT_ZERO if self._is_detailed else {}
        yield from self._family(
            CounterMetricFamily,
            "gateway_upstream_requests",
            "Attempts, by the class of the status or the reason of the failure.",
            ["upstream", "result"],
            (
                ((name, result), count)
                for name, results in list(self._recorder.attempt_results.items())
                for result, count in {**known, **results}.items()
            ),
        )
        yield from duration_histogram(
            "gateway_upstream_request_duration_seconds",
            "Time from an attempt to the head of its response; within 1 %.",
            "upstream",
            self._shown(self._recorder.upstreams),
            DURATION_BOUNDS if self._is_detailed else (),
        )
        yield from self._targets()

    def _targets(self) -> Iterator[Metric]:
        """Yield the metrics of the current targets; the series of a removed target end."""
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
            "1 while the target passes its health checks, 0 while it fails them; absent before the first result.",
            labels,
            ((key, target.health) for key, target in targets if target.health is not None),
        )
        yield from self._family(
            GaugeMetricFamily,
            "gateway_upstream_ejected",
            "1 while outlier detection has ejected the target.",
            labels,
            ((key, one.is_ejected) for key, one in passive),
        )
        yield from self._family(
            CounterMetricFamily,
            "gateway_upstream_ejections",
            "Ejections of the target by outlier detection.",
            labels,
            ((key, one.ejections_total) for key, one in passive),
        )

    def _retries(self) -> Iterator[Metric]:
        recorder = self._recorder
        upstreams = list(recorder.upstreams) if self._is_detailed else []
        for name, words, closed, counts in (
            (
                "gateway_upstream_retries",
                "Repeated attempts, by the reason or the status of the failure before.",
                RETRY_CAUSES,
                recorder.retries,
            ),
            (
                "gateway_upstream_retries_denied",
                "Failed attempts that were not retried.",
                tuple(RetryDenied),
                recorder.retries_denied,
            ),
        ):
            known = dict.fromkeys((upstream, value) for upstream in upstreams for value in closed)
            rows = [(map(str, key), counts[key]) for key in known | dict.fromkeys(counts)]
            yield from family_in_pieces(CounterMetricFamily, name, words, ["upstream", "reason"], rows)
        fallbacks = CounterMetricFamily(
            "gateway_fallbacks",
            "Fallbacks used, by what responded and the reason of the failure.",
            labels=["route", "fallback", "reason"],
        )
        for labels, count in recorder.fallbacks.items():
            fallbacks.add_metric(list(labels), count)
        yield fallbacks
        yield from family_in_pieces(
            CounterMetricFamily,
            "gateway_illegal_exchange_events",
            "Events that the state of an exchange did not allow; each aborts that exchange.",
            ["phase", "event"],
            recorder.illegal_exchange_events.items(),
        )
        yield from family_in_pieces(
            CounterMetricFamily,
            "gateway_issuer_key_fetches",
            "Fetches of the keys of issuers of tokens.",
            ["issuer", "result"],
            recorder.key_fetches.items(),
        )
        yield from family_in_pieces(
            GaugeMetricFamily,
            "gateway_issuer_keys",
            "Keys of issuers of tokens in use; of several workers, the fewest.",
            ["issuer"],
            (((name,), issuer.keys) for name, issuer in self._snapshot.issuers.items()),
        )

    def _breakers(self) -> Iterator[Metric]:
        breakers = [(name, upstream.breaker) for name, upstream in self._upstreams.items()]
        yield from self._family(
            GaugeMetricFamily,
            "gateway_circuit_breaker_state",
            "1 for the state of the breaker.",
            ["upstream", "state"],
            (((name, state.value.lower()), breaker.state is state) for name, breaker in breakers for state in State),
        )
        modes = [mode for mode in Mode if self._is_detailed or mode is not Mode.AUTO]
        yield from self._family(
            GaugeMetricFamily,
            "gateway_circuit_breaker_mode",
            "1 for the mode of the breaker.",
            ["upstream", "mode"],
            (((name, mode.value), breaker.mode is mode) for name, breaker in breakers for mode in modes),
        )
        for key, words in (
            ("opened", "Times the breaker opened."),
            ("rejected", "Requests that the breaker rejected."),
            ("slow_calls", "Calls that took slow_call_duration or longer."),
            ("would_open", "Times the breaker would have opened, in mode observe."),
            ("would_reject", "Requests that the breaker would have rejected, in mode observe."),
        ):
            figure = attrgetter(f"{key.removesuffix('_calls')}_total")
            rows = (((name,), figure(breaker)) for name, breaker in breakers)
            yield from self._family(CounterMetricFamily, f"gateway_circuit_breaker_{key}", words, ["upstream"], rows)

    def _overload(self) -> Iterator[Metric]:
        running = [(name, upstream.concurrency) for name, upstream in self._upstreams.items()]
        yield from self._family(
            GaugeMetricFamily,
            "gateway_upstream_concurrency_limit",
            "Requests that may be in flight.",
            ["upstream"],
            (((name,), one.limit) for name, one in running if one.limit is not None),
        )
        yield from self._family(
            GaugeMetricFamily,
            "gateway_upstream_requests_in_flight",
            "Requests in flight.",
            ["upstream"],
            (((name,), one.in_flight) for name, one in running),
        )
        yield from self._family(
            CounterMetricFamily,
            "gateway_shed_requests",
            "Requests refused by load shedding.",
            ["upstream", "tier"],
            (
                ((name, tier), count)
                for name, counts in list(self._recorder.shed.items())
                for tier, count in list(counts.items())
            ),
        )
        lag, tasks = self._snapshot.lag, self._snapshot.tasks
        yield GaugeMetricFamily("gateway_event_loop_lag_seconds", "How late the event loop runs.", value=lag)
        yield GaugeMetricFamily("gateway_event_loop_tasks", "Tasks of the event loops.", value=tasks)

    def _reloads(self) -> Iterator[Metric]:
        state = self._snapshot.configuration
        yield InfoMetricFamily(
            "gateway_config",
            "The configuration in force: equal hashes are equal configurations, but for secrets and the state folder.",
            value={"hash": state.digest},
        )
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

    def _process(self) -> Iterator[Metric]:
        recorder = self._recorder
        for name, words, label, counts in (
            (
                "http_parsed_heads",
                "Request heads that the fast path did not read itself.",
                "parser",
                recorder.parsed_heads,
            ),
            ("illegal_events", "Defects that ended a client's connection.", "event", recorder.illegal_events),
            ("output_dropped_lines", "Lines of the gateway's output not written.", "stream", recorder.dropped_lines),
            ("output_write_errors", "Failed writes of the gateway's own output.", "stream", recorder.write_errors),
        ):
            family = CounterMetricFamily(f"gateway_{name}", words, labels=[label])
            for value, count in counts.items():
                family.add_metric([value], count)
            yield family
        writes = GaugeMetricFamily(
            "gateway_state_last_write_successful",
            "1 unless the last write to the state folder failed, by kind of state.",
            labels=["state"],
        )
        for state, error in self._snapshot.unwritten.items():
            writes.add_metric([state], error is None)
        yield writes
        yield from history_families(self._snapshot.history, self._snapshot.recorder.requests_not_kept)

    def _shares(self) -> Iterator[Metric]:
        labels = ["resource", "upstream"]
        resources = [((one.resource, one.upstream or ""), one) for one in self._snapshot.resources]
        yield from self._family(
            GaugeMetricFamily,
            "gateway_resource_used_ratio",
            "Used share of a bounded resource, 0 to 1; of several workers, that of the fullest.",
            labels,
            ((key, one.used_ratio) for key, one in resources),
        )
        yield from self._family(
            CounterMetricFamily,
            "gateway_resource_refusals",
            "Requests or connections refused because the resource, or a fair share of it, was exhausted.",
            labels,
            ((key, one.refused) for key, one in resources),
        )
