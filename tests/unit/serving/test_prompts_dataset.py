"""Prompts from a .jsonl dataset."""

from __future__ import annotations

import json

import pytest

from flexbench.core.errors import ConfigError, InputFileError
from flexbench.serving.config import PromptConfig
from flexbench.serving.prompts import open_prompts

QUESTION = {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "Who?"}]}
CHAT = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "Why?"}]}
PARTS = {
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "image_url"}]}
    ]
}


def config(path, **values) -> PromptConfig:
    values = {"max_new_tokens_var": 0, "prompt_length": 4, **values}
    return PromptConfig(model="none", prompt_text_source=str(path), **values)


@pytest.fixture
def dataset(tmp_path):
    def write(*lines):
        path = tmp_path / "set.jsonl"
        path.write_text(
            "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
        )
        return path

    return write


def test_all_known_shapes_are_read(dataset):
    path = dataset({"prompt": "Where?"}, {"text": "When?"}, QUESTION, "", CHAT, PARTS)
    source = open_prompts(config(path))
    assert {source.request(number).prompt for number in range(5)} == {
        "Where?",
        "When?",
        "Who?",
        "Why?",
        "What?",
    }
    assert source.num_distinct == 5
    assert source.describe()["source"] == str(path)


def test_prompts_go_round_in_the_order_of_the_seed(dataset):
    path = dataset(*({"prompt": f"Question {number}"} for number in range(20)))
    source = open_prompts(config(path))
    first = [source.request(number).prompt for number in range(20)]
    assert len(set(first)) == 20
    assert [source.request(number).prompt for number in range(20, 40)] == first
    assert source.request(-1).prompt == first[-1]
    for other in (
        open_prompts(config(path, prompt_generator_seed=1)),
        open_prompts(config(path), series=1),
    ):
        order = [other.request(number).prompt for number in range(20)]
        assert sorted(order) == sorted(first)
        assert order != first


def test_repeated_lines_are_not_distinct(dataset):
    path = dataset({"prompt": "Same"}, {"prompt": "Same"}, {"prompt": "Other"})
    assert open_prompts(config(path)).num_distinct == 2


def test_a_long_prompt_is_cut_between_characters(dataset):
    path = dataset({"prompt": "aé" * 10})
    request = open_prompts(config(path, max_prompt_length=5)).request(0)
    assert (request.prompt, request.prompt_tokens) == ("aéa", 4)


def test_a_prompt_is_never_empty(dataset):
    source = open_prompts(config(dataset({"prompt": "€"}), prompt_length=1, max_prompt_length=1))
    request = source.request(0)
    assert (request.prompt, request.prompt_tokens, source.num_inexact) == ("€", 3, 1)


@pytest.mark.parametrize("key", ["max_new_tokens", "output_len"])
def test_a_line_may_say_how_many_tokens_it_wants(dataset, key):
    path = dataset({"prompt": "Long", key: 300})
    assert open_prompts(config(path)).request(0).max_new_tokens == 300


def test_otherwise_they_are_drawn(dataset):
    path = dataset({"prompt": "Any", "max_new_tokens": None})
    assert open_prompts(config(path, max_new_tokens=9)).request(0).max_new_tokens == 9


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "is no line of JSON"),
        ("[" * 100_000, "is no line of JSON"),
        ("[1]", "is no object"),
        ({"question": "?"}, "has none of prompt, text, conversations, messages"),
        ({"prompt": 3}, "prompt is no text"),
        ({"prompt": " "}, "prompt is empty"),
        ({"messages": "x"}, "messages is no list"),
        ({"messages": ["x"]}, "messages has something that is no object"),
        ({"messages": []}, "messages has no turn of a human or user"),
        ({"messages": [{"role": "user"}]}, "messages is no text"),
        ({"prompt": "x", "output_len": 0}, "output_len is no whole number of at least 1"),
        ({"prompt": "x", "max_new_tokens": True}, "max_new_tokens is no whole number"),
        ('{"prompt": "\\ud83d"}', "has half a character"),
    ],
)
def test_a_malformed_line_is_named(dataset, line, problem):
    path = dataset({"prompt": "Fine"}, line)
    with pytest.raises(InputFileError, match=rf"set\.jsonl:2: {problem}"):
        open_prompts(config(path))


def test_a_dataset_without_lines_is_refused(dataset):
    with pytest.raises(InputFileError, match="has no prompts"):
        open_prompts(config(dataset("", "")))


def test_prompts_that_are_given_share_no_prefix(dataset):
    with pytest.raises(ConfigError, match="--shared-prefix: does not go with a dataset"):
        open_prompts(config(dataset({"prompt": "x"}), shared_prefix=2))


def test_a_changed_dataset_is_read_again(dataset):
    assert open_prompts(config(dataset({"prompt": "Before"}))).request(0).prompt == "Before"
    assert open_prompts(config(dataset({"prompt": "And after"}))).request(0).prompt == "And after"
