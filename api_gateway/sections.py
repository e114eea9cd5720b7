"""The classes of all sections of the configuration that `api_gateway` itself has no name for, for type checkers."""

from api_gateway.settings.addresses import AddressesSection, ForwardedSection
from api_gateway.settings.admin import AdminSection, TokenSection
from api_gateway.settings.clients import AddressLimitSection, CandidateSection, KeySection
from api_gateway.settings.cors import CorsSection
from api_gateway.settings.extensions import ExtensionHookSection
from api_gateway.settings.history import HistorySection
from api_gateway.settings.identity import ApiKeySection, CertificateIdentitySection, IdentitySection
from api_gateway.settings.jwt import IssuerSection, JwtSection, RequireSection
from api_gateway.settings.limits import AllowanceSection, LimitCandidateSection, LimitSection
from api_gateway.settings.route_actions import (
    CompressionSection,
    MirrorSection,
    RedirectSection,
    RequestHeadersSection,
    RespondSection,
    ResponseHeadersSection,
    RewriteSection,
    WeightedUpstreamSection,
)
from api_gateway.settings.route_match import MatchSection, ValueSection
from api_gateway.settings.route_ownership import IncludeSection
from api_gateway.settings.routes import CostFromSection, CostSection, FallbackSection
from api_gateway.settings.server import LogSection, MetricsSection, ServerSection
from api_gateway.settings.store import StoreSection
from api_gateway.settings.tls import CertificateSection, ClientCertificatesSection, ServerTlsSection
from api_gateway.settings.tracing import TracingSection
from api_gateway.settings.upstreams import (
    AdaptiveSection,
    BackoffSection,
    CircuitBreakerSection,
    ConcurrencySection,
    HealthCheckSection,
    PoolSection,
    RetrySection,
    TimeoutsSection,
    TlsSection,
)
from api_gateway.settings.usage import UsageSection
from api_gateway.settings.webhook import WebhookSection

__all__ = [
    "AdaptiveSection",
    "AddressLimitSection",
    "AddressesSection",
    "AdminSection",
    "AllowanceSection",
    "ApiKeySection",
    "BackoffSection",
    "CandidateSection",
    "CertificateIdentitySection",
    "CertificateSection",
    "CircuitBreakerSection",
    "ClientCertificatesSection",
    "CompressionSection",
    "ConcurrencySection",
    "CorsSection",
    "CostFromSection",
    "CostSection",
    "ExtensionHookSection",
    "FallbackSection",
    "ForwardedSection",
    "HealthCheckSection",
    "HistorySection",
    "IdentitySection",
    "IncludeSection",
    "IssuerSection",
    "JwtSection",
    "KeySection",
    "LimitCandidateSection",
    "LimitSection",
    "LogSection",
    "MatchSection",
    "MetricsSection",
    "MirrorSection",
    "PoolSection",
    "RedirectSection",
    "RequestHeadersSection",
    "RequireSection",
    "RespondSection",
    "ResponseHeadersSection",
    "RetrySection",
    "RewriteSection",
    "ServerSection",
    "ServerTlsSection",
    "StoreSection",
    "TimeoutsSection",
    "TlsSection",
    "TokenSection",
    "TracingSection",
    "UsageSection",
    "ValueSection",
    "WebhookSection",
    "WeightedUpstreamSection",
]
