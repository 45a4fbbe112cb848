"""Work over threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

Result = TypeVar("Result")


def num_cores() -> int:
    """The cores that this process may use; the ranks on one machine share them."""
    has_some = hasattr(os, "sched_getaffinity")
    count = len(os.sched_getaffinity(0)) if has_some else os.cpu_count() or 1
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, count // max(1, int(ranks) if ranks.isdecimal() else 1))


def parallel(
    function: Callable[[Any], Result], tasks: Sequence[Any], *, jobs: int | None = None
) -> list[Result]:
    """Map over threads in order; a single task, or a single job, runs on this one.

    The first exception ends all soon, and is raised when they have ended. A pool of threads takes a
    tenth longer for the same: it wakes a waiting thread for each task.
    """
    jobs = min(jobs or num_cores(), len(tasks))
    if jobs <= 1:
        return [function(task) for task in tasks]
    results: list[Any] = [None] * len(tasks)
    left = iter(range(len(tasks)))
    failures: list[BaseException] = []

    def work() -> None:
        try:
            while not failures and (index := next(left, None)) is not None:
                results[index] = function(tasks[index])
        except BaseException as error:
            failures.append(error)

    threads: list[threading.Thread] = []
    try:
        for _ in range(jobs - 1):
            thread = threading.Thread(target=work, name="harness")
            thread.start()
            threads.append(thread)
        work()
        for thread in threads:
            thread.join()
    except BaseException as error:  # an interrupt while this thread waits, or no thread to be had
        failures.append(error)
        for thread in threads:
            thread.join()
        raise
    if failures:
        raise failures[0]
    return results
