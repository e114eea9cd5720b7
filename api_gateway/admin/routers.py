"""Which module of this package has which operator endpoints: known before any of them is imported."""

# In the order of the schema: module of this package, name of the router there, first segments of its paths.
ROUTERS: tuple[tuple[str, str, frozenset[str]], ...] = (
    ("health", "router", frozenset({"health", "healthz", "readyz"})),
    ("configuration", "router", frozenset({"configuration", "reload"})),
    ("audit", "router", frozenset({"audit"})),
    ("dashboard", "router", frozenset({"dashboard"})),
    ("metrics", "router", frozenset({"metrics"})),
    ("breakers", "router", frozenset({"circuit-breakers"})),
    ("explain", "router", frozenset({"explain"})),
    ("history", "router", frozenset({"explain", "history"})),
    ("clients", "overview_router", frozenset({"clients"})),
    ("clients", "router", frozenset({"clients"})),
    ("limits", "router", frozenset({"limits", "tiers"})),
    ("limit_buckets", "router", frozenset({"limits"})),
    ("keys", "router", frozenset({"clients"})),
    ("quotas", "router", frozenset({"clients"})),
    ("usage", "router", frozenset({"usage"})),
)
SCHEMA = "openapi.json"
FIRST_SEGMENTS = frozenset({"docs", SCHEMA}).union(*(segments for _, _, segments in ROUTERS))
