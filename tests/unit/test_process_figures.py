"""The figures of the gateway's processes, and of several together."""

import resource
import time
from pathlib import Path

import pytest

from api_gateway.reporting.merge import merge
from api_gateway.reporting.process_figures import FIGURES, figures_of_this_process, merged_figures
from api_gateway.reporting.prometheus_families import process_families
from api_gateway.reporting.snapshot import WorkerSnapshot

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


def test_a_process_has_every_figure() -> None:
    found = figures_of_this_process()
    assert set(found) == set(FIGURES)
    assert 0 < found["process_open_fds"] <= found["process_max_fds"]
    assert found["process_max_fds"] == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert 0 < time.time() - found["process_start_time_seconds"] < 86_400
    assert 0 < found["process_cpu_seconds"] <= time.process_time() + 0.02, "the kernel counts in ticks"
    assert 10_000_000 < found["process_resident_memory_bytes"] <= found["process_virtual_memory_bytes"]


def test_without_the_files_of_the_kernel_there_are_no_figures(tmp_path: Path) -> None:
    assert figures_of_this_process(tmp_path) == {}


def test_figures_of_several_processes_are_summed_and_descriptors_are_those_of_the_fullest_process() -> None:
    first = dict.fromkeys(FIGURES, 5.0)
    second = dict.fromkeys(FIGURES, 3.0)
    summed = dict.fromkeys(FIGURES, 8.0)
    assert merged_figures([first, second]) == {
        **summed,
        "process_open_fds": 5.0,
        "process_max_fds": 3.0,
        "process_start_time_seconds": 3.0,
    }
    assert merged_figures([]) == {}


def test_only_the_cpu_time_of_an_ended_worker_remains() -> None:
    ended, serving = (WorkerSnapshot.blank(name) for name in "ab")
    ended.process, serving.process = dict.fromkeys(FIGURES, 5.0), dict.fromkeys(FIGURES, 3.0)
    ended.end()
    merged = merge([ended, serving])
    assert merged.process == {**dict.fromkeys(FIGURES, 3.0), "process_cpu_seconds": 8.0}
    found = {family.name: family.samples[0] for family in process_families(merged.process)}
    assert found["process_cpu_seconds"].name == "process_cpu_seconds_total"
    assert found["process_cpu_seconds"].value == 8.0


def test_figures_reach_other_processes() -> None:
    one, other = WorkerSnapshot.blank(), WorkerSnapshot.blank()
    one.process = dict.fromkeys(FIGURES, 5.0)
    other.update(one.state())
    assert other.process == one.process
