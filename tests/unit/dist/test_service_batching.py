"""Which requests share a block, and who is told of which token."""

from __future__ import annotations

import threading
import time

import pytest

from flexbench.core.errors import ConfigError
from flexbench.dist.batching import Batch, Job, JobQueue, Token, check_batch_wait, fill_up


def jobs(*lengths: int) -> list[Job]:
    return [Job([10 + number], length) for number, length in enumerate(lengths)]


def filled(*waiting: Job) -> JobQueue:
    queue = JobQueue()
    for job in waiting:
        assert queue.put(job) is None
    return queue


def test_a_block_takes_no_more_than_fit_and_in_order():
    first, second, third = jobs(1, 1, 1)
    queue = filled(first, second, third)
    assert queue.take(2, fill_s=10, timeout_s=0) == [first, second]
    assert queue.take(2, fill_s=0, timeout_s=0) == [third]
    assert queue.take(2, fill_s=0, timeout_s=0) == []


def test_who_has_gone_gets_no_place():
    first, second, third = jobs(1, 1, 1)
    first.is_abandoned = second.is_abandoned = True
    assert filled(first, second, third).take(2, fill_s=0, timeout_s=0) == [third]
    assert filled(first).take(2, fill_s=0, timeout_s=0) == []


def test_a_block_waits_for_more_prompts_and_goes_when_it_is_full():
    first, second = jobs(1, 1)
    queue = filled(first)
    threading.Timer(0.05, queue.put, [second]).start()
    begun_at = time.monotonic()
    assert queue.take(2, fill_s=30, timeout_s=0) == [first, second]
    assert 0.03 < time.monotonic() - begun_at < 20


def test_a_block_that_nobody_fills_goes_after_its_wait():
    (job,) = jobs(1)
    begun_at = time.monotonic()
    assert filled(job).take(2, fill_s=0.05, timeout_s=0) == [job]
    assert time.monotonic() - begun_at >= 0.05


def test_a_closed_queue_gives_its_first_reason():
    first, second = jobs(1, 1)
    queue = filled(first)
    assert queue.close("rank 1 was killed") == [first]
    assert queue.close("the end") == []
    assert queue.put(second) == "rank 1 was killed"
    assert queue.take(1, fill_s=0, timeout_s=0) == []


def test_each_request_gets_its_own_tokens_and_no_more_than_it_asked_for():
    told: list[list[tuple[int, int]]] = []
    short, long = waiting = jobs(1, 3)
    batch = Batch(
        waiting,
        lambda events: told.append([(waiting.index(job), event.token_id) for job, event in events]),
    )
    assert batch.prompts == [[10], [11]]
    assert batch.max_new_tokens == 3
    # A block of four: places 2 and 3 are copies.
    batch.put(range(4), 0, [50, 51, 50, 51])
    assert short.is_complete
    assert not long.is_complete
    batch.put(range(4), 1, [60, 61, 60, 61])
    batch.put(range(2, 4), 2, [70, 71])
    # The last token is not told on the way: the pipeline's first stage does not get it.
    batch.finish([[50, 60, 70], [51, 61, 71], [50, 60, 70], [51, 61, 71]])
    assert told == [[(0, 50), (1, 51)], [(1, 61)], [(1, 71)]]
    assert long.is_complete


def test_tokens_that_were_told_on_the_way_are_not_told_again():
    told: list[tuple[Job, Token]] = []
    batch = Batch(jobs(2), told.extend)
    batch.put(range(1), 0, [50])
    batch.put(range(1), 1, [60])
    batch.finish([[50, 60]])
    assert [event for _, event in told] == [Token(50), Token(60)]


def test_blocks_are_filled_up_with_copies():
    assert fill_up([[1], [2, 3]], 5) == [[1], [2, 3], [1], [2, 3], [1]]
    assert fill_up([[1]], 1) == [[1]]


@pytest.mark.parametrize("seconds", [-0.1, 61, float("nan"), float("inf")])
def test_a_wait_that_cannot_be(seconds):
    with pytest.raises(ConfigError, match="--batch-wait"):
        check_batch_wait(seconds)
