from __future__ import annotations

import time

import pytest
from worker_tasks import work

from s3d.data import WorkerDiedError
from s3d.data.workers import run_in_processes


def test_every_task_is_done_once_in_other_processes() -> None:
    outcomes = list(run_in_processes(work, range(20), 2))
    assert sorted(outcomes) == [(task, task * task) for task in range(20)]
    assert sorted(run_in_processes(work, [3], 8)) == [(3, 9)]
    assert list(run_in_processes(work, [], 2)) == []


@pytest.mark.parametrize(
    ("task", "message"),
    [(-1, r"ended by signal 9 \(Killed\) while it worked on -1; out of memory\?"), (-2, "ended with code 3 .* on -2")],
)
def test_a_worker_that_dies_is_noticed_and_its_task_named(task: int, message: str) -> None:
    begin = time.monotonic()
    with pytest.raises(WorkerDiedError, match=message):
        list(run_in_processes(work, [1, 2, task, 3, 4], 2))
    assert time.monotonic() - begin < 20


def test_an_error_comes_through_with_its_traceback() -> None:
    with pytest.raises(KeyError, match="no luck") as caught:
        list(run_in_processes(work, [1, -3], 2))
    assert "in work" in str(caught.value.__cause__)
