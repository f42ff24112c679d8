"""Points on disk: found again by their configuration, whole or not at all."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import asdict

import pytest

from flexbench.core.errors import ConfigError, FlexbenchError, InputFileError
from flexbench.core.results import read_rows
from flexbench.serving.audit import AuditInput, audit
from flexbench.serving.config import Load, PromptConfig
from flexbench.serving.figures import compute_figures
from flexbench.serving.point_files import (
    PointStore,
    configuration_hash,
    decode_traces,
    encode_traces,
    read_point,
    result_row,
)
from flexbench.serving.traces import RequestTrace

S = 1_000_000_000
PROMPTS = PromptConfig(model="tiny", prompt_length=32, max_new_tokens=2)


def traces(count=3):
    return [
        RequestTrace(
            index=index,
            worker=0,
            scheduled_ns=0,
            sent_ns=10,
            connected_ns=None,
            content_ns=[S, 2 * S],
            ended_ns=2 * S,
            prompt_tokens=32,
            max_new_tokens=2,
            output_tokens=2,
            is_counted_by_server=False,
            server_prompt_tokens=None,
            finish_reason="length",
            is_unfinished=False,
            failure=None if index else "timeout",
            failure_message=None if index else "no end ✓ 'quoted'",
        )
        for index in range(count)
    ]


def configuration(load=None, **changes):
    load = load or Load(concurrency=8, num_requests=20)
    values = {"api": "openai", "load": asdict(load), "prompts": asdict(PROMPTS), "workers": 1}
    return values | changes


def record(**changes):
    figures = compute_figures(traces(), window_s=4.0, is_streaming=True)
    values = {
        "status": "ok",
        "started_at": "2026-01-01T00:00:00+00:00",
        "figures": figures.as_record(),
        "audit": audit(AuditInput(worker_busy=(0.5,))).as_record(),
        "violations": [],
    }
    return values | {"configuration": configuration()} | changes


def test_traces_come_back_as_they_were():
    encoded = encode_traces(traces())
    assert len(encoded["rows"]) == 3
    assert "sent_ns" in encoded["columns"]
    assert decode_traces(json.loads(json.dumps(encoded))) == traces()


def test_a_point_is_found_by_its_configuration(tmp_path):
    store = PointStore(tmp_path)
    path = store.write(record(), traces())
    assert path.name == f"openai-8-clients-{configuration_hash(configuration())[:12]}.json"
    found = store.find(configuration())
    assert found["figures"] == record()["figures"]
    assert (found["schema_version"], found["system"]) == (1, "serving")
    assert decode_traces(found["requests"]) == traces()
    # The order of keys is no difference; anything else is.
    assert store.find(dict(reversed(configuration().items()))) is not None
    assert store.find(configuration(workers=2)) is None
    assert store.find(configuration(prompts=asdict(PROMPTS) | {"prompt_generator_seed": 1})) is None


@pytest.mark.parametrize(
    ("load", "name"),
    [
        (Load(concurrency=1, duration_s=1), "a-b-1-clients-"),
        (Load(rate_per_s=2.5, duration_s=1, arrival="poisson"), "a-b-2.5-per-s-poisson-"),
    ],
)
def test_file_names_are_good_for_people_and_file_systems(tmp_path, load, name):
    path = PointStore(tmp_path).path(configuration(load, api="../a b"))
    assert path.parent == tmp_path
    assert path.name.startswith(name)


@pytest.mark.parametrize("status", ["failed", "interrupted"])
def test_only_points_that_came_to_their_end_are_found(tmp_path, status):
    store = PointStore(tmp_path)
    store.write(record(status=status), traces())
    told = []
    assert store.find(configuration(), tell=told.append) is None
    assert told == []
    # It is replaced by one that does.
    store.write(record(), traces())
    assert store.find(configuration()) is not None
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda text: text[: len(text) // 2], "is not JSON; it may have been cut off"),
        (lambda text: "", "is not JSON"),
        (lambda text: "[" * 100_000, "is not JSON"),
        (lambda text: "[]", "is not a point of flexbench serving"),
        (lambda text: text.replace('"serving"', '"dist"'), "is not a point of flexbench serving"),
        (lambda text: text.replace('"schema_version":1', '"schema_version":2'), "schema_version"),
        (lambda text: text.replace('"workers":1', '"workers":3'), "has another configuration"),
        (
            lambda text: text.replace('"worker_busy":', '"busy":'),
            "lacks figures, audit or requests",
        ),
        (lambda text: text.replace('"figures"', '"fig"'), "lacks figures, audit or requests"),
        (
            lambda text: text.replace('"figures":{', '"figures":{"x":1,'),
            "lacks figures, audit or requests",
        ),
        (lambda text: text.replace('"rows":[[0,', '"rows":[['), "lacks figures, audit or requests"),
    ],
)
def test_a_file_that_cannot_be_used_is_told_and_measured_again(tmp_path, spoil, problem):
    store = PointStore(tmp_path)
    path = store.write(record(), traces())
    path.write_text(spoil(path.read_text()))
    told = []
    assert store.find(configuration(), tell=told.append) is None
    (sentence,) = told
    assert problem in sentence
    assert str(path) in sentence
    assert sentence.endswith("the point is measured again")


def test_a_missing_file_cannot_be_read(tmp_path):
    with pytest.raises(InputFileError, match="cannot be read"):
        read_point(tmp_path / "nothing.json")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    store = PointStore(tmp_path)
    path = store.write(record(), traces())
    before = path.read_bytes()

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(FlexbenchError, match="could not be kept: No space left on device"):
        store.write(record(started_at="later"), traces(50))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_is_for_others_to_read_as_the_umask_says(tmp_path):
    before = os.umask(0o022)
    try:
        path = PointStore(tmp_path).write(record(), traces())
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_check_names_the_option(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"^--result-dir: .*is not a folder"):
        PointStore(tmp_path / "file").check()
    PointStore(tmp_path / "new" / "folder").check()
    assert (tmp_path / "new" / "folder").is_dir()


def test_the_line_of_the_tsv(tmp_path):
    store = PointStore(tmp_path)
    figures = compute_figures(traces(), window_s=4.0, is_streaming=True)
    row = result_row(PROMPTS, Load(concurrency=8, num_requests=20), figures)
    # Two answers with 2 tokens each in 4 s; 20 requests of 8 clients are 3 each, rounded up.
    assert (row.throughput, row.mean_latency) == (1.0, pytest.approx(2.0))
    assert (row.batch_size, row.num_micro_batches, row.num_processes) == (1, 3, 8)
    assert (row.sequence_length, row.max_tokens) == (32, 2)
    store.append_row(row, record(), store.path(configuration()))
    assert list(read_rows(tmp_path / "serving.tsv")) == [row]
    line = json.loads((tmp_path / "serving.jsonl").read_text())
    assert line["point_file"] == store.path(configuration()).name
    assert line["system"] == "serving"
    assert "requests" not in line


def test_rows_of_other_loads():
    figures = compute_figures(traces(), window_s=4.0, is_streaming=True)
    timed = result_row(PROMPTS, Load(concurrency=8, duration_s=9), figures)
    assert (timed.num_micro_batches, timed.num_processes) == (1, 8)
    # Three requests of 2 s in 3.5 s: 1.7 in flight
    figures = compute_figures(traces(), window_s=3.5, is_streaming=True)
    offered = result_row(PROMPTS, Load(rate_per_s=5.0, num_requests=9), figures)
    assert (offered.num_micro_batches, offered.num_processes) == (1, 2)
    nothing = compute_figures([], window_s=4.0, is_streaming=True)
    assert result_row(PROMPTS, Load(concurrency=8, duration_s=9), nothing) is None
