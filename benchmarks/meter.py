"""meter.py - time and peak memory of several ways to compute the same, for the speed benchmarks.

The ways take turns, because the speed of a shared machine changes from minute to minute. The tables
show medians, and the ratio of each way to ours.
"""

import multiprocessing
import os
import re
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import psutil
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
THREADS = 2
# Settings of glibc's malloc. For the time, it keeps freed memory, else page faults take much of the
# time. For the memory, it returns freed memory, so the resident size is that of the tensors.
KEEP_FREED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
RETURN_FREED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000"}


def now() -> float:
    """Seconds of a clock, once the GPU is done."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(function: Callable, *arguments) -> float:
    started = now()
    function(*arguments)
    return now() - started


def take_turns(measure: Callable, ways: tuple[str, ...], repeats: int = 3) -> dict[str, dict]:
    """Call `measure` on each way in turn. Returns the medians of its numbers by way and column.

    The first turn warms up.
    """
    warm_up, *turns = [{way: measure(way) for way in ways} for _ in range(1 + repeats)]
    return {
        way: {column: statistics.median(turn[way][column] for turn in turns) for column in columns}
        for way, columns in warm_up.items()
    }


def resident_mib() -> float:
    """Memory of this process in MiB: on the GPU if there is one, else on the CPU."""
    if DEVICE.type == "cuda":
        return torch.cuda.memory_allocated() / 2**20
    return psutil.Process().memory_info().rss / 2**20


def added_mib(function: Callable, *arguments) -> float:
    """Peak memory that a call adds, in MiB. On a CPU it needs Linux."""
    before = resident_mib()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        function(*arguments)
        return torch.cuda.max_memory_allocated() / 2**20 - before
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak resident size
    function(*arguments)
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**10 - before


def in_new_process(function: Callable, *arguments, threads: int = THREADS, malloc=None):
    """What a function at the top of a module returns in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    environment = {"OMP_NUM_THREADS": str(threads), "TRANSFORMERS_VERBOSITY": "error"}
    environment |= malloc or {}  # KEEP_FREED, RETURN_FREED
    with ProcessPoolExecutor(1, spawn) as pool, mock.patch.dict(os.environ, environment):
        return pool.submit(function, *arguments).result()


def print_table(title: str, rows: dict[str, dict[str, float]], ours: str = "ours") -> None:
    """Print a row for each way, and its ratio to ours."""
    print(f"\n{title}")
    print(f"{'':24}" + "".join(f"{column:>14}" for column in rows[ours]))
    for name, row in rows.items():
        print(f"{name:24}" + "".join(f"{value:14.4g}" for value in row.values()))
    for name, row in rows.items():
        if name != ours:
            ratios = "".join(f"{row[column] / rows[ours][column]:14.2f}" for column in row)
            print(f"{name + ' / ' + ours:24}{ratios}")
