"""When a stage computed and when it waited."""

from __future__ import annotations

from flexbench.core.timeline import What
from flexbench.dist.timeline import Timeline


def test_what_lies_between_waits_is_computing() -> None:
    timeline = Timeline()
    timeline.add(What.WAITING, 11.0, 12.0)
    timeline.add(What.LOADING, 13.0, 13.5)

    assert timeline.spans(10.0, 15.0) == (
        ("computing", 0.0, 1.0),
        ("waiting", 1.0, 2.0),
        ("computing", 2.0, 3.0),
        ("loading", 3.0, 3.5),
        ("computing", 3.5, 5.0),
    )


def test_spans_cover_the_whole_time_without_overlap() -> None:
    timeline = Timeline()
    timeline.add(What.SENDING, 2.0, 3.0)
    timeline.add(What.WAITING, 1.0, 4.0)  # ends after the one within it
    timeline.add(What.WAITING, 4.0, 5.0)

    spans = timeline.spans(0.0, 5.0)

    assert [span[1] for span in spans[1:]] == [span[2] for span in spans[:-1]]
    assert (spans[0][1], spans[-1][2]) == (0.0, 5.0)
    assert [span[0] for span in spans] == ["computing", "waiting", "waiting"]


def test_waits_that_cannot_be_seen_are_part_of_computing() -> None:
    timeline = Timeline()
    timeline.add(What.LOADING, 1.0, 1.00001)

    assert timeline.spans(0.0, 2.0) == (("computing", 0.0, 2.0),)


def test_a_long_run_has_its_beginning_only() -> None:
    timeline = Timeline()
    for number in range(1000):
        timeline.add(What.WAITING, number, number + 0.5)

    spans = timeline.spans(0.0, 1000.0)

    assert len(spans) == 2 * 500 - 1
    assert spans[-1] == ("waiting", 499.0, 499.5)  # not "computing" until the end


def test_a_run_without_waits_computed_all_the_time() -> None:
    assert Timeline().spans(3.0, 4.0) == (("computing", 0.0, 1.0),)
