"""What `flexbench` does before any command runs."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

import flexbench
from flexbench.cli import COMMANDS, app

ROOT = Path(__file__).parents[2]
HEAVY = (
    *("torch", "transformers", "petals", "hivemind", "numpy"),
    *("tokenizers", "uvloop", "httptools", "orjson", "yaml", "duckdb", "pydantic"),
)
PICTURES = ("vl_convert", "plotext", "jinja2")
COMPLETIONS = {"bash": "bash", "zsh": "zsh", "fish": "fish", "powershell": "ps1"}


def modules_imported_by(*arguments: str, environment: dict[str, str] | None = None) -> set[str]:
    code = (
        "import sys, atexit\n"
        "atexit.register(lambda: print('MODULES', *sys.modules, file=sys.stderr))\n"
        f"sys.argv = ['flexbench', *{list(arguments)!r}]\n"
        "from flexbench.cli import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **(environment or {})},
    )
    assert done.returncode == 0, done.stderr
    return set(done.stderr.partition("MODULES ")[2].split())


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        (["--help"], {}),
        (["--version"], {}),
        (["petals", "--help"], {}),
        (["dist", "--help"], {}),
        (["server-config", "--help"], {}),
        (["serving", "--help"], {}),
        (["serving", "--api", "vllm", "--help"], {}),
        (["report", "--help"], {}),
        ([], {"_FLEXBENCH_COMPLETE": "source_bash"}),
        ([], {"_FLEXBENCH_COMPLETE": "complete_bash", "COMP_WORDS": "flexbench petals --", "COMP_CWORD": "2"}),
        ([], {"_FLEXBENCH_COMPLETE": "complete_bash", "COMP_WORDS": "flexbench serving --", "COMP_CWORD": "2"}),
    ],
)  # fmt: skip
def test_help_and_completion_import_nothing_heavy(arguments, environment):
    imported = modules_imported_by(*arguments, environment=environment)
    assert "flexbench.cli" in imported
    assert imported.isdisjoint(HEAVY)


def test_planning_and_reporting_import_nothing_heavy(tmp_path):
    output = str(tmp_path / "petals.tsv")
    imported = modules_imported_by("petals", "--dry-run", "--output", output)
    assert imported.isdisjoint(HEAVY)
    (tmp_path / "rows.tsv").write_text("1\t1\t1\t256\t32\t4.0\t8.0\n")
    imported = modules_imported_by("report", str(tmp_path / "rows.tsv"))
    assert imported.isdisjoint({*HEAVY, *PICTURES} - {"duckdb", "numpy"})  # what tables need


@pytest.mark.parametrize(("shell", "suffix"), COMPLETIONS.items())
def test_completion_files_are_current(shell, suffix):
    generated = subprocess.run(
        [Path(sys.executable).with_name("flexbench")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "_FLEXBENCH_COMPLETE": f"source_{shell}"},
    ).stdout
    stored = (ROOT / "completions" / f"flexbench.{suffix}").read_text()
    assert stored == generated.lstrip("\n"), "run ./scripts/completions"


def test_every_shell_has_a_completion_file():
    stored = {path.name for path in (ROOT / "completions").iterdir()}
    assert stored == {f"flexbench.{suffix}" for suffix in COMPLETIONS.values()}


def test_completion_offers_commands_and_models():
    def complete(words: str, index: int) -> list[str]:
        return subprocess.run(
            [Path(sys.executable).with_name("flexbench")],
            capture_output=True,
            text=True,
            check=True,
            env={
                **os.environ,
                "_FLEXBENCH_COMPLETE": "complete_bash",
                "COMP_WORDS": words,
                "COMP_CWORD": str(index),
            },
        ).stdout.split()

    assert complete("flexbench re", 1) == ["report"]
    assert complete("flexbench petals --prefix facebook/opt-1", 3) == [
        "facebook/opt-125m",
        "facebook/opt-1.3b",
        "facebook/opt-13b",
        "facebook/opt-175b",
    ]


def test_version():
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.output == f"flexbench {flexbench.__version__}\n"


def test_help_names_every_command():
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert "petals" in result.output
    assert "report" in result.output


@pytest.mark.parametrize("name", COMMANDS)
def test_the_overview_says_what_the_command_says_of_itself(name):
    module, summary = COMMANDS[name]
    command = get_command(import_module(module).app)
    assert command.help.splitlines()[0] == summary
    assert command.name == name


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_every_command_has_help(name, option):
    result = CliRunner().invoke(app, [name, option])
    assert result.exit_code == 0
    assert f"Usage: flexbench {name}" in result.output


def test_running_as_a_module_is_the_same_command():
    done = subprocess.run(
        [sys.executable, "-m", "flexbench", "--version"], capture_output=True, text=True
    )
    assert done.stdout == f"flexbench {flexbench.__version__}\n"


@pytest.mark.parametrize("arguments", [["nothing"], ["petals", "--nothing"], ["report"]])
def test_what_does_not_exist_is_wrong_input(arguments):
    assert CliRunner().invoke(app, arguments).exit_code == 2
