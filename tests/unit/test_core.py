"""Units, metrics, errors, options, and what a record says of the machine."""

from __future__ import annotations

import signal
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from flexbench.core import environment, errors, metrics
from flexbench.core.options import QuickCommand, repeat_options
from flexbench.core.printable import printable, printable_lines
from flexbench.core.units import format_bytes, format_seconds


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (1024, "1 KiB"),
        (494926848, "472 MiB"),
        (24 * 2**30, "24 GiB"),
        (2**70, "1.05e+06 PiB"),
    ],
)
def test_format_bytes(count, text):
    assert format_bytes(count) == text


@given(st.integers(0, 2**59))
def test_bytes_below_512_pib_have_no_exponent(count):
    assert "e" not in format_bytes(count)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0123, "12.3 ms"),
        (0.9996, "1e+03 ms"),
        (5.52, "5.5 s"),
        (59.96, "1 min 0 s"),
        (75, "1 min 15 s"),
        (3599.6, "1 h 0 min"),
        (7260, "2 h 1 min"),
    ],
)
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text


def test_throughput_is_tokens_over_wall_clock_time():
    # 4 clients x 1 round x 1 prompt x 32 tokens in 5.68 s
    assert metrics.throughput(128, 5.68) == pytest.approx(22.535, abs=1e-3)
    assert metrics.throughput(0, 5.68) == 0.0


def test_mean_latency_is_over_clients_and_rounds():
    assert metrics.mean_latency([1.0, 2.0, 6.0, 7.0]) == 4.0


@pytest.mark.parametrize("metric", metrics.METRICS, ids=lambda metric: metric.name)
def test_the_documentation_defines_every_metric_as_the_code_does(metric):
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    section = text.split(f"## {metric.name}\n")[1].split("\n## ")[0]
    assert f"Unit: {metric.unit}." in section
    assert metric.formula in section
    assert ("Higher is better" in section) is metric.higher_is_better


def test_figures_of_nothing_are_refused():
    with pytest.raises(ValueError, match="wall_clock_s must be above 0"):
        metrics.throughput(1, 0.0)
    with pytest.raises(ValueError, match="at least one"):
        metrics.mean_latency([])


@pytest.mark.parametrize(
    ("error", "exit_code", "message"),
    [
        (errors.ConfigError("--x", "must be 1"), 2, "--x: must be 1"),
        (errors.InputFileError("a.tsv", "is empty"), 2, "a.tsv: is empty"),
        (errors.InputFileError("a.tsv", "is torn", line=3), 2, "a.tsv:3: is torn"),
        (errors.MissingDependencyError("no petals"), 2, "no petals"),
        (errors.WorkerError("client 0", "died"), 1, "client 0 died"),
        (errors.DeadlineError("too late"), 1, "too late"),
        (errors.Interrupted(signal.SIGINT), 130, "Stopped by Ctrl-C."),
        (errors.Interrupted(signal.SIGTERM), 143, "Stopped by SIGTERM."),
    ],
)
def test_errors_carry_their_exit_code(error, exit_code, message):
    assert error.exit_code == exit_code
    assert str(error) == message


@pytest.mark.parametrize(
    ("written", "parsed"),
    [
        (["--n", "1", "2", "--x", "3"], ["--n", "1", "--n", "2", "--x", "3"]),
        (["--n=1", "2"], ["--n=1", "--n", "2"]),
        (["--n", "1", "--n", "2"], ["--n", "1", "--n", "2"]),
        (["--n", "1", "-2"], ["--n", "1", "--n", "-2"]),
        (["--x", "1", "2"], ["--x", "1", "2"]),
        (["--n"], ["--n"]),
        (["--n", "1", "-q", "2"], ["--n", "1", "-q", "2"]),
        ([], []),
    ],
)
def test_repeatable_options_take_several_values(written, parsed):
    assert repeat_options(written, {"--n"}) == parsed


@pytest.mark.parametrize(
    ("command_line", "recorded"),
    [
        (["--max-tokens", "32"], ["--max-tokens", "32"]),
        (["--api-key", "sk-123", "x"], ["--api-key", "***", "x"]),
        (["--api-key=sk-123"], ["--api-key=***"]),
        (["--token", "hf_x"], ["--token", "***"]),
        (["--password", "p", "--seed", "1"], ["--password", "***", "--seed", "1"]),
        (["--url", "https://me:secret@host/v1"], ["--url", "https://***@host/v1"]),
        (["--api-key=a b"], ["--api-key=***"]),
        (["--args", "--x 1  --api-key 'a b' y"], ["--args", "--x 1  --api-key *** y"]),
        (["--args=--api-k s3cret x"], ["--args=--api-k *** x"]),
        (["--args", "--x-key=s3cret y"], ["--args", "--x-key=***"]),
        (["--args", "y --x-key=s3cret z"], ["--args", "y --x-key=*** z"]),
        (["env A_KEY='a b' B_TOKEN=s3cret vllm"], ["env A_KEY=*** B_TOKEN=*** vllm"]),
        (["-e", "A_KEY=s3cret", "--env=A_KEY=s3cret"], ["-e", "A_KEY=***", "--env=A_KEY=***"]),
        (["sh -c 'run --api-key s3cret' x"], ["sh -c 'run --api-key *** x"]),
        (["sh -c \"--args='--token s3cret'\""], ["sh -c \"--args='--token ***"]),
        (["it's", "don't --max-tokens 3 \\"], ["it's", "don't --max-tokens 3 \\"]),
    ],
)
def test_secrets_are_not_recorded(command_line, recorded):
    assert environment.redact_command_line(command_line) == recorded


def test_versions_of_what_is_not_installed_are_none():
    versions = environment.describe_versions(["typer", "no-such-package"])
    assert set(versions) == {"python", "flexbench", "typer", "no-such-package"}
    assert versions["no-such-package"] is None
    assert versions["typer"]


def test_the_machine_is_described_without_names_of_people_or_hosts():
    machine = environment.describe_machine()
    assert set(machine) == {
        "os", "cpu", "num_cpus", "num_cpus_installed", "memory_bytes", "gpus",
    }  # fmt: skip
    assert machine["num_cpus_installed"] >= machine["num_cpus"] >= 1
    assert machine["memory_bytes"] > 2**20


class Colour(StrEnum):
    RED = "red"


@pytest.mark.parametrize("words", [["a", "b"], ["a"]])
def test_plain_values_are_what_typer_would_have_made_of_them(words, tmp_path):
    seen: list[Any] = []

    def command(
        paths: list[Path],
        output: Path | None = None,
        existing: Annotated[Path, typer.Option(exists=True)] = Path("/"),
        colour: Colour = Colour.RED,
        number: int = 1,
        share: float = 0.5,
    ) -> None:
        seen.append((paths, output, existing, colour, number, share))

    def run(cls, *more: str) -> Any:
        app = typer.Typer()
        app.command(cls=cls)(command)
        return CliRunner().invoke(app, [*words, *more])

    for more in (
        [],
        ["--output", "x", "--colour", "red", "--number", "-7", "--share", "2"],
        ["--existing", str(tmp_path)],
    ):
        quick, usual = run(QuickCommand, *more), run(None, *more)
        assert (quick.exit_code, usual.exit_code) == (0, 0), quick.output
        assert seen[-1] == seen[-2]
        assert list(map(type, seen[-1])) == list(map(type, seen[-2]))
    for more in (["--existing", "/no/such"], ["--colour", "blue"], ["--number", "x"]):
        quick, usual = run(QuickCommand, *more), run(None, *more)
        assert quick.exit_code == usual.exit_code == 2
        assert quick.output == usual.output


def test_texts_of_others_cannot_command_a_terminal():
    hostile = "a\x1b]0;title\x07b\u202ec\ud800\r\nd"
    assert printable(hostile) == "a\ufffd]0;title\ufffdb\ufffdc\ufffd d"
    assert printable_lines(hostile) == "a\ufffd]0;title\ufffdb\ufffdc\ufffd\ufffd\nd"
    assert printable_lines("two\n\tlines") == "two\n\tlines"
