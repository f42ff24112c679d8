"""What `flexbench dist` takes, refuses and plans, and what a run in one process leaves behind."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from flexbench.cli import app
from flexbench.core.errors import ConfigError
from flexbench.core.options import replace_switch_values
from flexbench.core.results import ResultsFile, read_rows
from flexbench.dist.config import DistConfig
from flexbench.ranks.launch import Launch

GIB = 2**30
SHORT = ("--prompt-len", 16, "--gen-len", 8)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The default --output is relative; and one thread is the quickest with tiny models."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("COLUMNS", "80")
    torch = sys.modules.get("torch")
    num_threads = torch.get_num_threads() if torch else 0
    yield
    if torch:
        torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OPT model of a few kilobytes."""
    pytest.importorskip("torch", reason="models are computed with torch")
    from tests.integration.dist.conftest import write_model

    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def _needs_torch() -> None:
    pytest.importorskip("torch", reason="a model's size is known with torch only")


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["dist", *map(str, arguments)])


def left_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def files_in(folder: Path) -> list[str]:
    return [name for name in left_in(folder) if (folder / name).is_file()]


def record_in(folder: Path) -> dict[str, Any]:
    """The only record there."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    (line,) = (folder / "results" / "dist.jsonl").read_text().splitlines()
    record: dict[str, Any] = json.loads(line, parse_constant=refuse)
    return record


# --- how options are written -------------------------------------------------------------------


@dataclass(frozen=True)
class Taken:
    """What the command has understood."""

    config: DistConfig
    launch: Launch
    head_ip: str | None
    port: int | None
    quiet: bool


@pytest.fixture
def take(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Gives the command arguments, and returns what it would run. Needs no torch."""
    taken: list[Taken] = []

    def note(
        plan: tuple[DistConfig, Launch],
        launch: Launch,
        head_ip: str | None,
        port: int | None,
        *,
        quiet: bool,
    ) -> None:
        taken.append(Taken(plan[0], launch, head_ip, port, quiet))

    monkeypatch.setattr("flexbench.dist.command._plan", lambda config, launch: (config, launch))
    monkeypatch.setattr("flexbench.dist.command._run", note)

    def take(*arguments: object) -> Taken:
        result = invoke(*arguments)
        assert result.exit_code == 0, result.output
        return taken.pop()

    return take


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        (["--model", "facebook/opt-30b"], "model", "facebook/opt-30b"),
        (["--path", "_DUMMY_"], "path", "_DUMMY_"),
        (["--offload-dir", "some/folder"], "offload_dir", Path("some/folder")),
        (["--offload-dir", "~/folder"], "offload_dir", Path.home() / "folder"),
        (["--prompt-len", 128], "prompt_len", 128),
        (["--gen-len", 16], "gen_len", 16),
        (["--cut-gen-len", 5], "cut_gen_len", 5),
        (["--debug-mode", "fewer_batch"], "debug_mode", "fewer_batch"),
        (["--debug-mode", "breakdown"], "debug_mode", "breakdown"),
        (["--gpu-batch-size", 3], "gpu_batch_size", 3),
        (["--num-gpu-batches", 7], "num_gpu_batches", 7),
        (["--percent", 20, 80, 0, 100, 0, 100], "percent", (20, 80, 0, 100, 0, 100)),
        (["--percent=20", 80, 0, 100, 0, 100], "percent", (20, 80, 0, 100, 0, 100)),
        (["--percent", "12.5", "0.5", 0, 0, 0, 0], "percent", (12.5, 0.5, 0, 0, 0, 0)),
        (["--sep-layer"], "sep_layer", True),
        (["--sep-layer", 1], "sep_layer", True),
        (["--sep-layer", "False"], "sep_layer", False),
        (["--no-sep-layer"], "sep_layer", False),
        (["--pin-weight"], "pin_weight", True),
        (["--pin-weight", "no"], "pin_weight", False),
        (["--pin-weight=0"], "pin_weight", False),
        (["--no-pin-weight"], "pin_weight", False),
        (["--cpu-cache-compute"], "cpu_cache_compute", True),
        (["--attn-sparsity", "0.1"], "attn_sparsity", 0.1),
        (["--compress-weight"], "compress_weight", True),
        (["--compress-cache"], "compress_cache", True),
        (["--overlap"], "overlap", True),
        (["--overlap", "YES"], "overlap", True),
        (["--overlap", "false"], "overlap", False),
        (["--overlap=f"], "overlap", False),
        (["--no-overlap"], "overlap", False),
        (["--log-file", "auto"], "log_file", "auto"),
        (["--log-file", "my.log"], "log_file", "my.log"),
        (["--no-log"], "no_log", True),
        (["--verbose", 0], "verbose", 0),
        (["--verbose", 2], "verbose", 2),
        (["--comm-device", "cpu"], "comm_device", "cpu"),
        (["--num-inner-iterations", 4], "num_inner_iterations", 4),
        (["--async-comm"], "async_comm", True),
        # ours
        (["--do-sample", "--temperature", "0.7"], "temperature", 0.7),
        (["--stop", 2], "stop", 2),
        (["--seed", 9], "seed", 9),
        (["--dtype", "bfloat16"], "dtype", "bfloat16"),
        (["--balance", "time"], "balance", "time"),
        (["--allow-overcommit"], "allow_overcommit", True),
        (["--comm-timeout", "2.5"], "comm_timeout_s", 2.5),
        (["--output", "a/b.tsv"], "output", Path("a/b.tsv")),
    ],
)
def test_options_are_taken_in_any_position(take, arguments, field, value):
    around = ("--seed", 9), ("--percent", 1, 2, 3, 4, 5, 6)
    positions = [
        arguments,
        [*around[0], *arguments],
        [*arguments, *around[0]],
        [*around[0], *arguments, "--quiet"],
    ]
    if field != "percent":
        positions += [[*around[1], *arguments], [*arguments, *around[1]]]
    for position in positions:
        assert getattr(take(*position).config, field) == value


def test_nothing_is_needed(take):
    taken = take()
    assert taken.config == DistConfig()
    assert taken.config.percent == (100, 0, 100, 0, 100, 0)
    assert (taken.launch.rank, taken.launch.world_size) == (0, 1)
    assert (taken.head_ip, taken.port, taken.quiet) == (None, None, False)


def test_a_whole_command_line_of_the_original(take):
    taken = take(
        *[
            "--head-ip",
            "192.0.2.7",
            "--port",
            "7777",
            "--rank",
            "1",
            "--local-rank",
            "0",
            "--world-size",
            "4",
        ],
        *[
            "--model",
            "facebook/opt-6.7b",
            "--gpu-batch-size",
            "24",
            "--percent",
            "20",
            "80",
            "0",
            "100",
            "0",
            "100",
        ],
        *[
            "--comm-device",
            "cpu",
            "--sep-layer",
            "1",
            "--pin-weight",
            "no",
            "--overlap",
            "false",
            "--no-log",
        ],
        *[
            "--cpu-cache-compute",
            "--async-comm",
            "--num-inner-iterations",
            "2",
            "--path",
            "_DUMMY_",
        ],
    )
    assert (taken.head_ip, taken.port) == ("192.0.2.7", 7777)
    assert (taken.launch.rank, taken.launch.local_rank, taken.launch.world_size) == (1, 0, 4)
    assert taken.config == DistConfig(
        model="facebook/opt-6.7b",
        path="_DUMMY_",
        gpu_batch_size=24,
        percent=(20, 80, 0, 100, 0, 100),
        comm_device="cpu",
        sep_layer=True,
        pin_weight=False,
        overlap=False,
        no_log=True,
        cpu_cache_compute=True,
        async_comm=True,
        num_inner_iterations=2,
    )


def test_a_launcher_is_recognized_and_use_mpi_is_content_with_it(take, monkeypatch):
    for name, value in (("RANK", 1), ("SIZE", 3), ("LOCAL_RANK", 1), ("LOCAL_SIZE", 3)):
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", str(value))
    for arguments in ([], ["--use-mpi"]):
        launch = take(*arguments).launch
        assert (launch.launcher, launch.rank, launch.world_size) == ("openmpi", 1, 3)


@given(st.lists(st.text()))
def test_without_switches_arguments_stay_as_they_are(arguments):
    assert replace_switch_values(arguments, {}) == arguments


SWITCHES = {"--overlap": "--no-overlap", "--compress": None}
TRUE_WORDS, FALSE_WORDS = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")


def spelled(words: tuple[str, ...]) -> st.SearchStrategy[str]:
    """One of `words`, in any mixture of small and capital letters."""
    return st.sampled_from(words).flatmap(
        lambda word: st.tuples(*(st.sampled_from([c, c.upper()]) for c in word)).map("".join)
    )


@st.composite
def pieces(draw: st.DrawFn) -> tuple[list[str], list[str]]:
    """An option as somebody writes it, and as it should become."""
    kind = draw(st.sampled_from(["bare", "true", "false", "other"]))
    if kind == "other":
        value = draw(st.one_of(st.text(), st.sampled_from(TRUE_WORDS + FALSE_WORDS)))
        written = draw(
            st.sampled_from([["--model", value], [f"--model={value}"], ["--no-overlap"]])
        )
        return written, written
    name = draw(st.sampled_from(sorted(SWITCHES)))
    if kind == "bare":
        return [name], [name]
    word = draw(spelled(TRUE_WORDS if kind == "true" else FALSE_WORDS))
    written = draw(st.sampled_from([[name, word], [f"{name}={word}"]]))
    opposite = SWITCHES[name]
    return written, [name] if kind == "true" else [opposite] if opposite else []


@given(st.lists(pieces()))
def test_values_of_switches_become_the_switch_or_its_opposite(written_and_wanted):
    written = [argument for piece, _ in written_and_wanted for argument in piece]
    wanted = [argument for _, piece in written_and_wanted for argument in piece]
    assert replace_switch_values(written, SWITCHES) == wanted


@given(st.text().filter(lambda text: text.lower() not in TRUE_WORDS + FALSE_WORDS))
def test_another_word_is_no_value_of_a_switch(word):
    for arguments in (["--overlap", word], [f"--overlap={word}"]):
        assert replace_switch_values(arguments, SWITCHES) == arguments


def test_help_fits_a_terminal_with_every_option_in_full():
    result = invoke("--help")
    assert result.exit_code == 0
    assert max(map(len, result.output.splitlines())) <= 80
    assert "…" not in result.output
    named = set(re.findall(r"--[a-z][a-z-]*[a-z]", result.output))
    renamed = {"comm_timeout_s": "comm_timeout"}
    names = {renamed.get(field.name, field.name) for field in fields(DistConfig)}
    names |= {"head_ip", "port", "use_mpi", "rank", "local_rank", "world_size", "quiet", "dry_run"}
    assert {f"--{name.replace('_', '-')}" for name in names} <= named


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        (["dist", "--help"], {}),
        ([], {"_FLEXBENCH_COMPLETE": "complete_bash", "COMP_WORDS": "flexbench dist --", "COMP_CWORD": "2"}),
    ],
)  # fmt: skip
def test_help_and_completion_import_nothing_heavy(arguments, environment):
    code = (
        "import sys, atexit\n"
        "atexit.register(lambda: print('MODULES', *sys.modules, file=sys.stderr))\n"
        f"sys.argv = ['flexbench', *{arguments!r}]\n"
        "from flexbench.cli import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    imported = done.stderr.partition("MODULES ")[2].split()
    assert "flexbench.dist.command" in imported
    assert {"torch", "numpy", "psutil", "safetensors"}.isdisjoint(imported)


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--percent", 60, 60, 100, 0, 100, 0], "--percent: weights: 60 on gpu and 60 on cpu are together over 100"),
        (["--percent", 100, 0, 50, 51, 100, 0], "--percent: cache: 50 on gpu and 51 on cpu"),
        (["--percent", 100, 0, 100, 0, 0, 101], "--percent: activations on cpu must be between 0 and 100, not 101"),
        (["--percent", -1, 100, 100, 0, 100, 0], "--percent: weights on gpu must be between 0 and 100, not -1"),
        (["--percent", 100, 0, 0, 0, 100], "--percent: takes six numbers"),
        (["--percent", 100, 0, 0, 0, 100, 0, 0], "--percent: takes six numbers"),
        (["--percent", 100], "--percent: takes six numbers"),
        (["--percent", 100, 0, "nan", 0, 100, 0], "--percent: cache on gpu must be between 0 and 100, not nan"),
        (["--percent", 100, 0, 0, "inf", 100, 0], "--percent: cache on cpu must be between 0 and 100, not inf"),
        (["--gpu-batch-size", 0], "--gpu-batch-size: must be a whole number of at least 1, not 0"),
        (["--gpu-batch-size", 10**400], "--gpu-batch-size: must be a whole number of at most"),
        (["--num-gpu-batches", 0], "--num-gpu-batches: must be a whole number of at least 1, not 0"),
        (["--num-inner-iterations", 0], "--num-inner-iterations"),
        (["--gen-len", 0], "--gen-len: must be a whole number of at least 1, not 0"),
        (["--prompt-len", 0], "--prompt-len"),
        (["--prompt-len", -7], "--prompt-len: must be a whole number of at least 1, not -7"),
        (["--cut-gen-len", 1], "--cut-gen-len: must be at least 2, not 1"),
        (["--cut-gen-len", 0], "--cut-gen-len: must be at least 2, not 0"),
        (["--cut-gen-len", -1], "--cut-gen-len"),
        (["--cut-gen-len", 5, "--stop", 2], "--stop: nobody knows how many tokens --cut-gen-len"),
        (["--debug-mode", "breakdown", "--stop", 2], "--stop: nobody knows how many tokens --debug-mode"),
        (["--debug-mode", "breakdown", "--cut-gen-len", 5], "--debug-mode: cannot be combined with --cut-gen-len"),
        (["--debug-mode", "slow"], "--debug-mode: unknown value 'slow'; accepted: fewer_batch, breakdown"),
        (["--dtype", "int8"], "--dtype: unknown value 'int8'; accepted: auto, float32, float16, bfloat16"),
        (["--comm-device", "tpu"], "--comm-device: unknown value 'tpu'; accepted: gpu, cpu"),
        (["--balance", "luck"], "--balance: unknown value 'luck'; accepted: layers, memory, time"),
        (["--temperature", 0, "--do-sample"], "--temperature: must be above 0, not 0"),
        (["--temperature", "nan", "--do-sample"], "--temperature"),
        (["--temperature", "inf", "--do-sample"], "--temperature"),
        (["--temperature", "0.5"], "--temperature: changes nothing without --do-sample"),
        (["--attn-sparsity", 0], "--attn-sparsity: must be above 0 and at most 1, not 0"),
        (["--attn-sparsity", 1.5], "--attn-sparsity: must be above 0 and at most 1, not 1.5"),
        (["--attn-sparsity", "nan"], "--attn-sparsity"),
        (["--seed", -1], "--seed"),
        (["--seed", 2**32], "--seed"),
        (["--stop", -1], "--stop"),
        (["--verbose", -1], "--verbose"),
        (["--rank", 0], "--world-size: is needed together with --rank"),
        (["--world-size", 2], "--rank: is needed together with --world-size"),
        (["--world-size", 0, "--rank", 0], "--world-size"),
        (["--world-size", 2, "--rank", 2, "--port", 9], "--rank: must be below --world-size, 2, not 2"),
        (["--world-size", 2, "--rank", -1, "--port", 9], "--rank"),
        (["--local-rank", -1], "--local-rank"),
        (["--use-mpi"], "--use-mpi: this process was not started by an MPI launcher"),
        (["--comm-timeout", 0], "--comm-timeout: must be a number of seconds above 0, not 0"),
        (["--comm-timeout", "nan"], "--comm-timeout"),
        (["--comm-timeout", "inf"], "--comm-timeout"),
    ],
)  # fmt: skip
def test_bad_values_are_refused_with_the_accepted_ones(arguments, message, tmp_path):
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stdout == ""
    assert left_in(tmp_path) == []


@pytest.mark.usefixtures("_needs_torch")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt-len", 2040], "--prompt-len: 2040 + 32 (--gen-len) are more than the 2048 positions of facebook/opt-125m"),
        (["--gen-len", 2000], "--prompt-len: 512 + 2000 (--gen-len) are more than the 2048 positions"),
        (["--stop", 50272], "--stop: must be a token below 50272, not 50272"),
        (["--model", "facebook/opt-9b"], "--model: unknown model 'facebook/opt-9b'; accepted: facebook/opt-125m"),
        (["--model", ""], "--model: unknown model ''"),
        (["--path", "no/such/folder"], "--path: there is no folder no/such/folder"),
        (["--path", "./nothing"], "--path: there is no folder ./nothing"),
        (["--world-size", 13, "--rank", 0, "--port", 9], "--world-size: 13 pipeline stages cannot share the 12 transformer layers"),
        (["--debug-mode", "breakdown", "--world-size", 2, "--rank", 0, "--port", 9], "--debug-mode: projects from a part of the layers"),
        (["--world-size", 2, "--rank", 0], "--port: is needed together with --rank and --world-size"),
        (["--world-size", 2, "--rank", 0, "--port", 29500, "--head-ip", "0.0.0.0"], "--head-ip: must be the address of one interface"),
        (["--world-size", 2, "--rank", 0, "--port", 29500, "--head-ip", "192.0.2.1"], "--head-ip: rank 0 cannot listen at 192.0.2.1:29500"),
        (["--offload-dir", "/proc/offload", "--percent", 0, 0, 0, 0, 0, 0], "--offload-dir: cannot write to /proc/offload"),
        (["--offload-dir", "/proc/offload", "--percent", 0, 0, 0, 0, 0, 0, "--allow-overcommit"], "--offload-dir: cannot write to /proc/offload"),
        (["--output", "."], "--output: "),
        (["--output", "/proc/dist.tsv"], "--output: cannot write to /proc"),
        (["--output", "dist.jsonl"], "--output: dist.jsonl is where the JSON records go"),
        (["--log-file", "/proc/my.log"], "--log-file: cannot write to /proc/my.log"),
        (["--log-file", ""], "--log-file: "),
        (["--log-file", "."], "--log-file: "),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_is_left(arguments, message, tmp_path):
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert files_in(tmp_path) == []


@pytest.mark.usefixtures("_needs_torch")
@pytest.mark.parametrize("port", [0, -1, 70000, 10**30])
@pytest.mark.parametrize(
    "more",
    [
        ["--world-size", 2, "--rank", 0, "--comm-timeout", 1],
        ["--world-size", 2, "--rank", 1, "--comm-timeout", 1],
        ["--world-size", 2, "--rank", 0, "--dry-run"],
        ["--dry-run"],
    ],
)
def test_what_is_no_port_is_refused_by_every_rank(more, port, tmp_path, monkeypatch):
    monkeypatch.setattr("flexbench.ranks.rank._PATIENCE_S", 0)
    result = invoke(*more, "--port", port)
    assert result.exit_code == 2, result.output
    assert "--port" in result.stderr
    assert files_in(tmp_path) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["--gpu-batch-size", "many"],
        ["--percent", "a", "b"],
        ["--percent"],
        ["--gen-len", "1.5"],
        ["--overlap", "maybe"],
        ["--nothing"],
        ["something"],
    ],
)
def test_values_of_another_kind_are_refused(arguments, tmp_path):
    assert invoke(*arguments).exit_code == 2
    assert left_in(tmp_path) == []


def test_a_folder_with_another_model_than_named_is_refused(tiny):
    result = invoke("--model", "facebook/opt-125m", "--path", tiny, *SHORT)
    assert result.exit_code == 2
    assert f"--path: {tiny} holds a model with hidden_size 32, but facebook/opt-125m has 768" in (
        result.stderr
    )


def test_a_model_s_limits_come_from_its_folder(tiny):
    for arguments, message in (
        (("--prompt-len", 100, "--gen-len", 29), "more than the 128 positions of tiny"),
        ((*SHORT, "--stop", 128), "--stop: must be a token below 128, not 128"),
        (
            (*SHORT, "--world-size", 5, "--rank", 0, "--port", 9),
            "--world-size: 5 pipeline stages cannot share the 4 transformer layers of tiny",
        ),
    ):
        result = invoke("--model", tiny, *arguments)
        assert result.exit_code == 2
        assert message in result.stderr


def test_an_output_that_is_something_else_is_refused(tiny, tmp_path):
    (tmp_path / "notes.txt").write_text("my notes\n")
    result = invoke("--model", tiny, *SHORT, "--output", "notes.txt")
    assert result.exit_code == 2
    assert "notes.txt:1: expected 7 tab-separated columns, found 1" in result.stderr
    assert (tmp_path / "notes.txt").read_text() == "my notes\n"


@pytest.mark.parametrize("package", ["torch", "numpy", "psutil"])
def test_a_missing_package_is_one_line_that_names_the_command(package, tmp_path, request):
    if package != "torch":  # the first to be missed
        request.getfixturevalue("_needs_torch")
    # What is None in sys.modules cannot be imported, nor found.
    code = (
        f"import sys; sys.modules.update({package}=None)\n"
        "sys.argv = ['flexbench', 'dist', '--gen-len', '2', '--prompt-len', '2']\n"
        "from flexbench.cli import main; main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    # Without numpy, torch itself has something to say before.
    assert done.stderr.strip().splitlines()[-1] == (
        f"Error: flexbench dist needs {package}, which is not installed: "
        "pip install 'flexbench[dist]'"
    )
    assert files_in(tmp_path) == []


def test_a_missing_safetensors_is_said_when_weights_need_it(tiny):
    code = (
        "import sys; sys.modules.update(safetensors=None)\n"
        f"sys.argv = ['flexbench', 'dist', '--gen-len=2', '--prompt-len=2', '--model', {str(tiny)!r}]\n"
        "from flexbench.cli import main; main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "safetensors" in done.stderr.splitlines()[-1]
    assert "pip install" in done.stderr.splitlines()[-1]


# --- what would be done ------------------------------------------------------------------------

KINDS = ("weights", "cache", "activations")
NUMBER = r"[\d.]+(?:e[+-]?\d+)?"


def shares_in(output: str) -> list[dict[str, tuple[float, ...]]]:
    """Of each stage in the placement table, the placed shares of the three kinds, in percent."""
    found = []
    for line in output.splitlines():
        words = line.split()
        if len(words) < 7 or not set(KINDS) & set(words[:2]):
            continue
        kind = next(kind for kind in KINDS if kind in words[:2])
        if kind == KINDS[0]:
            found.append({})
        found[-1][kind] = tuple(map(float, words[-3:]))
    return found


def test_a_dry_run_shows_the_placement_and_creates_nothing(tiny, tmp_path, monkeypatch):
    def refuse(*arguments: object, **more: object) -> None:
        raise AssertionError("a dry run allocates nothing")

    monkeypatch.setattr("flexbench.dist.homes.TorchDevice.allocate", refuse)
    monkeypatch.setattr("flexbench.dist.homes.TorchDisk.allocate", refuse)
    monkeypatch.setattr("flexbench.ranks.watch.PeerWatch.__init__", refuse)
    offload_dir = tmp_path / "offload"
    result = invoke(
        *(
            "--model",
            tiny,
            *SHORT,
            "--percent",
            30,
            20,
            50,
            25,
            0,
            50,
            "--offload-dir",
            offload_dir,
        ),
        *("--world-size", 2, "--rank", 0, "--port", 29500, "--dry-run"),
    )
    assert result.exit_code == 0, result.output
    assert left_in(tmp_path) == []
    assert result.stderr == ""
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "tiny: 4 layers, hidden size 32, 4 heads" in result.stdout
    assert "2 stages" in result.stdout
    assert str(offload_dir) in result.stdout.replace("\n", "").replace(" ", "")
    stages = shares_in(result.stdout)
    assert len(stages) == 2
    for stage in stages:
        assert stage["cache"] == (50, 25, 25)
        assert stage["activations"] == pytest.approx((0, 50, 50), abs=1)
        # Within half a row of a tensor, of which the largest has 16 KiB here.
        assert stage["weights"] == pytest.approx((30, 20, 50), abs=2)


@pytest.mark.usefixtures("_needs_torch")
def test_the_largest_model_can_be_planned_anywhere(monkeypatch):
    monkeypatch.setattr("flexbench.core.environment.available_memory_bytes", lambda: 2**20)
    result = invoke("--model", "facebook/opt-175b", "--dtype", "float16", "--dry-run")
    assert result.exit_code == 0
    assert "facebook/opt-175b: 96 layers, hidden size 12288, 96 heads" in result.stdout
    assert "325 GiB" in result.stdout or "324 GiB" in result.stdout


def test_only_rank_0_shows_the_plan(tiny):
    arguments = ("--model", tiny, *SHORT, "--world-size", 2, "--port", 29500, "--dry-run")
    assert "Placement of tiny" in invoke(*arguments, "--rank", 0).stdout
    assert invoke(*arguments, "--rank", 1).output == ""


@pytest.mark.parametrize(
    "options",
    [
        ["--percent", 20, 80, 0, 100, 0, 100],
        ["--percent", 33.3, 33.3, 33.3, 33.3, 33.3, 33.3],
        ["--percent", 0, 50, 30, 0, 70, 20, "--no-sep-layer", "--num-gpu-batches", 3],
        ["--percent", 1, 0, 1, 1, 1, 1, "--compress-weight", "--compress-cache"],
        ["--percent", 0, 0, 0, 0, 0, 0, "--no-overlap"],
    ],
)
def test_what_is_printed_is_what_is_placed(options, tiny, tmp_path, monkeypatch):
    """The shares in the table, and the record's bytes, against every allocation that is made."""
    from flexbench.dist.homes import TorchMixedDevice
    from flexbench.dist.weights import LayerWeights

    placed: dict[str, list[int]] = {}
    allocate = TorchMixedDevice.allocate

    def watched(self: Any, shapes: Any, dtype: Any, *, pin: bool = False) -> Any:
        caller = Path(sys._getframe(1).f_code.co_filename).stem
        sizes = placed.setdefault(caller, [0, 0, 0])
        for index, shape in enumerate(shapes):
            sizes[index] += math.prod(shape) * dtype.itemsize
        return allocate(self, shapes, dtype, pin=pin)

    def keep_watched(self: Any, form: Any, weight: Any) -> None:
        before = self._gpu.ledger.allocated_bytes
        keep(self, form, weight)
        placed["weights"][0] += self._gpu.ledger.allocated_bytes - before

    keep = LayerWeights._keep
    monkeypatch.setattr(LayerWeights, "_keep", keep_watched)
    monkeypatch.setattr(TorchMixedDevice, "allocate", watched)
    monkeypatch.setenv("COLUMNS", "120")  # lines in full
    # Two tokens are what the warm-up has, too: cache and activations are allocated twice, alike.
    result = invoke(
        *("--model", tiny, "--prompt-len", 16, "--gen-len", 2, *options),
        *("--offload-dir", tmp_path / "offload"),
    )
    assert result.exit_code == 0, result.output
    assert left_in(tmp_path / "offload") == []
    placed["cache"] = [size // 2 for size in placed["cache"]]
    placed["activations"] = [size // 2 for size in placed["activations"]]
    (stage,) = record_in(tmp_path)["placement"]
    (shares,) = shares_in(result.stdout)
    for kind in KINDS:
        assert [stage[kind][home] for home in ("gpu", "cpu", "disk")] == placed[kind], kind
        total = sum(placed[kind])
        actual = [100 * size / total for size in placed[kind]]
        assert shares[kind] == pytest.approx(actual, rel=0.006), kind


def test_the_offload_folder_in_memory_is_said_to_be_so(tiny):
    if not os.path.ismount("/dev/shm"):
        pytest.skip("/dev/shm is not mounted here")
    arguments = ("--model", tiny, *SHORT, "--dry-run", "--offload-dir", "/dev/shm/offload")
    result = invoke(*arguments, "--percent", 0, 0, 100, 0, 100, 0)
    assert "no disk is measured" in " ".join(result.stdout.split())
    assert "no disk is measured" not in " ".join(invoke(*arguments).stdout.split())


def test_what_does_not_fit_into_memory_is_refused_unless_one_insists(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("flexbench.core.environment.available_memory_bytes", lambda: 2**16)
    result = invoke("--model", tiny, *SHORT)
    assert result.exit_code == 2
    assert "--percent: memory has 64 KiB free, and the placement takes" in result.stderr
    assert "--allow-overcommit" in result.stderr
    # It was no run: neither a row nor a record is kept of it, nor an empty log.
    assert files_in(tmp_path) == []
    result = invoke("--model", tiny, *SHORT, "--allow-overcommit")
    assert result.exit_code == 0, result.output


@pytest.mark.usefixtures("_needs_torch")
def test_a_huge_model_is_refused_before_it_is_loaded(monkeypatch):
    def refuse(*arguments: object, **more: object) -> None:
        raise AssertionError("loaded all the same")

    monkeypatch.setattr("flexbench.core.environment.available_memory_bytes", lambda: 100 * GIB)
    monkeypatch.setattr("flexbench.dist.stage.DistOptLM", refuse)
    result = invoke("--model", "facebook/opt-175b")
    assert result.exit_code == 2
    assert "memory has 100 GiB free, and the placement takes" in result.stderr
    result = invoke("--model", "facebook/opt-175b", "--allow-overcommit")
    assert "loaded all the same" in str(result.exception)


@pytest.mark.usefixtures("_needs_torch")
def test_the_disk_is_looked_at_too(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "shutil.disk_usage", lambda path: type("Usage", (), {"free": 5 * GIB, "total": 0})
    )
    folder = tmp_path / "offload"
    result = invoke("--model", "opt-30b", "--percent", 0, 0, 0, 0, 0, 0, "--offload-dir", folder)
    assert result.exit_code == 2
    assert f"the disk of {folder} has 5 GiB free" in result.stderr
    assert left_in(folder) == []


def test_memory_that_is_not_there_after_all_is_an_error_of_the_run(tiny, tmp_path):
    """What malloc refuses at once: more than any machine has."""
    values = json.loads((tiny / "config.json").read_text()) | {"ffn_dim": 2**36}
    (tmp_path / "huge").mkdir()
    (tmp_path / "huge" / "config.json").write_text(json.dumps(values))
    result = invoke("--model", "huge", "--path", "_DUMMY_", *SHORT, "--allow-overcommit")
    assert result.exit_code == 1, result.output
    assert "Error: out of memory: " in result.stderr
    record = record_in(tmp_path)
    assert record["status"] == "failed"
    assert record["error"].startswith("out of memory")


# --- a run in one process ----------------------------------------------------------------------


def check_figures(record: dict[str, Any]) -> None:
    """What has to hold between the figures of any run."""
    figures, run = record["figures"], record["run"]
    total = figures["prefill_latency"] + figures["decode_latency"]
    assert figures["total_latency"] == pytest.approx(total)
    assert figures["prefill_latency"] > 0
    prompts = run["gpu_batch_size"] * run["num_gpu_batches"] * run["num_inner_iterations"]
    assert run["num_prompts"] == prompts
    assert figures["prompt_tokens"] == prompts * run["prompt_len"]
    assert figures["prefill_throughput"] * figures["prefill_latency"] == pytest.approx(
        figures["prompt_tokens"]
    )
    assert figures["total_throughput"] * total == pytest.approx(figures["total_tokens"])
    if figures["decode_latency"] == 0:
        assert figures["decode_throughput"] is None
    else:
        decoded = figures["decode_throughput"] * figures["decode_latency"]
        assert decoded == pytest.approx(figures["total_tokens"] - prompts)


def test_a_run_is_kept_as_a_row_and_a_record(tiny, tmp_path):
    options = ("--gpu-batch-size", 2, "--num-gpu-batches", 3, "--percent", 30, 40, 0, 50, 10, 10)
    folder = tmp_path / "offload"
    result = invoke("--model", tiny, *SHORT, *options, "--offload-dir", folder, "--seed", 5)
    assert result.exit_code == 0, result.output
    assert left_in(folder) == []

    record = record_in(tmp_path)
    check_figures(record)
    assert record["status"] == "ok"
    assert record["system"] == "dist"
    assert record["run"]["num_prompts"] == 6
    assert record["figures"]["total_tokens"] == 6 * 8
    assert record["figures"]["projected"] is False
    assert record["figures"]["bubble_fraction"] == 0
    assert set(record["configuration"]) == {field.name for field in fields(DistConfig)}
    assert record["configuration"]["percent"] == [30, 40, 0, 50, 10, 10]
    assert record["configuration"]["offload_dir"] == str(folder)
    assert record["model"]["hidden_size"] == 32
    assert record["model"]["weights"] == "real"
    assert record["model"]["dtype"] in ("float32", "float16")
    assert record["launcher"] == "none"
    assert {"python", "flexbench", "torch", "numpy", "safetensors"} <= set(record["versions"])
    assert None not in record["versions"].values()
    assert record["machine"]["num_cpus"] >= 1
    assert record["command"][0]
    (stage,) = record["stages"]
    (placement,) = record["placement"]
    assert stage["rank"] == placement["rank"] == 0
    assert stage["layers"] == placement["layers"] == [0, 4]
    assert stage["num_threads"] == 1
    disk = sum(placement[kind]["disk"] for kind in KINDS)
    assert stage["disk_peak_bytes"] == disk > 0
    assert stage["cpu_peak_bytes"] > 10 * 2**20
    assert stage["wall_s"] >= stage["compute_s"] > 0
    assert stage["send_s"] == stage["receive_s"] == 0
    assert len(stage["token_ends_s"]) == 8
    assert stage["token_ends_s"] == sorted(stage["token_ends_s"])
    assert stage["token_ends_s"][-1] == pytest.approx(record["figures"]["total_latency"])
    # With --sep-layer: two embeddings, and attention and MLP of four layers.
    assert sorted(stage["prefill_layer_s"], key=int) == [str(index) for index in range(10)]

    (row,) = read_rows(tmp_path / "results" / "dist.tsv")
    assert (row.batch_size, row.num_micro_batches, row.num_processes) == (2, 3, 1)
    assert (row.sequence_length, row.max_tokens) == (16, 8)
    assert row.throughput == record["figures"]["total_throughput"]
    assert row.mean_latency == record["figures"]["total_latency"]
    report = CliRunner().invoke(app, ["report", "results/dist.tsv", "--format", "json"])
    assert report.exit_code == 0, report.output
    assert f"{row.throughput}" in report.output


def test_every_run_is_appended_and_a_report_groups_them(tiny, tmp_path):
    for _ in range(2):
        assert invoke("--model", tiny, *SHORT).exit_code == 0
    result = invoke("--model", tiny, *SHORT, "--compress-weight")
    assert "has runs with another compress_weight" in " ".join(result.stderr.split())
    assert len(list(read_rows(tmp_path / "results" / "dist.tsv"))) == 3
    assert len((tmp_path / "results" / "dist.jsonl").read_text().splitlines()) == 3
    report = CliRunner().invoke(app, ["report", "results/dist.tsv", "--format", "csv"])
    runs = [line.rpartition(",")[2] for line in report.output.splitlines()[1:]]
    assert sorted(runs) == ["1", "2"]  # the record beside the rows tells compressed weights apart


LOG = re.compile(
    r"model size: \d+\.\d{3} GB\tcache size: \d+\.\d{3} GB\thidden size \(p\): \d+\.\d{3} GB\n"
    r"peak gpu mem: \d+\.\d{3} GB\tprojected: (True|False)\n"
    r"prefill latency: (\d+\.\d{3}) s\tprefill throughput: \d+\.\d{3} token/s\n"
    r"decode latency: (\d+\.\d{3}) s\tdecode throughput: (\d+\.\d{3}) token/s\n"
    r"total latency: (\d+\.\d{3}) s\ttotal throughput: \d+\.\d{3} token/s\n"
)


def test_the_log_has_the_form_and_the_name_of_flexgen_s(tiny, tmp_path):
    options = ("--gpu-batch-size", 1, "--percent", 20, 80, 0, 100, 0, 100)
    for _ in range(2):
        assert invoke("--model", tiny, *SHORT, *options).exit_code == 0
    name = "fo-tiny-gbs1-ngbs1-prompt16-gen8-percent-20-80-0-100-0-100-gpu-cache.log"
    found = list(LOG.finditer((tmp_path / "results" / name).read_text()))
    assert len(found) == 2
    assert found[1].end() == len((tmp_path / "results" / name).read_text())
    assert found[0][1] == "False"
    records = (tmp_path / "results" / "dist.jsonl").read_text().splitlines()
    for match, line in zip(found, records, strict=True):
        figures = json.loads(line)["figures"]
        assert match[2] == f"{figures['prefill_latency']:.3f}"
        assert match[3] == f"{figures['decode_latency']:.3f}"
        assert match[5] == f"{figures['total_latency']:.3f}"


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--compress-weight", "--compress-cache", "--num-gpu-batches", 2], "fo-tiny-gbs4-ngbs2-prompt16-gen8-percent-100-0-100-0-100-0-gpu-cache-compw-compc.log"),
        (["--cpu-cache-compute", "--percent", 0, 100, 0, 100, 0, 100], "fo-tiny-gbs4-ngbs1-prompt16-gen8-percent-0-100-0-100-0-100-cpu-cache.log"),
        (["--percent", 12.5, 0, 100, 0, 100, 0], "fo-tiny-gbs4-ngbs1-prompt16-gen8-percent-12.5-0-100-0-100-0-gpu-cache.log"),
    ],
)  # fmt: skip
def test_the_log_s_name_holds_the_options(options, name, tiny, tmp_path):
    assert invoke("--model", tiny, *SHORT, *options, "--offload-dir", tmp_path).exit_code == 0
    assert [path.name for path in (tmp_path / "results").glob("*.log")] == [name]


def test_the_log_can_be_named_or_left_out(tiny, tmp_path):
    assert invoke("--model", tiny, *SHORT, "--log-file", "logs/my.log").exit_code == 0
    assert LOG.fullmatch((tmp_path / "logs" / "my.log").read_text())
    assert invoke("--model", tiny, *SHORT, "--no-log").exit_code == 0
    assert left_in(tmp_path) == [
        "logs",
        "logs/my.log",
        "results",
        "results/dist.jsonl",
        "results/dist.tsv",
    ]


@pytest.mark.parametrize(
    ("options", "num_tokens", "num_layers"),
    [
        (["--cut-gen-len", 3], 3, 10),
        (["--debug-mode", "fewer_batch"], 2, 10),
        # 20 steps a token: with 20 batches, two of the eight layers between the embeddings.
        (["--debug-mode", "fewer_batch", "--num-gpu-batches", 20], 2, 4),
        (["--debug-mode", "breakdown", "--num-gpu-batches", 20], 2, 4),
        (["--debug-mode", "breakdown", "--num-gpu-batches", 20, "--no-sep-layer"], 2, 4),
    ],
)
def test_what_is_projected_is_marked_everywhere(options, num_tokens, num_layers, tiny, tmp_path):
    result = invoke("--model", tiny, *SHORT, "--gpu-batch-size", 1, *options)
    assert result.exit_code == 0, result.output
    assert "16 + 8 tokens (projected)" in result.stdout
    assert f"of which {num_tokens} are generated" in " ".join(result.stdout.split())
    record = record_in(tmp_path)
    check_figures(record)
    figures = record["figures"]
    assert figures["projected"] is True
    assert figures["total_tokens"] == 8 * record["run"]["num_prompts"]
    (log,) = (tmp_path / "results").glob("*.log")
    match = LOG.fullmatch(log.read_text())
    assert match is not None
    assert match[1] == "True"
    # The figures follow from what was really done, as docs/metrics.md says.
    (stage,) = record["stages"]
    prefill, decode = stage["prefill_layer_s"], stage["decode_layer_s"]
    assert len(prefill) == num_layers
    assert len(stage["token_ends_s"]) == num_tokens
    if num_layers == 10:
        ends = stage["token_ends_s"]
        expected = ends[0], (ends[-1] - ends[0]) * 7 / (num_tokens - 1)
    else:
        inner = 4 if "--no-sep-layer" in options else 8
        weights = {"0": 1, "1": inner / 2, "2": inner / 2, "3": 1}
        expected = tuple(
            sum(seconds[layer] * weight for layer, weight in weights.items())
            for seconds in (prefill, decode)
        )
        expected = expected[0], expected[1] * 7
    assert (figures["prefill_latency"], figures["decode_latency"]) == pytest.approx(expected)


def test_a_cut_that_leaves_everything_is_no_projection(tiny, tmp_path):
    result = invoke("--model", tiny, *SHORT, "--cut-gen-len", 8)
    assert result.exit_code == 0, result.output
    assert "projected" not in result.stdout
    assert record_in(tmp_path)["figures"]["projected"] is False


def test_one_new_token_has_no_decoding(tiny, tmp_path):
    result = invoke("--model", tiny, "--prompt-len", 16, "--gen-len", 1)
    assert result.exit_code == 0, result.output
    record = record_in(tmp_path)
    check_figures(record)
    assert record["figures"]["decode_latency"] == 0
    assert record["figures"]["decode_throughput"] is None
    (decode,) = (line for line in result.stdout.splitlines() if line.split()[:1] == ["decode"])
    assert decode.split() == ["decode", "0.000", "-"]
    (log,) = (tmp_path / "results").glob("*.log")
    match = LOG.fullmatch(log.read_text())
    assert match is not None
    assert match[4] == "0.000"
    assert CliRunner().invoke(app, ["report", "results/dist.tsv"]).exit_code == 0


def test_stopped_prompts_count_their_tokens_up_to_the_stop(tiny, tmp_path):
    """Against the tokens of a run that does not stop."""
    shown = ("--gpu-batch-size", 1, "--num-gpu-batches", 2, "--verbose", 2, "--no-log")
    prompts = tokens_in(invoke("--model", tiny, *SHORT, *shown, "--output", "all.tsv").stdout)
    assert set(prompts) == {0, 1}
    stop = prompts[0][3]
    expected = sum(
        tokens.index(stop) + 1 if stop in tokens else len(tokens) for tokens in prompts.values()
    )
    result = invoke("--model", tiny, *SHORT, *shown, "--stop", stop)
    assert result.exit_code == 0, result.output
    figures = record_in(tmp_path)["figures"]
    assert figures["total_tokens"] == expected < 16
    stopped = tokens_in(result.stdout)[0]
    end = stopped.index(stop) + 1
    assert stopped[:end] == prompts[0][:end]


def tokens_in(output: str) -> dict[int, list[int]]:
    """The prompts' new tokens, which --verbose 2 shows."""
    found = re.findall(r"^Prompt (\d+): (\[[\d,\s]*\])", output, re.MULTILINE)
    return {int(prompt): json.loads(tokens) for prompt, tokens in found}


def test_verbose_says_how_much_is_shown(tiny):
    shown = [invoke("--model", tiny, *SHORT, "--verbose", verbose).stdout for verbose in (0, 1, 2)]
    for output in shown:
        assert "tiny, 1 stage, 16 + 8 tokens" in output
        assert "Added to results/dist.tsv" in output
        assert max(map(len, output.splitlines())) <= 80
    for heading in ("Placement of tiny", "Seconds of each stage", "Peak memory"):
        assert [heading in output for output in shown] == [False, True, True]
    assert [len(tokens_in(output)) for output in shown] == [0, 0, 2]
    assert all(len(tokens) == 8 for tokens in tokens_in(shown[2]).values())


def test_the_same_seed_gives_the_same_tokens(tiny):
    def tokens(*options: object) -> dict[int, list[int]]:
        return tokens_in(invoke("--model", tiny, *SHORT, "--verbose", 2, *options).stdout)

    assert tokens("--seed", 1) == tokens("--seed", 1) != tokens("--seed", 2)
    sampled = ("--do-sample", "--temperature", 2)
    assert tokens(*sampled) == tokens(*sampled) != tokens()
    assert tokens(*sampled) != tokens(*sampled, "--seed", 3)


@pytest.mark.parametrize("verbose", [0, 2])
def test_quiet_shows_nothing_and_keeps_everything(verbose, tiny, tmp_path):
    result = invoke("--model", tiny, *SHORT, "--quiet", "--verbose", verbose)
    assert (result.exit_code, result.output) == (0, "")
    check_figures(record_in(tmp_path))
    result = invoke("--model", tiny, *SHORT, "-q", "--gpu-batch-size", 0)
    assert "--gpu-batch-size" in result.stderr


def test_progress_goes_to_standard_error(tiny):
    result = invoke("--model", tiny, *SHORT)
    for phase in ("Loading weights", "Warm-up", "Run"):
        assert f"{phase}: done in" in result.stderr
        assert f"{phase}: done in" not in result.stdout


def test_what_people_type_is_shown_as_it_is(tiny, tmp_path):
    folder = tmp_path / "[red]tiny"
    folder.mkdir()
    for file in tiny.iterdir():
        (folder / file.name).symlink_to(file)
    output = tmp_path / "[bold]a[nothing].tsv"
    result = invoke("--model", folder, *SHORT, "--output", output)
    assert result.exit_code == 0, result.output
    shown = "".join(result.stdout.split())
    assert f"Weights{folder}" in shown
    assert f"Addedto{output}" in shown
    assert "Placement of [red]tiny" in result.stdout
    assert "[red]tiny, 1 stage" in result.stdout


def test_a_failed_run_leaves_a_record_and_no_row(tiny, tmp_path, monkeypatch):
    assert invoke("--model", tiny, *SHORT, "--log-file", "my.log").exit_code == 0
    log = (tmp_path / "my.log").read_text()

    def fail(*arguments: object, **more: object) -> None:
        raise RuntimeError("no such block\nand more")

    monkeypatch.setattr("flexbench.dist.pipeline.DistOptLM.generate", fail)
    result = invoke("--model", tiny, *SHORT, "--log-file", "my.log")
    assert result.exit_code == 1
    assert "Added to" not in result.output
    assert len(list(read_rows(tmp_path / "results" / "dist.tsv"))) == 1
    lines = (tmp_path / "results" / "dist.jsonl").read_text().splitlines()
    assert len(lines) == 2
    record = json.loads(lines[1])
    assert record["status"] == "failed"
    assert "no such block" in record["error"]
    assert "figures" not in record
    assert set(record["configuration"]) == {field.name for field in fields(DistConfig)}
    assert (tmp_path / "my.log").read_text() == log
    report = CliRunner().invoke(app, ["report", "results/dist.tsv"])
    assert report.exit_code == 0


def test_an_interrupted_run_leaves_a_record_too(tiny, tmp_path, monkeypatch):
    def interrupt(*arguments: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flexbench.dist.pipeline.DistOptLM.generate", interrupt)
    result = invoke("--model", tiny, *SHORT)
    assert result.exit_code == 130
    assert "Stopped by Ctrl-C." in result.stderr
    assert not (tmp_path / "results" / "dist.tsv").exists()
    assert record_in(tmp_path)["status"] == "interrupted"


def test_damaged_weights_are_named_and_are_no_run(tiny, tmp_path):
    folder = tmp_path / "damaged"
    folder.mkdir()
    (folder / "config.json").symlink_to(tiny / "config.json")
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    result = invoke("--model", folder, *SHORT)
    assert result.exit_code == 2, result.output
    assert f"{folder}/model.safetensors: cannot be read" in result.stderr
    assert not (tmp_path / "results" / "dist.jsonl").exists()


def test_results_that_cannot_be_kept_are_not_lost(tiny, tmp_path, monkeypatch):
    """A disk that is full at the end: the record is shown, so that the run was not for nothing."""

    def refuse(file: object, line: str) -> None:
        if len(line) > 100 and "status" in line:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("flexbench.core.results._write_line", refuse)
    result = invoke("--model", tiny, *SHORT)
    assert result.exit_code == 1
    assert "the result could not be written: No space left on device" in result.stderr
    shown = json.loads(result.stderr.strip().splitlines()[-1])
    assert shown["figures"]["total_tokens"] == 32


def test_a_configuration_names_what_is_wrong():
    """For programs: the same checks, without a command line."""
    with pytest.raises(ConfigError, match="--gen-len") as raised:
        DistConfig(gen_len=0)
    assert raised.value.exit_code == 2
    assert ResultsFile(DistConfig().output).records_path.name == "dist.jsonl"


def test_a_signal_that_comes_at_the_very_end_is_no_traceback():
    """mpirun sends SIGTERM to ranks that are about to end, when one has ended."""
    code = (
        "import atexit, os, signal, sys\n"
        "atexit.register(os.kill, os.getpid(), signal.SIGTERM)\n"
        "sys.argv = ['flexbench', 'dist', '--gpu-batch-size', '0']\n"
        "from flexbench.cli import main; main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr == "Error: --gpu-batch-size: must be a whole number of at least 1, not 0\n"


@pytest.mark.parametrize("asked", ["1", "0"])
def test_the_record_says_what_computed(asked, tiny, tmp_path, monkeypatch):

    from flexbench.dist.kernels import native

    monkeypatch.setenv("FLEXBENCH_NATIVE", asked)
    native.library.cache_clear()
    is_compiled = native.library() is not None
    assert invoke("--model", tiny, *SHORT).exit_code == 0
    native.library.cache_clear()
    assert not (asked == "0" and is_compiled)
    record = record_in(tmp_path)
    assert record["attention_kernel"] == ("compiled" if is_compiled else "torch")
    if is_compiled:
        assert record["linear_kernel"] == "compiled"
    else:
        assert record["linear_kernel"] in ("onednn", "torch")
