"""--config-file: values and lists of values for the options of prompts."""

from __future__ import annotations

import sys
from dataclasses import asdict

import pytest

from flexbench.core.errors import InputFileError, MissingDependencyError
from flexbench.serving.config import PromptConfig
from flexbench.serving.config_files import ConfigFile, combine, expand, read_config_file

BASE = {**asdict(PromptConfig(model="m")), "num_clients": None, "rate": [5.0]}


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "a.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def values(path):
    return dict(read_config_file(path, warn=pytest.fail).values)


# --- reading ---


def test_scalars_and_lists_of_every_type_are_read(write):
    path = write(
        "model: facebook/opt-125m\n"
        "prompt_length: [16, 32]\n"
        "prompt_length_var: 0\n"
        "max_new_tokens_var: [0.5, 1e-1]\n"
        "streaming: [true, no]\n"
        "prompt_text_source: null\n"
        "num_clients: 4\n"
    )
    assert values(path) == {
        "model": ("facebook/opt-125m",),
        "prompt_length": (16, 32),
        "prompt_length_var": (0.0,),
        "max_new_tokens_var": (0.5, 0.1),
        "streaming": (True, False),
        "prompt_text_source": (None,),
        "num_clients": (4,),
    }


def test_names_may_be_written_as_options_are(write):
    assert values(write("prompt-length: 5\n")) == {"prompt_length": (5,)}


def test_the_misspelt_name_is_accepted_with_a_warning(write):
    path = write("# as in the README\nprompt_lenght_var: 0.5\n")
    warnings = []
    assert read_config_file(path, warn=warnings.append).values == {"prompt_length_var": (0.5,)}
    assert warnings == [f"{path}:2: prompt_lenght_var is taken as prompt_length_var."]


def test_a_warning_goes_to_standard_error(write, capsys):
    expand([write("prompt_lenght_var: 0.5\n")], BASE)
    assert "Warning: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("", None, "is empty"),
        ("# nothing\n", None, "is empty"),
        ("{}\n", None, "is empty"),
        ("- 1\n", 1, "should have lines like"),
        ("prompt_length\n", 1, "should have lines like"),
        ("model: m\nprompt_lenth: 5\n", 2, "prompt_lenth is not one of model, tokenizer, .*, num_clients, rate; did you mean prompt_length?"),
        ("qqq: 5\n", 1, "qqq is not one of .*, rate$"),
        ("[1, 2]: 5\n", 1, "this is not one of"),
        ("<<: 5\n", 1, "<< is not one of"),
        ("prompt_length: 5\nmodel: m\nprompt_length: 6\n", 3, "prompt_length stands in line 1 already"),
        ("prompt_length_var: 5\nprompt-length-var: 6\n", 2, "prompt_length_var stands in line 1 already"),
        ("prompt_length: 5.0\n", 1, "prompt_length must be a whole number, not 5.0"),
        ("prompt_length: true\n", 1, "prompt_length must be a whole number, not True"),
        ("prompt_length:\n- 5\n- x\n", 3, "prompt_length must be a whole number, not 'x'"),
        ("prompt_length_var: high\n", 1, "prompt_length_var must be a number, not 'high'"),
        ("prompt_length_var: yes\n", 1, "prompt_length_var must be a number, not True"),
        ("prompt_length:\n", 1, "prompt_length must be a whole number, not None"),
        ("streaming: 1\n", 1, "streaming must be true or false, not 1"),
        ("model: 7\n", 1, "model must be text, not 7; put it in quotes"),
        ("tokenizer: 2024-01-01\n", 1, r"tokenizer must be text, not datetime.date\(2024, 1, 1\); put"),
        ("prompt_length: []\n", 1, "prompt_length has an empty list"),
        ("prompt_length: {a: 1}\n", 1, "prompt_length must be a value or a list of values"),
        ("prompt_length: [5,\n [6]]\n", 2, "prompt_length must be a value or a list of values"),
        ("num_clients: [1, 0]\n", 1, "num_clients must be a whole number of at least 1, not 0"),
        ("rate: -1\n", 1, "rate must be above 0"),
        ("num_clients: 1\nrate: 1\n", 2, "rate is another kind of load than num_clients"),
        ("model: [1\n", 2, "is no YAML: expected"),
        ("model: *nobody\n", 1, "is no YAML: found undefined alias"),
        ("model: !!python/object:os.system x\n", 1, "is no YAML: could not determine a constructor"),
        ("model: a\n---\nmodel: b\n", 2, "is no YAML: but found another document"),
        ("tokenizer: 2024-13-01\n", None, "is no YAML: month must be in 1..12"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_named_with_its_line(write, text, line, problem):
    path = write(text)
    with pytest.raises(InputFileError, match=problem) as raised:
        read_config_file(path, warn=pytest.fail)
    assert raised.value.path == path
    assert raised.value.line == line


def test_files_that_cannot_be_read_are_named(tmp_path, write):
    for path, problem in (
        (tmp_path / "missing.yaml", "cannot be read: No such file"),
        (tmp_path, "cannot be read: Is a directory"),
        (write(f"model: {'x' * 2**20}"), "is too large"),
    ):
        with pytest.raises(InputFileError, match=problem):
            read_config_file(path, warn=pytest.fail)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"model: m\ntokenizer: \xff\n")
    with pytest.raises(InputFileError, match=r"binary\.yaml:2: is no text in UTF-8"):
        read_config_file(binary, warn=pytest.fail)


def test_without_yaml_the_message_says_so(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'flexbench\[serving\]'"):
        values(write("model: m\n"))


# --- combining ---


def test_lists_make_all_combinations_the_first_field_slowest(write):
    path = write("max_new_tokens: [1, 2]\nprompt_length: [16, 32]\nmodel: x\n")
    found = expand([path], BASE)
    assert [(one["prompt_length"], one["max_new_tokens"]) for one in found] == [
        (16, 1), (16, 2), (32, 1), (32, 2),
    ]  # fmt: skip
    assert {one["model"] for one in found} == {"x"}
    assert {one["max_prompt_length"] for one in found} == {4000}
    assert all(one.keys() == BASE.keys() for one in found)


def test_files_follow_each_other(write):
    first = write("prompt_length: [16, 32]\n", "a.yaml")
    second = write("prompt_length: 8\nmax_new_tokens: [3, 4]\n", "b.yaml")
    found = expand([first, second], BASE)
    assert [(one["prompt_length"], one["max_new_tokens"]) for one in found] == [
        (16, 64), (32, 64), (8, 3), (8, 4),
    ]  # fmt: skip


def test_a_setting_that_comes_again_is_left_out(write):
    path = write("prompt_length: [16, 16, 32]\n")
    assert [one["prompt_length"] for one in expand([path, path], BASE)] == [16, 32]


def test_loads_are_a_sweep_and_not_part_of_the_product(write):
    path = write("prompt_length: [16, 32]\nnum_clients: [1, 2, 4]\n")
    found = expand([path], BASE)
    assert [one["num_clients"] for one in found] == [[1, 2, 4], [1, 2, 4]]
    # The command line's other kind of load gives way to the file's.
    assert [one["rate"] for one in found] == [None, None]


def test_a_file_without_loads_keeps_those_of_the_command_line(write):
    (found,) = expand([write("prompt_length: 16\n")], BASE)
    assert (found["num_clients"], found["rate"]) == (None, [5.0])


def test_a_rate_is_a_number(write):
    (found,) = expand([write("rate: 3\n")], {**BASE, "num_clients": [1], "rate": None})
    assert (found["num_clients"], found["rate"]) == (None, [3.0])


def test_a_value_that_an_option_refuses_is_named_with_its_line(write):
    path = write("model: m\nprompt_length: [16, 0]\n")
    with pytest.raises(InputFileError, match=r"a\.yaml:2: --prompt-length: must be a whole number"):
        expand([path], BASE)


def test_a_combination_that_cannot_be_is_named(write):
    path = write("prompt_length: 5000\n")
    with pytest.raises(
        InputFileError, match=r"a\.yaml: --max-prompt-length: must be .* at least 5000"
    ):
        expand([path], BASE)
    assert expand([path], {**BASE, "max_prompt_length": None})[0]["prompt_length"] == 5000


def test_huge_products_are_refused_before_they_are_made(tmp_path):
    names = ("prompt_length", "max_new_tokens", "prompt_generator_seed")
    lists = {name: tuple(range(1, 101)) for name in names}
    file = ConfigFile(path=tmp_path / "a.yaml", values=lists, lines={})
    with pytest.raises(
        InputFileError, match=r"has 1,000,000 combinations; all files together may have 10,000"
    ):
        combine([file], BASE)
