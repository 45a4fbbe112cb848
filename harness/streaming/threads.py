"""Work over threads."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

Result = TypeVar("Result")


def num_cores() -> int:
    """The cores that this process may use; the ranks on one machine share them."""
    has_some = hasattr(os, "sched_getaffinity")
    count = len(os.sched_getaffinity(0)) if has_some else os.cpu_count() or 1
    return max(1, count // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def parallel(
    function: Callable[[Any], Result], tasks: Sequence[Any], *, jobs: int | None = None
) -> list[Result]:
    """Map over threads in order; a single task, or a single job, runs on this one."""
    jobs = min(jobs or num_cores(), len(tasks))
    if jobs <= 1:
        return [function(task) for task in tasks]
    results: list[Any] = [None] * len(tasks)
    left = deque(range(len(tasks)))

    def work() -> None:
        while (index := _pop(left)) is not None:
            results[index] = function(tasks[index])

    together([work] * jobs, stop=left.clear)
    return results


def _pop(left: deque[int]) -> int | None:
    try:
        return left.popleft()
    except IndexError:
        return None


def together(workers: Sequence[Callable[[], None]], *, stop: Callable[[], None]) -> None:
    """Run each on a thread of its own, the first one on this; `stop` tells all to end soon.

    The first exception stops all, and is raised when they have ended. A pool of threads takes a
    tenth longer for the same: it wakes a waiting thread for each task.
    """
    failures: list[BaseException] = []

    def run(worker: Callable[[], None]) -> None:
        try:
            worker()
        except BaseException as error:
            failures.append(error)
            stop()

    threads: list[threading.Thread] = []
    try:
        for worker in workers[1:]:
            thread = threading.Thread(target=run, args=(worker,), name="harness")
            thread.start()
            threads.append(thread)
        run(workers[0])
        for thread in threads:
            thread.join()
    except BaseException:  # an interrupt while this thread waits, or no thread to be had
        stop()
        for thread in threads:
            thread.join()
        raise
    if failures:
        raise failures[0]
