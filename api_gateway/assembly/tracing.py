"""Builds what traces exchanges: from the section `tracing` and OpenTelemetry's environment variables."""

import asyncio
import importlib
import logging
import os
import socket
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from api_gateway._version import __version__
from api_gateway.clients.api_keys import without_keys
from api_gateway.config import GatewayConfig
from api_gateway.errors import StartupError
from api_gateway.metrics import DURATION_BOUNDS, NO_ROUTE, Recorder, is_timed
from api_gateway.models import Exchange
from api_gateway.observability.trace_exporter import TraceExporter
from api_gateway.observability.trace_sender import OtlpSender
from api_gateway.observability.tracing import Parent, Sampling, Tracer
from api_gateway.settings.tracing import TRACES_PATH, TracingSection, collector_url, decoded_pairs, header_pairs
from api_gateway.system.clocks import Clocks
from api_gateway.system.x509 import verifying_context

logger = logging.getLogger(__name__)

MISSING_OTEL = (
    "tracing.enabled: needs the package opentelemetry-proto; install it with pip install 'api-gateway[otel]', or set"
    " enabled: false"
)
DEFAULT_ENDPOINT = f"http://localhost:4318{TRACES_PATH}"
DEFAULT_SERVICE = "api-gateway"
# By OpenTelemetry's name of a sampler: how it treats the parent's decision, and its ratio, None if that is an
# argument.
_SAMPLERS: dict[str, tuple[Parent, float | None]] = {
    "always_on": ("ignore", 1.0),
    "always_off": ("ignore", 0.0),
    "traceidratio": ("ignore", None),
    "parentbased_always_on": ("obey", 1.0),
    "parentbased_always_off": ("obey", 0.0),
    "parentbased_traceidratio": ("obey", None),
}


@dataclass(frozen=True, slots=True)
class TracingPlan:
    """The settings of tracing under a configuration; `encoder` is the module that needs the library."""

    endpoint: str
    headers: Mapping[str, str]
    resource: Mapping[str, str]
    sampling: Sampling
    section: TracingSection
    encoder: Any


class Tracing:
    """The tracer of the configuration in force (None: tracing is off), and the exporter, which reloads keep."""

    def __init__(self, recorder: Recorder, clocks: Clocks) -> None:
        self.tracer: Tracer | None = None
        self._recorder = recorder
        self._clocks = clocks
        self._exporter: TraceExporter | None = None

    def __repr__(self) -> str:
        return f"<Tracing [{'off' if self.tracer is None else self._exporter}]>"

    @property
    def waiting(self) -> int:
        """The number of exchanges that wait to be exported."""
        return 0 if self._exporter is None else len(self._exporter)

    def follow(self, plan: TracingPlan | None, config: GatewayConfig) -> None:
        """Apply a plan (None: no tracing). Exchanges in the queue are still exported."""
        if plan is None:
            self.tracer = None
            return
        section = plan.section
        encoder = plan.encoder.SpanEncoder(
            plan.resource,
            __version__,
            redact=without_keys,
            paths={route.name: route.path for route in config.routes},
            has_client=section.client_attributes,
        )
        read = plan.encoder.rejected_spans
        sender = OtlpSender(plan.endpoint, plan.headers, section.timeout, read, verifying_context)
        if self._exporter is None:
            self._exporter = TraceExporter(
                encoder,
                sender,
                self._recorder.trace_spans,
                max_queue=section.max_queue,
                on_batch=self._note_exemplars,
                clock=self._clocks.monotonic,
                wall_clock=self._clocks.wall,
            )
            self._exporter.start()
        else:
            self._exporter.change(encoder, sender, section.max_queue)
        self.tracer = Tracer(plan.sampling, self._exporter.add)

    @property
    def observers(self) -> list[Callable[[Exchange], None]]:
        """The observers of ended exchanges."""
        return [] if self.tracer is None else [self.tracer.record]

    def _note_exemplars(self, exchanges: Sequence[Exchange], offset: float) -> None:
        """Make the last trace of each route and bucket of its histogram the exemplar there.

        In the exporter's thread: an assignment to the dictionary is one step for the readers in others. `offset` is
        the difference of the wall clock to the monotonic clock.
        """
        for exchange in exchanges:
            if exchange.trace is not None and is_timed(exchange):
                duration = exchange.finished - exchange.started
                self._recorder.exemplars[exchange.route or NO_ROUTE, bisect_left(DURATION_BOUNDS, duration)] = (
                    exchange.trace.trace_id,
                    duration,
                    offset + exchange.finished,
                )

    async def close(self) -> None:
        """Export what waits, within a few seconds, and end the thread."""
        if self._exporter is not None:
            await asyncio.to_thread(self._exporter.close)


def tracing_plan(config: GatewayConfig, variables: Mapping[str, str] | None = None) -> TracingPlan | None:
    """Return the plan of tracing under a configuration, None if it is off. Raises StartupError.

    `variables` are those of the environment. Settings take precedence over them.
    """
    section = config.tracing
    given = _Variables(os.environ if variables is None else variables)
    if not section.enabled or given.text("OTEL_SDK_DISABLED").lower() == "true":
        return None
    encoder = encoder_module()
    resource = {
        **given.pairs("OTEL_RESOURCE_ATTRIBUTES"),
        **({"service.name": name} if (name := given.text("OTEL_SERVICE_NAME")) else {}),
        **section.resource,
        **({"service.name": section.service_name} if section.service_name else {}),
    }
    attributes = {
        "service.name": DEFAULT_SERVICE,
        "service.version": __version__,
        "service.instance.id": f"{socket.gethostname()}:{os.getpid()}",
        "telemetry.sdk.name": "api-gateway",
        "telemetry.sdk.language": "python",
        "telemetry.sdk.version": __version__,
    }
    parent, ratio = given.sampler()
    return TracingPlan(
        section.endpoint or given.endpoint(),
        given.headers() if section.headers is None else header_pairs(section.headers.get_secret_value()),
        attributes | resource,
        Sampling(
            ratio if section.ratio is None else section.ratio,
            section.parent or parent,
            section.keep_errors,
            section.keep_slower_than,
            section.max_kept_per_second,
        ),
        section,
        encoder,
    )


def encoder_module() -> Any:
    """Return the module that needs the library. Raises StartupError if it is not installed."""
    try:
        return importlib.import_module("api_gateway.observability.trace_encoding")
    except ImportError as error:
        raise StartupError(MISSING_OTEL) from error


class _Variables:
    """OpenTelemetry's environment variables. One with an invalid value is ignored, with a warning."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._variables = variables

    def text(self, name: str) -> str:
        return self._variables.get(name, "").strip()

    def pairs(self, name: str) -> dict[str, str]:
        """Return a list such as `a=1,b=2`, whose values are percent-encoded."""
        return self._read(name, decoded_pairs)

    def headers(self) -> dict[str, str]:
        """Return the header fields of requests to the collector."""
        own = "OTEL_EXPORTER_OTLP_TRACES_HEADERS"
        return self._read(own if self.text(own) else "OTEL_EXPORTER_OTLP_HEADERS", header_pairs)

    def _read(self, name: str, read: Callable[[str], dict[str, str]]) -> dict[str, str]:
        try:
            return read(self.text(name))
        except ValueError as error:
            logger.warning("environment %s: %s; ignored", name, error)
            return {}

    def endpoint(self) -> str:
        """Return the URL to which traces are posted."""
        for name, suffix in (("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", ""), ("OTEL_EXPORTER_OTLP_ENDPOINT", TRACES_PATH)):
            given = self.text(name)
            if not given:
                continue
            try:
                checked = collector_url(given)
            except ValueError as error:
                logger.warning("environment %s: %s; ignored", name, error)
                continue
            return f"{given.rstrip('/')}{suffix}" if suffix else checked
        return DEFAULT_ENDPOINT

    def sampler(self) -> tuple[Parent, float]:
        """Return how the sampler treats the parent's decision, and its ratio."""
        name = self.text("OTEL_TRACES_SAMPLER").lower() or "parentbased_always_on"
        if name not in _SAMPLERS:
            logger.warning("environment OTEL_TRACES_SAMPLER: must be one of %s; ignored", ", ".join(_SAMPLERS))
            name = "parentbased_always_on"
        parent, ratio = _SAMPLERS[name]
        if ratio is not None:
            return parent, ratio
        argument = self.text("OTEL_TRACES_SAMPLER_ARG") or "1"
        try:
            ratio = float(argument)
        except ValueError:
            ratio = -1.0
        if not 0 <= ratio <= 1:
            logger.warning("environment OTEL_TRACES_SAMPLER_ARG: must be 0 to 1, got %r; ignored", argument)
            return parent, 1.0
        return parent, ratio
