"""Tasks in several processes, of which one dies."""

import os

from support.tasks import lost, squared

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


def test_leaving_the_loop_ends_all_processes():
    pool = Workers(squared, 2, lost)
    pids = []
    for _ in pool.results([1, 2, 3, 4]):
        pids += pool.stages()
        break
    assert pids
    assert not any(map(alive, pids))
