"""Tokenizers, and prompts whose tokens are more than bytes."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest

from flexbench.core.errors import ConfigError, InputFileError, MissingDependencyError
from flexbench.serving.config import PromptConfig
from flexbench.serving.prompts import open_prompts
from flexbench.serving.prompts.text import BUILT_IN_TEXT
from flexbench.serving.prompts.tokenizers import (
    ByteTokenizer,
    SlowTokenizer,
    count_tokens,
    load_tokenizer,
)


class WordTokenizer:
    """Stands for one of transformers: words are tokens."""

    is_fast = False
    model_max_length = 512

    def encode(self, text, *, add_special_tokens=True):
        return [len(word) for word in text.split()] + [0] * add_special_tokens

    def decode(self, ids, *, clean_up_tokenization_spaces):
        assert not clean_up_tokenization_spaces
        return " ".join("x" * number for number in ids)


# --- bytes ---


def test_bytes_are_tokens():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("aé") == [97, 195, 169]
    assert tokenizer.decode([97, 195, 169]) == "aé"
    assert tokenizer.count("aé€😀") == 1 + 2 + 3 + 4


@pytest.mark.parametrize(("number", "cut"), [(0, ""), (1, "a"), (2, "a"), (3, "aé"), (9, "aé")])
def test_bytes_are_cut_between_characters(number, cut):
    assert ByteTokenizer().cut("aé", number) == cut


def test_an_answer_is_counted_in_one_piece():
    assert count_tokens(ByteTokenizer(), ["ab", "", "cde"]) == 5


def test_half_characters_do_not_matter():
    # The two halves of a smiley, as JSON escapes in two chunks: 4 bytes. Half of one: U+FFFD, 3.
    assert count_tokens(ByteTokenizer(), ["\ud83d", "\ude00"]) == 4
    assert count_tokens(ByteTokenizer(), ["a\ud83d"]) == 4


# --- which one ---


def test_auto_is_bytes_for_a_model_that_is_no_folder():
    tokenizer = load_tokenizer("auto", "facebook/opt-125m")
    assert tokenizer.name == "byte"
    assert tokenizer.is_stand_in


def test_bytes_that_were_asked_for_are_no_stand_in():
    assert not load_tokenizer("byte", "facebook/opt-125m").is_stand_in


def test_auto_is_bytes_for_a_folder_without_a_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert load_tokenizer("auto", str(tmp_path)).is_stand_in


@pytest.mark.parametrize("name", ["./missing", "/missing/folder", "a/b/c"])
def test_a_folder_that_is_not_there_is_not_looked_for_on_a_hub(name):
    with pytest.raises(ConfigError, match=r"--tokenizer: .* is no folder with a tokenizer\.json"):
        load_tokenizer(name, "none")


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"the folder .* has no tokenizer\.json"):
        load_tokenizer(str(tmp_path), "none")


@pytest.fixture
def transformers(monkeypatch):
    """Stands for the package; `answer` is what from_pretrained returns or raises."""
    calls = []

    class AutoTokenizer:
        @staticmethod
        def from_pretrained(name, **options):
            calls.append((name, options))
            if isinstance(package.answer, Exception):
                raise package.answer
            return package.answer

    package = SimpleNamespace(AutoTokenizer=AutoTokenizer, calls=calls, answer=WordTokenizer())
    monkeypatch.setitem(sys.modules, "transformers", package)
    load_tokenizer.cache_clear()
    yield package
    load_tokenizer.cache_clear()


def test_a_hub_name_is_left_to_transformers_which_runs_no_code_of_others(transformers):
    tokenizer = load_tokenizer("owner/name", "none")
    assert isinstance(tokenizer, SlowTokenizer)
    assert transformers.calls == [("owner/name", {"trust_remote_code": False})]


def test_a_folder_in_another_format_is_left_to_transformers(transformers, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"")
    assert load_tokenizer("auto", str(tmp_path)).count("two words") == 2


def test_a_hub_that_is_out_of_reach_is_said(transformers):
    transformers.answer = OSError("We couldn't connect to 'https://hub'\nSecond line")
    problem = r"--tokenizer: owner/name cannot be loaded \(We couldn't connect to 'https://hub'\)\."
    with pytest.raises(ConfigError, match=problem) as raised:
        load_tokenizer("owner/name", "none")
    assert "--tokenizer byte" in str(raised.value)


def test_a_package_that_a_tokenizer_needs_is_said(transformers):
    transformers.answer = ImportError("needs the SentencePiece library")
    with pytest.raises(MissingDependencyError, match="SentencePiece"):
        load_tokenizer("owner/name", "none")


def test_without_transformers_the_message_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependencyError, match="pip install transformers"):
        load_tokenizer("owner/other", "none")


def test_a_slow_tokenizer_cuts_between_words():
    tokenizer = SlowTokenizer(WordTokenizer(), "words")
    assert tokenizer.encode("one three") == [3, 5]
    assert tokenizer.decode([3, 5]) == "xxx xxxxx"
    assert tokenizer.cut("one three five", 2).split() == ["one", "three"]
    assert tokenizer.cut("one three", 2) == "one three"


def test_prompts_of_words_have_the_right_number_of_them(transformers):
    config = PromptConfig(
        model="none", tokenizer="owner/name", prompt_length=20, prompt_length_var=0.3
    )
    source = open_prompts(config)
    assert source.is_slow
    for number in range(30):
        request = source.request(number)
        assert len(request.prompt.split()) == request.prompt_tokens
    assert source.num_inexact == 0


# --- the tokenizers library ---


@pytest.fixture(scope="module")
def merges(tmp_path_factory):
    """Folder with a byte-level BPE, whose merges make cuts change what is before them."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([BUILT_IN_TEXT], trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=40)
    folder = tmp_path_factory.mktemp("merges")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_a_folder_with_a_tokenizer_is_found_by_auto(merges):
    tokenizer = load_tokenizer("auto", str(merges))
    assert tokenizer.name == str(merges)
    assert not tokenizer.is_stand_in


def test_special_tokens_truncation_and_padding_do_not_count(merges):
    tokenizer = load_tokenizer(str(merges), "none")
    assert tokenizer.count("") == 0
    assert tokenizer.count("€" * 50) == 150  # no merges are known of these bytes
    assert tokenizer.decode(tokenizer.encode("The ferry €")) == "The ferry €"


def test_a_cut_ends_between_characters(merges):
    tokenizer = load_tokenizer(str(merges), "none")
    assert tokenizer.cut("€€", 4) == "€€"
    assert tokenizer.cut("€€", 3) == "€"
    assert tokenizer.cut("€€", 100) == "€€"


@pytest.mark.parametrize("text", [None, "Ἐν ἀρχῇ ἦν, 日本語のテキスト, und 😀😃 dazu. "])
@pytest.mark.parametrize(
    "values", [{"prompt_length": 64}, {"prompt_length": 5, "prompt_length_var": 0.8}]
)
def test_lengths_are_exact_in_spite_of_merges(merges, text, values):
    source = open_prompts(
        PromptConfig(model="none", tokenizer=str(merges), prompt_text_source=text, **values)
    )
    seen = set()
    for number in range(60):
        request = source.request(number)
        assert source.tokenizer.count(request.prompt) == request.prompt_tokens >= 1
        assert "\ufffd" not in request.prompt
        seen.add(request.prompt_tokens)
    assert source.num_inexact == 0
    assert len(seen) > 5


def test_a_drawn_length_is_the_length(merges):
    config = PromptConfig(
        model="none", tokenizer=str(merges), prompt_length=48, prompt_length_var=0
    )
    source = open_prompts(config)
    assert {source.request(number).prompt_tokens for number in range(60)} == {48}


def test_a_shared_prefix_is_counted_in_tokens(merges):
    config = PromptConfig(
        model="none", tokenizer=str(merges), prompt_length=48, prompt_length_var=0, shared_prefix=20
    )
    source = open_prompts(config)
    tokens = [source.tokenizer.encode(source.request(number).prompt) for number in range(60)]
    assert {len(ids) for ids in tokens} == {48}
    assert len({tuple(ids[:20]) for ids in tokens}) == 1
    # A mark has 8 characters, and so at most 8 tokens, beside what may part it from the prefix.
    assert len({tuple(ids[20:29]) for ids in tokens}) == 60


def test_beginnings_are_distinct_within_eight_tokens(merges):
    config = PromptConfig(
        model="none", tokenizer=str(merges), prompt_length=32, prompt_length_var=0
    )
    source = open_prompts(config)
    tokens = [source.tokenizer.encode(source.request(number).prompt) for number in range(100)]
    assert len({tuple(ids[:8]) for ids in tokens}) == 100


def test_a_length_that_cannot_be_is_not_claimed():
    class Pairs(ByteTokenizer):
        """Each character is two tokens: there is no prompt of five."""

        def count(self, text):
            return 2 * len(text)

        def cut(self, text, num_tokens):
            return text[: num_tokens // 2]

    source = open_prompts(PromptConfig(model="none", prompt_length=5, prompt_length_var=0))
    source.tokenizer = Pairs()
    request = source.request(0)
    assert (len(request.prompt), request.prompt_tokens) == (2, 4)
    assert source.num_inexact == 1


@pytest.mark.parametrize("content", ["{", json.dumps({"version": "1.0"})])
def test_a_damaged_file_is_named(tmp_path, content):
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputFileError, match=r"tokenizer\.json: cannot be read as a tokenizer"):
        load_tokenizer(str(tmp_path), "none")


def test_without_tokenizers_the_message_says_so(merges, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    load_tokenizer.cache_clear()
    with pytest.raises(MissingDependencyError, match="pip install tokenizers"):
        load_tokenizer("auto", str(merges))
