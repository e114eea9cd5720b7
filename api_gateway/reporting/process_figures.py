"""CPU time, memory and file descriptors of the gateway's processes, under the names that Prometheus gives them."""

import os
import resource
from collections.abc import Iterable, Mapping
from pathlib import Path

CPU = "process_cpu_seconds"
_RESIDENT, _VIRTUAL = "process_resident_memory_bytes", "process_virtual_memory_bytes"
_EARLIEST = "process_start_time_seconds"
_MOST, _LOWEST = "process_open_fds", "process_max_fds"
# By name without `_total`: what it means for all processes of the gateway together.
FIGURES = {
    CPU: "User and system CPU time of the serving processes, with those that have ended.",
    _RESIDENT: "Resident memory of the serving processes; shared pages count for each.",
    _VIRTUAL: "Virtual memory of the serving processes.",
    _MOST: "Open file descriptors of the serving process that has the most.",
    _LOWEST: "Most file descriptors that one process may open.",
    _EARLIEST: "When the first of the serving processes started, in seconds since the epoch.",
}
_PROC = Path("/proc")


def figures_of_this_process(proc: Path = _PROC) -> dict[str, float]:
    """Return the figures by name; without `proc` there are none.

    The numbers of fields are those of proc_pid_stat(5), which begin at 1; the fields up to the name are left out here.
    """
    try:
        fields = (proc / "self/stat").read_text().rpartition(")")[2].split()
        booted = (proc / "stat").read_text().partition("\nbtime ")[2].split(maxsplit=1)[0]
        open_files = sum(1 for _ in (proc / "self/fd").iterdir())
    except OSError:
        return {}
    ticks = os.sysconf("SC_CLK_TCK")
    user, system, start, virtual, resident = (int(fields[number - 3]) for number in (14, 15, 22, 23, 24))
    return {
        CPU: (user + system) / ticks,
        _RESIDENT: float(resident * resource.getpagesize()),
        _VIRTUAL: float(virtual),
        _MOST: float(open_files),
        _LOWEST: float(resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
        _EARLIEST: int(booted) + start / ticks,
    }


def figures_at_end(figures: Mapping[str, float]) -> dict[str, float]:
    """Return the figures of an ended process that are still counted: its CPU time."""
    return {name: value for name, value in figures.items() if name == CPU}


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
