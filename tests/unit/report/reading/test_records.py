"""Files of records, whole and broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flexbench.core.errors import InputFileError
from flexbench.report.reading import read_all, requests
from flexbench.report.reading import records as reading_records
from flexbench.report.reading.fields import RecordError
from flexbench.report.reading.files import Kind, ResultFile, UnfinishedError
from flexbench.report.reading.records import Curve, Failure, Foreign, read_records
from flexbench.report.runs import Run
from flexbench.report.store import RunStore
from tests.unit.report.reading.samples import (
    curve_record,
    dist_record,
    petals_record,
    server_record,
    serving_record,
    write_lines,
    write_point,
)


def read(path: Path, kind: Kind = Kind.LINES, *, is_named: bool = True) -> list:
    return list(read_records(ResultFile(path=path, kind=kind, is_named=is_named)))


def problems(path: Path, kind: Kind = Kind.LINES, **options) -> list[str]:
    return [str(one) for one in read(path, kind, **options) if isinstance(one, InputFileError)]


def test_every_system_in_one_file(tmp_path):
    path = write_lines(
        tmp_path / "all.jsonl",
        petals_record(),
        "",
        dist_record(),
        serving_record(),
        server_record(),
        curve_record(),
        petals_record(status="failed", error="x"),
        dist_record(status="interrupted"),
    )
    petals, dist, serving, server, curve, failed, interrupted = read(path)
    assert [run.system for run in (petals, dist, serving)] == ["petals", "dist", "serving"]
    assert [run.line for run in (petals, dist, serving)] == [1, 3, 4]
    assert [one.figure for one in server.predictions] == ["Weights"]
    assert isinstance(curve, Curve)
    assert (failed.status, interrupted.status) == ("failed", "interrupted")
    assert len({run.record_id for run in (petals, dist, serving)}) == 3


def test_one_record_may_be_spread_over_many_lines(tmp_path):
    path = tmp_path / "run.json"
    path.write_text("\ufeff" + json.dumps(petals_record(), indent=2) + "\n\n", encoding="utf-8")
    (run,) = read(path, Kind.RECORD)
    assert isinstance(run, Run)
    assert (run.line, run.throughput) == (None, 32.0)


def test_lines_of_json_may_be_called_json(tmp_path):
    path = write_lines(tmp_path / "runs.json", petals_record(), dist_record())
    assert [run.line for run in read(path, Kind.RECORD)] == [1, 2]


def test_copies_of_a_record_have_one_identity_and_others_their_own(tmp_path):
    path = write_lines(
        tmp_path / "a.jsonl", petals_record(), petals_record(), petals_record(wall_s=5.0)
    )
    first, second, other = (run.record_id for run in read(path))
    assert first == second != other


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not a record: it is not JSON (column 2); it may have been cut off"),
        ('{"system": "pet', "it is not JSON (column 12); it may have been cut off"),
        ("{} {}", "it is not JSON (column 4)"),
        ("nonsense", "it is not JSON (column 1)"),
        ("\x00", "it is not JSON (column 1)"),
        ("[" * 100_000, "it is not JSON that can be read"),
        ('{"a":' * 100_000, "it is not JSON that can be read"),
        ("1" * 5000, "it is not JSON that can be read"),
        ("[]", "it must be a JSON object, not a list"),
        ("null", "it must be a JSON object, not null"),
        ("{}", "'schema_version' is missing"),
        ('{"schema_version": 1}', "'system' is missing"),
        (petals_record(schema_version=2), "schema_version 2 is of a newer flexbench; 1 is the newest one known here"),
        (petals_record(schema_version=0), "schema_version 0 is not 1, the one known here"),
        (petals_record(schema_version="1"), 'schema_version "1" is not 1, the one known here'),
        (petals_record(schema_version=True), "schema_version true is not 1, the one known here"),
        (petals_record(system="vllm"), 'system "vllm" is none of petals, dist, serving, serving curve, server-config'),
        (petals_record(system=["petals"]), "system a list is none of"),
        (petals_record(status="good"), 'status must be ok, failed or interrupted, not "good"'),
        (petals_record(status=None), "status must be ok, failed or interrupted, not null"),
        (petals_record(note=float("nan")), "it has a number that is not finite"),
        (json.dumps(petals_record(note=0)).replace('"note": 0', '"note": 1e999'), "it has a number that is not finite"),
        (petals_record(note={"x": [10**30]}), "it has a number with too many digits"),
        (serving_record(requests=[]), "requests must be a JSON object, not a list"),
        (serving_record(requests={"columns": [], "rows": []}), "columns of requests lack 'sent_ns'"),
        (serving_record(requests={"columns": ["sent_ns", "content_ns", "failure", "is_unfinished"], "rows": [[1]]}), "each of rows must have 4 values"),
        (serving_record(requests={"columns": ["sent_ns", "content_ns", "failure", "is_unfinished"], "rows": [[1, ["x"], None, False]]}), 'content_ns must be a finite number, not "x"'),
        (server_record(predicted=3), "predicted must be a JSON object, not 3"),
        (curve_record(points=3), "points must be a list, not 3"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_record_is_said_with_its_line(line, reason, tmp_path):
    path = write_lines(tmp_path / "r.jsonl", petals_record(), line, dist_record())
    first, error, last = read(path)
    assert isinstance(first, Run)
    assert isinstance(error, InputFileError)
    assert str(error).startswith(f"{path}:2: not a record: ")
    assert reason in str(error)
    assert isinstance(last, Run)


def test_numbers_that_only_look_long_are_fine(tmp_path):
    odd = {"digits": "1" * 50, "small": 0.00012345678901234567, "large": 2**62}
    (run,) = read(write_lines(tmp_path / "r.jsonl", petals_record(note=odd)))
    assert run.details["note"] == odd


def test_bytes_that_are_no_text_are_no_end_of_a_record(tmp_path):
    path = tmp_path / "r.jsonl"
    record = petals_record(command=["flexbench", "BYTE"])
    path.write_bytes(json.dumps(record).encode().replace(b"BYTE", b"\xff\xfe"))
    (run,) = read(path)
    assert run.details["command"] == ["flexbench", "\ufffd\ufffd"]


def test_a_broken_document_is_an_error_with_the_line_of_the_break(tmp_path):
    path = tmp_path / "run.json"
    text = json.dumps(petals_record(), indent=2)
    beginning = text[: text.index('"swarm_startup_s"') + 5]
    path.write_text(beginning)
    (problem,) = problems(path, Kind.RECORD)
    last_line = beginning.count("\n") + 1
    assert f"run.json:{last_line}: not a record: it is not JSON" in problem
    path.write_text(json.dumps(petals_record(schema_version=9), indent=2))
    assert problems(path, Kind.RECORD) == [
        f"{path}: not a record: schema_version 9 is of a newer flexbench; 1 is the newest one "
        "known here"
    ]


def test_half_a_line_at_the_end_is_unfinished_wherever_it_was_cut(tmp_path):
    path = tmp_path / "r.jsonl"
    text = json.dumps(petals_record(note=[True, None, -1.5e-7, "\u00e9", {}]))
    for end in range(1, len(text)):
        path.write_text(text[:end])
        (found,) = read(path, is_named=end % 2 == 0)
        assert isinstance(found, UnfinishedError), text[:end]
    # All of it is there, or its end is: it is a record, or it is none.
    path.write_text(text)
    assert isinstance(read(path)[0], Run)
    path.write_text(f"{text[:-5]}\n")
    (problem,) = problems(path)
    assert problem.endswith("it may have been cut off")


def test_only_what_has_no_end_is_unfinished(tmp_path):
    path = write_lines(tmp_path / "r.jsonl", petals_record(), '{"system": "pet', petals_record())
    _, error, _ = read(path)
    assert not isinstance(error, UnfinishedError)
    path.write_text(json.dumps(petals_record()) + "\nnonsense")
    _, error = read(path)
    assert not isinstance(error, UnfinishedError)
    # A file that is one record is written as a whole.
    path.write_text('{"schema_version": 1,')
    (error,) = read(path, Kind.RECORD)
    assert not isinstance(error, UnfinishedError)


@pytest.mark.parametrize("text", ['{"name": "x"}', "[1, 2]", "3", '{"system": "linux"}'])
def test_json_of_others_is_left_alone_where_it_was_found_only(text, tmp_path):
    path = tmp_path / "package.json"
    path.write_text(text)
    for kind in (Kind.RECORD, Kind.LINES):
        assert read(path, kind, is_named=False) == [Foreign()]
        assert len(problems(path, kind, is_named=True)) == 1


def test_a_file_of_ours_is_not_others_because_of_a_broken_line(tmp_path):
    path = write_lines(tmp_path / "r.jsonl", petals_record(), '{"name": "x"}')
    (problem,) = problems(path, is_named=False)
    assert problem.startswith(f"{path}:2: not a record")


def test_large_files_of_others_are_not_even_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr(reading_records, "_SMALL_BYTES", 100)
    path = tmp_path / "data.json"
    path.write_text('{"data": "' + "x" * 200)  # and it has no end
    assert read(path, Kind.RECORD, is_named=False) == [Foreign()]
    assert len(problems(path, Kind.RECORD)) == 1


def test_what_is_too_long_is_not_read(tmp_path, monkeypatch):
    limit = 2 * len(json.dumps(petals_record()))
    monkeypatch.setattr(reading_records, "LONGEST_RECORD_BYTES", limit)
    monkeypatch.setattr(reading_records, "_SMALL_BYTES", 100)
    long = json.dumps(petals_record(note="x" * 2 * limit))
    path = write_lines(tmp_path / "r.jsonl", petals_record(), long, petals_record())
    _, error, run = read(path)
    assert str(error).startswith(f"{path}:2: is no record: it has more than ")
    assert run.line == 3
    assert "is no record: it has more than" in problems(path, Kind.RECORD)[0]


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(InputFileError, match="cannot be read: No such file"):
        read(tmp_path / "no.jsonl")


# --- requests of a point ---


def test_latencies_come_from_the_file_of_a_point(tmp_path):
    path = write_point(tmp_path, serving_record())
    (run,) = read(path, Kind.RECORD)
    assert run.details["latencies_s"] == [1.0, 2.0, 3.0]  # and none of the request that failed
    assert run.details["num_latencies"] == 3
    assert "requests" not in run.details
    (line,) = read(tmp_path / "serving.jsonl")
    assert "latencies_s" not in line.details
    assert line.record_id == run.record_id


def test_so_they_do_however_it_is_written(tmp_path):
    path = write_point(tmp_path, serving_record())
    whole = path.read_text()
    record = json.loads(whole)
    expected = requests.load_point(whole)
    assert expected is not None
    assert expected["requests"] == requests.latencies_of(record["requests"]) == [1.0, 2.0, 3.0]
    assert {**expected, "requests": None} == {**record, "requests": None}
    # With blanks, or in another order, it is read as any other JSON.
    for text in (json.dumps(record, indent=1), json.dumps(dict(reversed(record.items())))):
        path.write_text(text)
        (run,) = read(path, Kind.RECORD)
        assert run.details["latencies_s"] == [1.0, 2.0, 3.0]


def test_a_point_that_is_cut_off_anywhere_is_an_error(tmp_path):
    path = write_point(tmp_path, serving_record())
    whole = path.read_text()
    begin = whole.index('"requests"')
    for end in [*range(1, begin, 97), *range(begin, len(whole))]:
        path.write_text(whole[:end])
        (problem,) = problems(path, Kind.RECORD)
        assert "it is not JSON" in problem


@pytest.mark.parametrize(
    "change", [('"rows":[[', '"rows":[,['), ("]]}}", "],]}}"), ("]]}}", "]]}}}"), ("]]}}", "]]x}}")]
)
def test_nearly_well_formed_requests_are_not_taken(change, tmp_path):
    path = write_point(tmp_path, serving_record())
    path.write_text(path.read_text().replace(*change))
    assert "it is not JSON" in problems(path, Kind.RECORD)[0]


def test_requests_in_requests_are_no_requests():
    text = '{"system":"serving","a":{"b":1,"requests":{"columns":["x"],"rows":[[1]]}}}'
    assert requests.load_point(text) is None


def test_unanswered_requests_have_no_latency():
    columns = ["failure", "sent_ns", "content_ns", "is_unfinished"]
    rows = [
        [None, 1_000_000_000, [2_000_000_000, 4_000_000_000], False],
        ["timeout", 0, [5], False],
        [None, 0, [5], True],
        [None, None, [], False],
        [None, 0, [], False],
    ]
    assert requests.latencies_of({"columns": columns, "rows": rows}) == [3.0]
    with pytest.raises(RecordError, match="content_ns must be a list"):
        requests.latencies_of({"columns": columns, "rows": [[None, 0, "x", False]]})


def test_failures_of_a_point_and_its_line_are_one(tmp_path):
    path = write_point(tmp_path, serving_record(status="failed", error="x"))
    (whole,), (line,) = read(path, Kind.RECORD), read(tmp_path / "serving.jsonl")
    assert isinstance(whole, Failure)
    assert whole == line


@pytest.mark.parametrize("name", ["throughput", "mean_latency"])
def test_a_record_has_no_negative_measurements_any_more_than_a_row(tmp_path, name):
    record = petals_record()
    record["figures"][name] = -5.0
    path = write_lines(tmp_path / "petals.jsonl", record)
    with RunStore() as store, pytest.raises(InputFileError) as caught:
        read_all([path], store, skip_invalid=False)
    assert f"{name} must be a number of at least 0, not -5.0" in str(caught.value)
    assert caught.value.line == 1
