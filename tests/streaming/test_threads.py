"""Work shared by threads: order, the first failure, interrupts."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from harness.streaming.threads import parallel

JOBS = 3


def alive() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.is_alive()}


@pytest.mark.parametrize("jobs", [1, 2, 7, 1000])
def test_results_are_in_the_order_of_the_tasks(jobs: int) -> None:
    tasks = list(range(500))
    assert list(parallel(lambda task: task * task, tasks, jobs=jobs)) == [n * n for n in tasks]


def test_as_many_threads_work_as_there_are_jobs() -> None:
    barrier = threading.Barrier(JOBS)

    def work(task: int) -> int:
        barrier.wait(10)
        return threading.get_ident()

    workers = set(parallel(work, range(JOBS), jobs=JOBS))
    assert len(workers) == JOBS
    assert threading.get_ident() in workers  # which would only wait


def in_turn_until(failing: int, done: list[int]) -> Callable[[int], None]:
    def work(task: int) -> None:
        time.sleep(0.001)
        if task == failing:
            raise ValueError(f"task {task}")
        done.append(task)

    return work


@pytest.mark.parametrize("failing", [0, 1, 20])
def test_a_failure_is_raised_and_soon_no_further_task_begun(failing: int) -> None:
    done: list[int] = []
    before = alive()
    with pytest.raises(ValueError, match=f"^task {failing}$"):
        parallel(in_turn_until(failing, done), range(2000), jobs=JOBS)
    assert len(done) < failing + 50
    assert alive() <= before


def test_the_failure_of_another_thread_is_raised_in_this_one() -> None:
    this = threading.get_ident()
    begun = threading.Event()

    def work(task: int) -> None:
        if threading.get_ident() != this:
            begun.set()
            raise ValueError("elsewhere")
        assert begun.wait(10)

    with pytest.raises(ValueError, match="elsewhere"):
        parallel(work, range(100), jobs=2)


def test_an_index_error_of_a_task_is_not_the_end_of_the_tasks() -> None:
    with pytest.raises(IndexError):
        parallel(lambda task: [][task], range(10), jobs=2)


def interrupt() -> None:
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signal.SIGINT)


@pytest.fixture
def _interrupts() -> Iterator[None]:
    """As at a terminal: what a shell starts in the background ignores them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interrupts")
@pytest.mark.parametrize("waits", [False, True])
def test_an_interrupt_ends_all_threads(waits: bool) -> None:
    """Whether it comes while this thread works, or while it waits for the others."""
    begun = threading.Barrier(2)

    def work(task: int) -> None:
        begun.wait(10)
        if (threading.current_thread() is threading.main_thread()) is not waits:
            time.sleep(0.2)
            interrupt()
            time.sleep(0.2)

    before = alive()
    with pytest.raises(KeyboardInterrupt):
        parallel(work, range(2), jobs=2)
    assert alive() <= before


def test_without_another_thread_to_be_had_none_is_left_at_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start, before, done = threading.Thread.start, alive(), list[int]()

    def refuse_the_second(thread: threading.Thread) -> None:
        if alive() > before:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse_the_second)
    with pytest.raises(RuntimeError, match="new thread"):
        parallel(in_turn_until(-1, done), range(2000), jobs=JOBS)
    assert len(done) < 50
    assert alive() <= before
