"""Prompts: exact lengths, distinct beginnings, the same in every process."""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
from dataclasses import replace

import pytest

from flexbench.core.errors import ConfigError, InputFileError
from flexbench.serving.config import PromptConfig
from flexbench.serving.prompts import open_prompts
from flexbench.serving.prompts.lengths import draw_length
from flexbench.serving.prompts.passages import Text, mark
from flexbench.serving.prompts.text import BUILT_IN_TEXT

CONFIG = PromptConfig(model="none", prompt_length=64, prompt_length_var=0, max_new_tokens_var=0)
UNICODE = "Grüße aus Köln, ἀρχή, 日本語のテキスト und 😀😃😄 dazu. "


def prompts(config: PromptConfig, numbers: range = range(200), series: int = 0):
    source = open_prompts(config, series=series)
    return [source.request(number) for number in numbers]


def seeded(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311


# --- lengths ---


def test_without_a_variation_every_length_is_the_mean():
    assert {draw_length(seeded(seed), 7, 0) for seed in range(50)} == {7}


def test_lengths_are_normal():
    generator = seeded(1)
    drawn = [draw_length(generator, 100, 0.2) for _ in range(10_000)]
    # Standard errors: 20 / 100 = 0.2 of the mean, 20 / sqrt(20,000) = 0.14 of the deviation.
    assert statistics.mean(drawn) == pytest.approx(100, abs=1)
    assert statistics.pstdev(drawn) == pytest.approx(20, abs=0.7)


def test_a_length_is_never_0_and_never_above_the_most():
    generator = seeded(1)
    drawn = [draw_length(generator, 3, 2.0, maximum=8) for _ in range(5_000)]
    assert min(drawn) == 1
    assert max(drawn) == 8
    # Drawn again, not raised: normal(3, 6) rounds to 1 about as often as to 5, 4 apart from 3.
    assert drawn.count(1) == pytest.approx(drawn.count(5), rel=0.25)


def test_a_smallest_length_holds():
    generator = seeded(1)
    assert min(draw_length(generator, 11, 1.0, minimum=11) for _ in range(500)) == 11


# --- prompts from the built-in text ---


def test_the_built_in_text_needs_no_tokenizer():
    assert BUILT_IN_TEXT.isascii()
    assert 2000 <= len(BUILT_IN_TEXT) <= 4096


def test_a_byte_prompt_has_as_many_bytes_as_tokens():
    for request in prompts(CONFIG):
        assert request.prompt_tokens == len(request.prompt.encode()) == 64
        assert request.max_new_tokens == 64
        assert request.is_streaming


@pytest.mark.parametrize("length", [1, 2, 8, 9, 10, 5000, 20_000])
def test_any_length_is_exact(length):
    config = replace(CONFIG, prompt_length=length, max_prompt_length=length)
    for request in prompts(config, range(5)):
        assert request.prompt_tokens == len(request.prompt.encode()) == length


def test_lengths_vary_as_the_config_says():
    config = replace(CONFIG, prompt_length=100, prompt_length_var=0.2, max_prompt_length=120)
    lengths = [request.prompt_tokens for request in prompts(config, range(2000))]
    assert statistics.median(lengths) == pytest.approx(100, abs=2)
    assert max(lengths) == 120
    # One deviation above the mean: 16 % of a normal distribution.
    assert lengths.count(120) / 2000 == pytest.approx(0.16, abs=0.03)


def test_new_tokens_vary_too():
    config = replace(CONFIG, max_new_tokens=50, max_new_tokens_var=0.1)
    numbers = [request.max_new_tokens for request in prompts(config, range(2000))]
    assert statistics.mean(numbers) == pytest.approx(50, abs=0.6)
    assert statistics.pstdev(numbers) == pytest.approx(5, abs=0.4)


def test_a_prompt_depends_on_its_number_alone():
    forwards = prompts(CONFIG, range(20))
    backwards = prompts(CONFIG, range(19, -1, -1))
    assert forwards == backwards[::-1]


def test_another_process_makes_the_same_prompts():
    config = replace(CONFIG, prompt_length_var=0.3)
    code = (
        "from flexbench.serving.config import PromptConfig\n"
        "from flexbench.serving.prompts import open_prompts\n"
        f"print(open_prompts({config!r}).request(41))"
    )
    environment = {"PYTHONHASHSEED": "123"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd="."
    )
    assert done.stdout.strip() == repr(open_prompts(config).request(41)), done.stderr


def test_the_light_parts_import_nothing_heavy():
    code = (
        "import sys\n"
        "from flexbench.serving.config import PromptConfig\n"
        "from flexbench.serving.prompts import open_prompts\n"
        "open_prompts(PromptConfig(model='none')).request(0)\n"
        "print(*{'numpy', 'torch', 'transformers', 'tokenizers', 'rich', 'yaml'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("", "")


@pytest.mark.parametrize("other", [replace(CONFIG, prompt_generator_seed=1), CONFIG])
def test_another_seed_and_another_series_make_other_prompts(other):
    series = 0 if other.prompt_generator_seed else 1
    first = {request.prompt[:8] for request in prompts(CONFIG, range(-50, 500))}
    second = {request.prompt[:8] for request in prompts(other, range(-50, 500), series=series)}
    assert len(first) == len(second) == 550
    assert first.isdisjoint(second)


def test_negative_numbers_have_prompts_of_their_own():
    config = replace(CONFIG, prompt_length_var=0.3, max_new_tokens_var=0.3)
    source = open_prompts(config)
    before, after = source.request(-5), source.request(5)
    assert before.index == -5
    assert before.prompt[:8] != after.prompt[:8]
    pairs = [
        (source.request(-n).max_new_tokens, source.request(n).max_new_tokens) for n in range(1, 30)
    ]
    assert sum(left != right for left, right in pairs) > 20


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_first_k_characters_differ_between_36_to_the_k_successive_numbers(k):
    for start in (0, -17, 123_456):
        marks = {mark(number, 99)[:k] for number in range(start, start + 36**k)}
        assert len(marks) == 36**k


def test_prompts_of_three_tokens_still_differ():
    config = replace(CONFIG, prompt_length=3)
    assert len({request.prompt for request in prompts(config, range(5000))}) == 5000


def test_prompts_come_from_different_places_of_the_text():
    ends = {request.prompt[-20:] for request in prompts(CONFIG)}
    assert len(ends) > 150
    assert all(
        request.prompt[9:40] in f"{BUILT_IN_TEXT}{BUILT_IN_TEXT}" for request in prompts(CONFIG)
    )


def test_a_shared_prefix_is_shared_and_no_token_more():
    config = replace(CONFIG, shared_prefix=20)
    made = prompts(config, range(36))
    assert len({request.prompt[:20] for request in made}) == 1
    assert len({request.prompt[20] for request in made}) == 36
    assert {request.prompt_tokens for request in made} == {64}


def test_a_shared_prefix_leaves_room_for_what_differs():
    config = replace(CONFIG, prompt_length=30, prompt_length_var=0.5, shared_prefix=28)
    made = prompts(config)
    assert min(request.prompt_tokens for request in made) == 29
    assert len({request.prompt[:28] for request in made}) == 1


def test_other_seeds_share_another_prefix():
    first, second = (
        open_prompts(replace(CONFIG, shared_prefix=20, prompt_generator_seed=seed)).request(0)
        for seed in (0, 1)
    )
    assert first.prompt[:8] != second.prompt[:8]


def test_a_prefix_as_long_as_the_prompts_is_refused():
    with pytest.raises(ConfigError, match=r"--shared-prefix: must be less than --prompt-length 64"):
        open_prompts(replace(CONFIG, shared_prefix=64))


def test_a_source_says_what_it_is():
    assert open_prompts(CONFIG).describe() == {
        "source": "built-in text",
        "tokenizer": "byte",
        "tokenizer_is_stand_in": True,
        "num_distinct": None,
        "lengths": "normal with a standard deviation of var * mean, rounded; drawn again while "
        "below the smallest length, and cut at the largest",
    }


# --- other texts ---


def test_a_text_that_is_given_is_used_as_it_is():
    config = replace(CONFIG, prompt_text_source="one two three", prompt_length=40)
    for request in prompts(config):
        assert request.prompt[9:] in "one two three " * 5
    assert open_prompts(config).describe()["source"] == "text"


def test_a_text_begins_again_after_its_end():
    assert Text("ab cd").passage(3, 9) == "cd ab cd "
    assert Text("ab\n").passage(2, 4) == "\nab\n"


def test_a_text_file_is_read(tmp_path):
    path = tmp_path / "story"
    path.write_text("alpha beta gamma delta " * 20)
    request = open_prompts(replace(CONFIG, prompt_text_source=str(path))).request(3)
    assert set(request.prompt[9:].split()[1:-1]) <= {"alpha", "beta", "gamma", "delta"}


def test_no_character_is_cut_in_the_middle(tmp_path):
    path = tmp_path / "unicode.txt"
    path.write_text(UNICODE * 3)
    for length in (12, 37, 64):
        config = replace(CONFIG, prompt_length=length, prompt_text_source=str(path))
        for request in prompts(config):
            assert "\ufffd" not in request.prompt
            assert request.prompt_tokens == len(request.prompt.encode()) == length


def test_a_file_that_is_read_in_part_may_end_within_a_character(tmp_path, monkeypatch):
    monkeypatch.setattr("flexbench.serving.prompts.opening.MAX_TEXT_BYTES", 6)
    path = tmp_path / "unicode.txt"
    path.write_text("abc de\u20ac und so weiter".replace(" ", ""))  # the sign has bytes 5 to 7
    request = open_prompts(replace(CONFIG, prompt_text_source=str(path), prompt_length=30)).request(
        0
    )
    assert set(request.prompt[9:]) <= set("abcde ")


@pytest.mark.parametrize("name", ["missing.txt", "folder/missing", "missing file.jsonl"])
def test_a_name_of_no_file_is_no_text(name):
    with pytest.raises(InputFileError, match="there is no such file"):
        open_prompts(replace(CONFIG, prompt_text_source=name))


@pytest.mark.parametrize("text", ["one", "either/or and more", "x" * 5000, "a\nb.txt"])
def test_other_words_are_a_text(text):
    assert open_prompts(replace(CONFIG, prompt_text_source=text)).request(0).prompt_tokens == 64


@pytest.mark.parametrize(
    ("text", "problem"), [("  \n", "is empty"), ("half \ud800", "no text in UTF-8")]
)
def test_a_text_without_words_is_refused(text, problem):
    with pytest.raises(ConfigError, match=problem):
        open_prompts(replace(CONFIG, prompt_text_source=text))


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b" \n", r"story\.txt: is empty"), (b"one\ntwo \xff\n", r"story\.txt:2: is no text in UTF-8")],
)
def test_a_file_without_text_is_refused(tmp_path, content, problem):
    path = tmp_path / "story.txt"
    path.write_bytes(content)
    with pytest.raises(InputFileError, match=problem):
        open_prompts(replace(CONFIG, prompt_text_source=str(path)))


def test_a_folder_is_no_text(tmp_path):
    with pytest.raises(InputFileError, match="Is a directory"):
        open_prompts(replace(CONFIG, prompt_text_source=str(tmp_path)))
