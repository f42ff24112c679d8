"""What `flexbench petals` refuses, and what it would do; nothing is started here."""

from __future__ import annotations

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from flexbench.cli import app

PEER = "/ip4/127.0.0.1/tcp/31337/p2p/QmXXXX"


def invoke(*arguments: object, output) -> tuple[int, str]:
    result = CliRunner().invoke(
        app, ["petals", "--dry-run", "--output", str(output), *map(str, arguments)]
    )
    return result.exit_code, result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-processes", 0], "--num-processes: must be a whole number of at least 1, not 0"),
        (["--num-processes", -1], "--num-processes"),
        (["--batch-size", 0], "--batch-size"),
        (["--num-micro-batches", 0], "--num-micro-batches"),
        (["--sequence-length", -5], "--sequence-length: must be a whole number of at least 1, not -5"),
        (["--sequence-length", 16, 0], "--sequence-length: must be a whole number of at least 1, not 0"),
        (["--max-tokens", -1], "--max-tokens: must be a whole number of at least 0, not -1"),
        (["--num-servers", 0], "--num-servers"),
        (["--num-servers", 13], "accepted: 1 to 12"),
        (["--prefix", "facebook/opt-9b"], "accepted: facebook/opt-125m, facebook/opt-350m"),
        (["--prefix", ""], "--prefix: unknown model ''"),
        (["--dtype", "int8"], "accepted: auto, float32, bfloat16, float16"),
        (["--dtype", "float16", "--device", "cpu"], "accepted there: float32, bfloat16"),
        (["--device", "tpu"], "accepted: auto, cpu, cuda, cuda:N"),
        (["--connect-timeout", 0], "--connect-timeout: must be a number of seconds above 0"),
        (["--run-timeout", "nan"], "--run-timeout"),
        (["--warmup-timeout", "inf"], "--warmup-timeout"),
        (["--server-timeout", -3], "--server-timeout"),
        (["--max-retries", 0], "--max-retries"),
        (["--seed", -1], "--seed"),
        (["--initial-peers", "127.0.0.1:31337"], "is not a peer's address; accepted: /ip4/ADDRESS"),
        (["--initial-peers", PEER, "nonsense"], "'nonsense' is not a peer's address"),
        (["--dht-prefix", "opt.6b"], "--dht-prefix"),
        (["--num-processes", 10**400], "--num-processes: must be a whole number of at most 1000000000"),
        (["--seed", 2**32], "--seed: must be a whole number of at most 4294967295"),
    ],
)  # fmt: skip
def test_bad_values_are_refused_with_the_accepted_ones(arguments, message, tmp_path):
    exit_code, output = invoke(*arguments, output=tmp_path / "petals.tsv")
    assert exit_code == 2
    assert message in output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [["--num-processes", "many"], ["--initial-peers"], ["--max-tokens", "1.5"]]
)
def test_values_of_another_kind_are_refused(arguments, tmp_path):
    assert invoke(*arguments, output=tmp_path / "petals.tsv")[0] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda"], "--device: this machine has no GPU; accepted here: auto, cpu"),
        (["--device", "cuda:1"], "--device: this machine has no GPU"),
        (["--dtype", "float16"], "this machine has no GPU; accepted here: float32, bfloat16"),
        (["--prefix", "facebook/opt-175b"], "choose a smaller model"),
    ],
)
def test_what_this_machine_cannot_do_is_refused_but_can_be_planned(
    arguments, message, tmp_path, monkeypatch
):
    monkeypatch.setattr("flexbench.petals.plan.may_have_gpu", lambda: False)
    monkeypatch.setattr("flexbench.petals.plan.memory_bytes", lambda: 2**30)
    output = tmp_path / "petals.tsv"
    result = CliRunner().invoke(app, ["petals", "--output", str(output), *arguments])
    assert result.exit_code == 2
    assert message in result.output
    assert list(tmp_path.iterdir()) == []
    result = CliRunner().invoke(app, ["petals", "--output", str(output), *arguments, "--dry-run"])
    assert result.exit_code == 0
    assert "expected tokens" in result.stdout
    assert message in result.stderr


def test_on_a_gpu_the_default_type_is_bfloat16(tmp_path, monkeypatch):
    monkeypatch.setattr("flexbench.petals.plan.may_have_gpu", lambda: True)
    monkeypatch.setattr("flexbench.petals.plan.num_gpus", lambda: 2)
    _, text = invoke(output=tmp_path / "petals.tsv")
    assert "blocks 0:6, 81.1 MiB of weights" in text
    _, text = invoke("--device", "cuda:2", output=tmp_path / "petals.tsv")
    assert "cuda:2 is not there; this machine has 2 GPUs" in text


@pytest.mark.parametrize("output", [".", "/", ""])
def test_an_output_without_a_name_is_refused(output):
    exit_code, text = invoke(output=output)
    assert exit_code == 2
    assert "--output: " in text


def test_a_link_to_nowhere_is_refused(tmp_path):
    (tmp_path / "petals.tsv").symlink_to(tmp_path / "missing" / "petals.tsv")
    exit_code, text = invoke(output=tmp_path / "petals.tsv")
    assert exit_code == 2
    assert "a link into a folder that does not exist" in text


def test_what_people_type_is_shown_as_it_is(tmp_path):
    output = tmp_path / "[bold]a[/nothing].tsv"
    exit_code, text = invoke("--dht-prefix", "[red]x", output=output)
    assert exit_code == 0
    assert "[bold]a[/nothing].tsv" in text.replace("\n", "").replace(" ", "")
    assert "[red]x" in text


@pytest.mark.parametrize("prefix", ["opt-30b", "Facebook/OPT-30B"])
def test_the_sweep_does_not_depend_on_the_spelling(prefix, tmp_path):
    _, text = invoke("--initial-peers", PEER, "--prefix", prefix, output=tmp_path / "petals.tsv")
    assert " 35 " in text


def test_an_output_that_is_a_folder_is_refused(tmp_path):
    exit_code, output = invoke(output=tmp_path)
    assert exit_code == 2
    assert f"--output: cannot write to {tmp_path}: is not a regular file" in output


def test_an_output_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    exit_code, output = invoke(output=tmp_path / "file" / "petals.tsv")
    assert exit_code == 2
    assert "--output: cannot write to" in output


def test_an_output_that_is_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("my notes\n")
    exit_code, output = invoke(output=tmp_path / "notes.txt")
    assert exit_code == 2
    assert "notes.txt:1: expected 7 tab-separated columns, found 1" in output
    assert (tmp_path / "notes.txt").read_text() == "my notes\n"


def test_an_output_called_like_the_records_is_refused(tmp_path):
    exit_code, output = invoke(output=tmp_path / "petals.jsonl")
    assert exit_code == 2
    assert "choose another suffix" in output


def test_an_output_in_an_unwritable_place_is_refused():
    exit_code, output = invoke(output="/proc/petals.tsv")
    assert exit_code == 2
    assert "--output: cannot write to /proc" in output


def test_the_plan_of_the_embedded_swarm(tmp_path):
    exit_code, output = invoke("--num-processes", 4, output=tmp_path / "petals.tsv")
    assert exit_code == 0
    assert "facebook/opt-125m: hidden size 768, 12 heads, 12 blocks" in output
    assert "blocks 0:6, 162 MiB of weights" in output
    assert "blocks 6:12, 162 MiB of weights" in output
    # 3 prompt lengths x 4 clients x 32 tokens
    assert output.split("all")[-1].split() == ["384"]
    assert list(tmp_path.iterdir()) == []


def test_the_plan_of_a_running_swarm_defaults_to_the_original_model(tmp_path):
    for option in ("--initial-peers", "--initial_peers"):
        exit_code, output = invoke(option, PEER, PEER, output=tmp_path / "petals.tsv")
        assert exit_code == 0
        assert "facebook/opt-175b: hidden size 12288, 96 heads, 96 blocks" in output
        assert "server 0" not in output


def test_opt_6_7b_is_looked_up_as_opt6b(tmp_path):
    _, output = invoke(
        "--initial-peers", PEER, "--prefix", "facebook/opt-6.7b", output=tmp_path / "petals.tsv"
    )
    assert "opt6b" in output.split("DHT prefix")[1].splitlines()[0]


def test_opt_30b_is_swept_by_default(tmp_path):
    peers = ("--initial-peers", PEER, "--prefix", "facebook/opt-30b")
    _, output = invoke(*peers, output=tmp_path / "petals.tsv")
    # 256, 512 and 1024 with 32 tokens, and 512 with 0 to 31; 512 with 32 is not measured twice.
    assert [line.split()[0] for line in output.splitlines() if line.split()[1:2] == ["512"]] == [
        "2",
        *(str(number) for number in range(4, 36)),
    ]
    _, output = invoke(*peers, "--no-sweep", output=tmp_path / "petals.tsv")
    assert output.split("all")[-1].split() == ["96"]
    _, output = invoke(*peers, "--sequence-length", 64, output=tmp_path / "petals.tsv")
    assert output.split("all")[-1].split() == ["32"]


def test_lengths_may_be_repeated_or_listed(tmp_path):
    plans = [
        invoke("--sequence-length", 8, 16, "--max-tokens", 1, 2, output=tmp_path / "petals.tsv"),
        invoke(
            "--sequence-length", 8, "--sequence-length", 16, "--max-tokens=1", 2,
            output=tmp_path / "petals.tsv",
        ),
    ]  # fmt: skip
    assert plans[0] == plans[1]
    assert plans[0][1].split("all")[-1].split() == ["6"]


def test_a_missing_petals_is_one_line_that_names_the_command(tmp_path):
    # What is None in sys.modules cannot be imported, nor found.
    code = (
        "import sys; sys.modules.update(petals=None, hivemind=None, torch=None)\n"
        f"sys.argv = ['flexbench', 'petals', '--output', {str(tmp_path / 'petals.tsv')!r}]\n"
        "from flexbench.cli import main; main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        "Error: not installed: petals, hivemind, torch; in a checkout of flexbench, install with "
        "./scripts/setup, or: pip install '.[petals]' && pip install --no-deps petals==2.2.0.post1"
    ]
