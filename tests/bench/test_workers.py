"""Tasks in several processes, of which one dies."""

import os
import signal

import pytest
from support.tasks import EndsItsProcess, cut_short, lost, negated, squared

from spdfq.bench.workers import Workers


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_process_that_dies_costs_its_own_task_alone():
    found = dict(Workers(squared, 2, lost).results([3, 0, 4, 5]))
    assert found.pop(0) == "0: its process was ended by SIGKILL; if memory ran out, use fewer --jobs"
    assert found == {3: 9, 4: 16, 5: 25}


@pytest.mark.parametrize("tasks", [[1, 2], [1, 2, 3, 4]], ids=["no task is left", "tasks are left"])
def test_a_process_that_dies_after_its_result_costs_no_task(tasks):
    pool = Workers(negated, 2, lost)
    found = {}
    for task, value in pool.results(tasks):
        if not found:  # all processes die while the first one writes the table
            for worker in pool._running:
                assert worker.connection.poll(120)
                os.kill(worker.process.pid, signal.SIGKILL)
                worker.process.join()
        found[task] = value
    assert found == {task: -task for task in tasks}


def test_processes_that_die_before_they_take_a_task_lose_one_each():
    large = [bytes(2_000_000), bytes(2_000_001)]  # more than fits into a connection that nobody reads
    found = list(Workers(EndsItsProcess(), 2, lambda task, why: (len(task), why)).results(large))
    assert sorted(value for _, value in found) == [
        (size, "its process ended with exit code 7") for size in (2_000_000, 2_000_001)
    ]


def test_a_process_that_dies_in_the_middle_of_a_message_costs_its_own_task_alone():
    found = dict(Workers(cut_short, 2, lost).results([1, 2, 3]))
    assert found == {number: f"{number}: its process ended with exit code 3" for number in (1, 2, 3)}


def test_leaving_the_loop_ends_all_processes():
    pool = Workers(squared, 2, lost)
    pids = []
    for _ in pool.results([1, 2, 3, 4]):
        pids += pool.stages()
        break
    assert pids
    assert not any(map(alive, pids))
