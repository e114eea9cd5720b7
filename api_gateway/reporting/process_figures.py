"""CPU time, memory and file descriptors of the gateway's processes, under the names that Prometheus gives them."""

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

_CPU = "process_cpu_seconds"
_EARLIEST = "process_start_time_seconds"
_MOST, _LOWEST = "process_open_fds", "process_max_fds"
# By name without `_total`: what it means for all processes of the gateway together.
FIGURES = {
    _CPU: "User and system CPU time of the serving processes, with those that have ended.",
    "process_resident_memory_bytes": "Resident memory of the serving processes; shared pages count for each.",
    "process_virtual_memory_bytes": "Virtual memory of the serving processes.",
    _MOST: "Open file descriptors of the serving process that has the most.",
    _LOWEST: "Most file descriptors that one process may open.",
    _EARLIEST: "When the first of the serving processes started, in seconds since the epoch.",
}
_collector = ProcessCollector(registry=None)


def figures_of_this_process() -> dict[str, float]:
    """Return the figures by name; without /proc there are none."""
    return {metric.name: metric.samples[0].value for metric in _collector.collect() if metric.name in FIGURES}


def figures_at_end(figures: Mapping[str, float]) -> dict[str, float]:
    """Return the figures of an ended process that are still counted: its CPU time."""
    return {name: value for name, value in figures.items() if name == _CPU}


def merged_figures(processes: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the figures of several processes together."""
    merged: dict[str, float] = {}
    for figures in processes:
        for name, value in figures.items():
            if name in (_EARLIEST, _LOWEST):
                merged[name] = min(value, merged.get(name, value))
            elif name == _MOST:
                merged[name] = max(value, merged.get(name, value))
            else:
                merged[name] = merged.get(name, 0.0) + value
    return merged


def process_families(figures: Mapping[str, float]) -> Iterator[Metric]:
    """Yield a family for each figure that there is."""
    for name, words in FIGURES.items():
        if name in figures:
            kind = CounterMetricFamily if name == _CPU else GaugeMetricFamily
            yield kind(name, words, value=figures[name])
