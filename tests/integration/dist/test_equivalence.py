"""OptLM and DistOptLM give the tokens that transformers gives, wherever and however they compute.

The reference computes every prompt alone, without padding, without a cache, token by token.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

torch = pytest.importorskip("torch", reason="flexbench dist needs torch")
pytest.importorskip("safetensors", reason="flexbench dist needs safetensors")
transformers = pytest.importorskip("transformers")

import numpy as np  # noqa: E402

from flexbench.core.errors import ConfigError, RunError  # noqa: E402
from flexbench.dist.activations import HiddenStore  # noqa: E402
from flexbench.dist.cache import LayerCache  # noqa: E402
from flexbench.dist.homes import DiskPart, ExecutionEnv  # noqa: E402
from flexbench.dist.model import OptLM  # noqa: E402
from flexbench.dist.opt_config import load_opt_config  # noqa: E402
from flexbench.dist.pipeline import DistOptLM  # noqa: E402
from flexbench.dist.policy import Policy  # noqa: E402
from flexbench.dist.weights import LayerWeights  # noqa: E402
from tests.integration.dist.stage import (  # noqa: E402
    DEADLINE_S,
    HOMES,
    allocated,
    count_computed,
    count_units,
    policy,
)

MPIRUN = Path(sys.executable).with_name("mpirun")
ROOT = Path(__file__).parents[3]
PAD = 1
GEN_LEN = 6
SHORT_LEN = 4  # where many cases are run
PROMPT_LEN = 9
LOOPS = {
    "normal": {"overlap": False, "num_batches": 1},
    "overlap_one_batch": {"overlap": True, "num_batches": 1},
    "overlap_multi_batch": {"overlap": True, "num_batches": 2},
}

SAMPLING = {"do_sample": True, "temperature": 1.5, "seed": 5}
Prompts = Sequence[Sequence[int]]


# --- models and what they say ---


def tiny_opt(seed: int = 2, *, scale: float = 0.5, **changed: Any) -> Any:
    """An OPT whose weights are the same with every version of torch and transformers.

    They are so large that prompts matter, and that no two tokens are about equally likely.
    """
    values = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "ffn_dim": 64,
        "vocab_size": 96,
        "max_position_embeddings": 40,
        "word_embed_proj_dim": 32,
        **changed,
    }
    model = transformers.OPTForCausalLM(transformers.OPTConfig(**values)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            random = np.random.RandomState(crc32(f"{seed}{name}".encode()))
            deviation = 0.05 if parameter.ndim == 1 else 0.3 if "embed" in name else scale
            value = random.standard_normal(tuple(parameter.shape)) * deviation
            value += name.endswith("norm.weight")
            parameter.copy_(torch.from_numpy(value.astype("float32")))
    return model


def make_prompts(number: int, seed: int = 1) -> list[list[int]]:
    """Of 1 to PROMPT_LEN tokens; every fourth is of full length."""
    random = np.random.RandomState(seed)
    lengths = [
        PROMPT_LEN if index % 4 == 0 else random.randint(1, PROMPT_LEN + 1)
        for index in range(number)
    ]
    return [random.randint(2, 96, size=length).tolist() for length in lengths]


def padded(prompts: Prompts) -> Any:
    longest = max(map(len, prompts))
    return np.array([[PAD] * (longest - len(prompt)) + list(prompt) for prompt in prompts])


def continue_alone(model: Any, prompt: Sequence[int], gen_len: int) -> list[int]:
    """The likeliest tokens after a prompt, from scratch for each of them."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(gen_len):
            inputs = torch.tensor([ids])
            logits = model(input_ids=inputs, attention_mask=torch.ones_like(inputs)).logits[0, -1]
            first, second = logits.topk(2).values.tolist()
            assert first - second > 1e-4, "nobody could tell these tokens apart"
            ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


def greedy_reference(model: Any, prompts: Prompts, gen_len: int = GEN_LEN) -> Any:
    """What `generate` is to give for these prompts."""
    new = [continue_alone(model, prompt, gen_len) for prompt in prompts]
    return np.concatenate([padded(prompts), np.array(new)], axis=1)


def cut_after(output: Any, stop: int, prompt_len: int = PROMPT_LEN) -> Any:
    """Padding instead of whatever comes after the first stop token."""
    result = output.copy()
    for row in result:
        (found,) = np.nonzero(row[prompt_len:] == stop)
        if found.size:
            row[prompt_len + found[0] + 1 :] = PAD
    return result


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


class Given:
    """A model's folder, prompts, and what comes after them."""

    def __init__(self, model: Any, folder: Path, num_prompts: int) -> None:
        self.model = model
        self.folder = save(model, folder)
        self.prompts = make_prompts(num_prompts)
        self.inputs = padded(self.prompts)
        self.outputs = greedy_reference(model, self.prompts)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def given(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Given:
    return Given(tiny_opt(), tmp_path_factory.mktemp("tiny") / "model", 32)


def load(folder: Path, how: Policy, offload_dir: Path, dtype: str = "float32") -> OptLM:
    config = load_opt_config(folder, dtype=dtype)
    return OptLM(config, ExecutionEnv.create(offload_dir), str(folder), how)


def generate(
    folder: Path,
    how: Policy,
    offload_dir: Path,
    inputs: Any,
    gen_len: int = GEN_LEN,
    **options: Any,
) -> Any:
    """What comes out of a model that is loaded for this alone; nothing of it is left."""
    model = load(folder, how, offload_dir)
    try:
        return model.generate(inputs, gen_len, **options)
    finally:
        model.close()
        assert allocated(model.env) == [0, 0, 0]


def test_the_reference_says_something(given: Given) -> None:
    """Prompts differ, and what comes after them; and their first tokens make a difference."""
    new = given.outputs[:, PROMPT_LEN:]
    assert len({tuple(row) for row in new.tolist()}) == len(given.prompts)
    assert len(set(new.flatten().tolist())) > 20
    shortened = [prompt[1:] for prompt in given.prompts if len(prompt) > 2]
    others = [row for row, prompt in zip(new, given.prompts, strict=True) if len(prompt) > 2]
    changed = [
        continue_alone(given.model, prompt, GEN_LEN) != row.tolist()
        for prompt, row in zip(shortened, others, strict=True)
    ]
    assert sum(changed) > len(changed) / 2


# --- one process: loops and homes ---


@pytest.mark.parametrize("weights", HOMES)
@pytest.mark.parametrize("loop", LOOPS)
def test_every_home_in_every_loop(given: Given, tmp_path: Path, loop: str, weights: str) -> None:
    wrong = []
    for cache, activations, sep_layer in product(HOMES, HOMES, (False, True)):
        how = policy(
            2,
            weights=HOMES[weights],
            cache=HOMES[cache],
            activations=HOMES[activations],
            sep_layer=sep_layer,
            **LOOPS[loop],
        )
        number = 2 * how.block_size
        result = generate(given.folder, how, tmp_path, given.inputs[:number], SHORT_LEN)
        if result.tolist() != given.outputs[:number, : PROMPT_LEN + SHORT_LEN].tolist():
            wrong.append((cache, activations, sep_layer))
    assert wrong == []


def test_attention_on_the_cpu(given: Given, tmp_path: Path) -> None:
    wrong = []
    for cache, overlap, num_batches in product(HOMES, (False, True), (1, 2)):
        how = policy(2, num_batches, cache=HOMES[cache], overlap=overlap, cpu_cache_compute=True)
        result = generate(given.folder, how, tmp_path, given.inputs[:8])
        if result.tolist() != given.outputs[:8].tolist():
            wrong.append((cache, overlap, num_batches))
    assert wrong == []


@pytest.mark.parametrize("seed", range(4))
def test_any_policy(given: Given, tmp_path: Path, seed: int) -> None:
    """Boundaries between homes in the middle of a tensor, a prompt, a head."""
    random = np.random.RandomState(seed)

    def percent() -> tuple[float, float]:
        gpu = random.uniform(0, 100)
        return gpu, random.choice([0, random.uniform(0, 100 - gpu), 100 - gpu])

    for _ in range(8):
        how = policy(
            int(random.choice([1, 2, 3, 4])),
            int(random.choice([1, 2, 4])),
            weights=percent(),
            cache=percent(),
            activations=percent(),
            **{
                name: bool(random.randint(2))
                for name in ("overlap", "sep_layer", "pin_weight", "cpu_cache_compute")
            },
        )
        number = how.block_size * int(random.randint(1, 3))
        result = generate(given.folder, how, tmp_path, given.inputs[:number])
        assert result.tolist() == given.outputs[:number].tolist(), how


@pytest.fixture(scope="module")
def one_layer(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Given:
    return Given(tiny_opt(num_hidden_layers=1), tmp_path_factory.mktemp("one") / "model", 4)


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        *((LayerWeights, "load"), (LayerCache, "load"), (LayerCache, "store")),
        *((HiddenStore, "load"), (HiddenStore, "store")),
    ],
)
@pytest.mark.parametrize("num_batches", [1, 2])
def test_slow_loads_and_stores_are_waited_for(
    one_layer: Given,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: Any,
    method: str,
    num_batches: int,
) -> None:
    """With a single layer, the next token's cache is loaded while the last one's is stored."""
    original = getattr(kind, method)

    def slow(*arguments: Any) -> Any:
        time.sleep(0.005)
        return original(*arguments)

    monkeypatch.setattr(kind, method, slow)
    how = policy(
        2 // num_batches,
        num_batches,
        weights=HOMES["disk"],
        cache=HOMES["disk"],
        activations=HOMES["disk"],
        overlap=True,
    )
    result = generate(one_layer.folder, how, tmp_path, one_layer.inputs)

    assert result.tolist() == one_layer.outputs.tolist()


VARIANTS: dict[str, dict[str, Any]] = {
    "350m": {"word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "projected": {"word_embed_proj_dim": 16},
    "wide-table": {"word_embed_proj_dim": 48},
    "norm-after": {"do_layer_norm_before": False},
    "no-final-norm": {"_remove_final_layer_norm": True},
    "gelu": {"activation_function": "gelu"},
    "untied": {"tie_word_embeddings": False},
    "one-layer": {"num_hidden_layers": 1},
    "one-head": {"num_attention_heads": 1},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_opt(tmp_path: Path, name: str) -> None:
    model = tiny_opt(**VARIANTS[name])
    given = Given(model, tmp_path / "model", 8)
    for loop, sep_layer, home in product(LOOPS, (False, True), ("gpu", "mixed")):
        how = policy(
            2,
            weights=HOMES[home],
            cache=HOMES[home],
            activations=HOMES[home],
            sep_layer=sep_layer,
            **LOOPS[loop],
        )
        result = generate(given.folder, how, tmp_path, given.inputs)
        assert result.tolist() == given.outputs.tolist(), (loop, sep_layer, home)


# --- one process: what goes in, and what comes out ---


def test_prompts_of_different_lengths(given: Given, tmp_path: Path) -> None:
    """Lists, which nobody has padded."""
    for how in (policy(2, 2, overlap=True), policy(4, cache=HOMES["mixed"])):
        result = generate(given.folder, how, tmp_path, given.prompts[:8])
        assert result.dtype == np.int64
        assert result.tolist() == given.outputs[:8].tolist()


def test_prompts_of_the_same_length(given: Given, tmp_path: Path) -> None:
    """Nothing is padded, so that there is no mask."""
    full = [index for index, prompt in enumerate(given.prompts) if len(prompt) == PROMPT_LEN][:8]

    result = generate(given.folder, policy(2, 2), tmp_path, given.inputs[full])

    assert result.tolist() == given.outputs[full].tolist()


def test_padding_within_a_prompt_is_meant(given: Given, tmp_path: Path) -> None:
    prompts = [[5, PAD, 7, PAD], [9, PAD], [PAD + 1, PAD, PAD, 4], [8, 8, PAD, PAD]]

    result = generate(given.folder, policy(2), tmp_path, prompts)

    assert result.tolist() == greedy_reference(given.model, prompts).tolist()


@pytest.mark.parametrize("gen_len", [1, 2, 12])
@pytest.mark.parametrize("loop", LOOPS)
def test_other_lengths(given: Given, tmp_path: Path, loop: str, gen_len: int) -> None:
    for prompts in (given.prompts[:4], [[7], [8], [9], [10]]):
        how = policy(2, cache=HOMES["mixed"], activations=HOMES["mixed"], **LOOPS[loop])
        result = generate(given.folder, how, tmp_path, prompts, gen_len)
        assert result.tolist() == greedy_reference(given.model, prompts, gen_len).tolist()


def test_a_prompt_up_to_the_last_position(given: Given, tmp_path: Path) -> None:
    prompts = [list(range(10, 44)), list(range(50, 84))]

    result = generate(given.folder, policy(1), tmp_path, prompts, 6)

    assert result.tolist() == greedy_reference(given.model, prompts, 6).tolist()


def test_one_model_generates_again_and_again(given: Given, tmp_path: Path) -> None:
    model = load(given.folder, policy(2, cache=HOMES["disk"], overlap=True), tmp_path)
    for number, gen_len in ((4, 6), (8, 3), (2, 1), (4, 6)):
        result = model.generate(given.inputs[:number], gen_len)
        assert result.tolist() == given.outputs[:number, : PROMPT_LEN + gen_len].tolist()
        with pytest.raises(ConfigError):
            model.generate(given.inputs[:3], gen_len)
    model.close()


def test_inputs_stay_as_they_are(given: Given, tmp_path: Path) -> None:
    inputs = given.inputs[:4].copy()
    inputs.flags.writeable = False

    generate(given.folder, policy(2), tmp_path, inputs)

    assert inputs.tolist() == given.inputs[:4].tolist()


def test_progress_is_told(given: Given, tmp_path: Path) -> None:
    layers: list[None] = []
    units: list[None] = []
    env = ExecutionEnv.create(tmp_path)
    config = load_opt_config(given.folder, dtype="float32")
    model = OptLM(config, env, str(given.folder), policy(2), on_layer=lambda: layers.append(None))
    model.on_unit = lambda: units.append(None)

    model.generate(given.inputs[:6], GEN_LEN)
    model.close()

    assert len(layers) == 5, "two embeddings and three layers"
    assert len(units) == 3 * GEN_LEN
    assert len(model.times.token_ends) == 3 * GEN_LEN
    assert model.times.token_ends == sorted(model.times.token_ends)
    assert 0 < model.times.compute_s <= model.times.wall_s


# --- one process: where generation ends ---


def stop_tokens(given: Given) -> list[int]:
    """One that comes early in many prompts, one that comes rarely, one that never comes."""
    new = given.outputs[:8, PROMPT_LEN:-1]
    tokens, counts = np.unique(new, return_counts=True)
    order = np.argsort(counts)
    never = next(token for token in range(96) if token not in given.outputs)
    return [int(tokens[order[-1]]), int(tokens[order[0]]), never]


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("batch_size", [1, 2])
def test_padding_after_a_stop_token(
    given: Given, tmp_path: Path, loop: str, batch_size: int
) -> None:
    how = policy(batch_size, activations=HOMES["mixed"], cache=HOMES["mixed"], **LOOPS[loop])
    for stop in stop_tokens(given):
        expected = cut_after(given.outputs[:8], stop)
        result = generate(given.folder, how, tmp_path, given.inputs[:8], stop=stop)
        assert result.tolist() == expected.tolist()
    some = cut_after(given.outputs[:8], stop_tokens(given)[0])
    assert some.tolist() != given.outputs[:8].tolist()


def test_nothing_is_computed_for_prompts_that_have_ended(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = int(given.outputs[0, PROMPT_LEN])  # the first prompt ends at once
    prompts = given.prompts[:1] * 2
    model = load(given.folder, policy(1), tmp_path)
    computed = count_computed(monkeypatch.setattr)

    result = model.generate(prompts, GEN_LEN, stop=stop)
    model.close()

    assert result[:, PROMPT_LEN:].tolist() == [[stop] + [PAD] * (GEN_LEN - 1)] * 2
    assert len(computed) == 2 * len(model.layers)


def test_a_stop_token_in_the_prompt_is_none(given: Given, tmp_path: Path) -> None:
    prompt = given.prompts[0]
    stop = next(token for token in prompt if token not in given.outputs[0, PROMPT_LEN:])

    result = generate(given.folder, policy(1), tmp_path, [prompt], stop=stop)

    assert result.tolist() == given.outputs[:1].tolist()


@pytest.mark.parametrize("loop", LOOPS)
def test_generation_that_is_cut(given: Given, tmp_path: Path, loop: str) -> None:
    for cut in (1, 2, 5, 6, 99):
        result = generate(
            given.folder, policy(2, **LOOPS[loop]), tmp_path, given.inputs[:8], cut_gen_len=cut
        )
        expected = given.outputs[:8].copy()
        expected[:, PROMPT_LEN + cut :] = PAD
        assert result.tolist() == expected.tolist()


@pytest.mark.parametrize("mode", ["fewer_batch", "breakdown"])
@pytest.mark.parametrize("overlap", [False, True])
def test_debug_modes_take_two_tokens(
    given: Given, tmp_path: Path, mode: str, overlap: bool
) -> None:
    model = load(given.folder, policy(2, sep_layer=True, overlap=overlap), tmp_path)

    result = model.generate(given.inputs[:4], GEN_LEN, debug_mode=mode)
    model.close()

    assert result[:, :PROMPT_LEN].tolist() == given.inputs[:4].tolist()
    assert (result[:, PROMPT_LEN:] == PAD).all()
    assert result.shape == (4, PROMPT_LEN + GEN_LEN)
    assert len(model.times.token_ends) == 2 * 2


# --- one process: sampling ---


def test_samples_are_the_same_however_prompts_are_batched(given: Given, tmp_path: Path) -> None:
    def sample(how: Policy, **options: Any) -> Any:
        options = {**SAMPLING, **options}
        return generate(given.folder, how, tmp_path, given.inputs[:8], **options).tolist()

    first = sample(policy(2))
    for how in (
        policy(1),
        policy(8),
        policy(2, 2, overlap=True, cache=HOMES["mixed"]),
        policy(4, 2, weights=HOMES["disk"], activations=HOMES["cpu"]),
    ):
        assert sample(how) == first
    assert sample(policy(2), seed=6) != first
    assert sample(policy(2), temperature=3.0) != first
    assert first != given.outputs[:8].tolist()
    assert sample(policy(2), temperature=1e-6) == given.outputs[:8].tolist()


# --- one process: what is refused ---


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ([[5]] * 3, {}, "inputs: 3 prompts .*blocks of 4.*--gpu-batch-size.*--num-gpu-batches"),
        ([], {}, "inputs: there are no prompts"),
        ([[], [], [], []], {}, "inputs: there are no prompts, or they are empty"),
        ([[5], [], [5], [5]], {}, "inputs: each prompt must be a list of at least one"),
        ([[5], [5.5], [5], [5]], {}, "inputs: each prompt must be"),
        ([5, 6, 7, 8], {}, "inputs: each prompt must be"),
        ([[5], [96], [5], [5]], {}, "inputs: token ids must be between 0 and 95"),
        ([[5], [-1], [5], [5]], {}, "inputs: token ids must be between 0 and 95"),
        ([[5, 6], [PAD], [5], [5]], {}, "inputs: a prompt holds only padding, token 1"),
        ([[5] * 35] * 4, {}, r"--prompt-len: 35 \+ 6 new tokens are more than the 40"),
        ([[5]] * 4, {"max_new_tokens": 40}, r"--prompt-len: 1 \+ 40 new tokens"),
        ([[5]] * 4, {"max_new_tokens": 0}, "--gen-len: .*at least 1, not 0"),
        ([[5]] * 4, {"cut_gen_len": 0}, "--cut-gen-len: .*at least 1, not 0"),
        ([[5]] * 4, {"stop": 96}, "--stop: .*at most 95"),
        ([[5]] * 4, {"stop": -1}, "--stop: .*not -1"),
        ([[5]] * 4, {"stop": 5, "cut_gen_len": 2}, "--stop: nobody knows .*--cut-gen-len"),
        ([[5]] * 4, {"stop": 5, "debug_mode": "breakdown"}, "--stop: nobody .*--debug-mode"),
        ([[5]] * 4, {"debug_mode": "slow"}, "--debug-mode: .*'slow'.*fewer_batch, breakdown"),
        ([[5]] * 4, {"do_sample": True, "temperature": 0.0}, "--temperature: .*above 0, not 0"),
        ([[5]] * 4, {"do_sample": True, "temperature": float("nan")}, "--temperature: .*not nan"),
        ([[5]] * 4, {"do_sample": True, "temperature": float("inf")}, "--temperature: .*not inf"),
        ([[5]] * 4, {"seed": -1}, "--seed: .*not -1"),
        ([[5]] * 4, {"seed": 2**32}, "--seed: .*at most"),
    ],
)
def test_refuses_what_cannot_work(
    given: Given, tmp_path: Path, inputs: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        generate(
            given.folder,
            policy(2, 2),
            tmp_path,
            inputs,
            options.pop("max_new_tokens", 6),
            **options,
        )
    assert caught.value.exit_code == 2


def test_inner_iterations_are_part_of_a_block(given: Given, tmp_path: Path) -> None:
    config = load_opt_config(given.folder, dtype="float32")
    model = DistOptLM(
        config, ExecutionEnv.create(tmp_path), str(given.folder), policy(2, 2), 0, 1, "cpu", 2
    )
    with pytest.raises(ConfigError, match=r"blocks of 8.*2 \(--num-inner-iterations\)"):
        model.generate(given.inputs[:4], 2)
    assert model.generate(given.inputs[:16], GEN_LEN).tolist() == given.outputs[:16].tolist()
    model.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4, "cpu"), "--world-size: 4 pipeline stages cannot share the 3 .*accepted: 1 to 3"),
        ((0, 0, "cpu"), "--world-size: .*at least 1, not 0"),
        ((2, 2, "cpu"), "--rank: .*at most 1"),
        ((-1, 2, "cpu"), "--rank: .*not -1"),
        ((0, 2, "disk"), "--comm-device: must be cpu or gpu, not 'disk'"),
        ((0, 2, "cpu", 0), "--num-inner-iterations: .*not 0"),
    ],
)
def test_refuses_stages_that_cannot_be(
    given: Given, tmp_path: Path, arguments: tuple[Any, ...], message: str
) -> None:
    config = load_opt_config(given.folder, dtype="float32")
    env = ExecutionEnv.create(tmp_path)
    with pytest.raises(ConfigError, match=message) as caught:
        DistOptLM(config, env, str(given.folder), policy(), *arguments)
    assert caught.value.exit_code == 2
    assert allocated(env) == [0, 0, 0]


def test_logits_that_are_not_finite_are_told(tmp_path: Path) -> None:
    model = tiny_opt()
    with torch.no_grad():
        model.model.decoder.layers[1].fc2.bias[3] = float("inf")
    folder = save(model, tmp_path / "model")

    with pytest.raises(RunError, match="logits of token 0 are not finite: float32 is too small"):
        generate(folder, policy(2), tmp_path, [[5, 6], [7, 8]])


# --- one process: what is left ---


@pytest.mark.parametrize("loop", LOOPS)
def test_nothing_is_left(given: Given, tmp_path: Path, loop: str) -> None:
    how = policy(
        2,
        weights=HOMES["mixed"],
        cache=HOMES["mixed"],
        activations=HOMES["mixed"],
        **LOOPS[loop],
    )
    offload_dir = tmp_path / "offload"
    descriptors, threads = os.listdir("/proc/self/fd"), threading.active_count()
    model = load(given.folder, how, offload_dir)
    of_weights = allocated(model.env)
    most = [0, 0, 0]

    def look() -> None:
        most[:] = map(max, most, allocated(model.env))
        # Files without a name are gone with the process, however it ends.
        assert list(offload_dir.iterdir()) == []

    model.on_unit = look
    model.generate(given.inputs[:8], GEN_LEN)

    assert all(of_weights)
    assert all(a > b for a, b in zip(most, of_weights, strict=True))
    assert allocated(model.env) == of_weights
    assert threading.active_count() == threads
    model.close()
    model.close()
    assert allocated(model.env) == [0, 0, 0]
    assert os.listdir("/proc/self/fd") == descriptors
    assert list(offload_dir.iterdir()) == []


def test_weights_are_where_they_were_asked_to_be(given: Given, tmp_path: Path) -> None:
    for percent in (*HOMES.values(), (55.5, 0), (12.5, 80)):
        model = load(given.folder, policy(weights=percent), tmp_path)
        total = sum(allocated(model.env))
        shares = [100 * part / total for part in allocated(model.env)]
        assert shares == pytest.approx([*percent, 100 - sum(percent)], abs=2)
        model.close()


def test_a_failure_leaves_nothing(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = threading.active_count()
    how = policy(2, cache=HOMES["mixed"], activations=HOMES["mixed"], overlap=True)
    model = load(given.folder, how, tmp_path)
    of_weights = allocated(model.env)

    def fail() -> None:
        raise KeyboardInterrupt

    model.on_unit = fail
    with pytest.raises(KeyboardInterrupt):
        model.generate(given.inputs[:4], GEN_LEN)
    assert allocated(model.env) == of_weights
    assert threading.active_count() == threads
    model.on_unit = lambda: None
    assert model.generate(given.inputs[:4], GEN_LEN).tolist() == given.outputs[:4].tolist()
    model.close()


@pytest.mark.parametrize("number", range(1, 9))
def test_a_disk_that_is_full_leaves_nothing(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Wherever it happens: weights are five layers, and keys of the first cache come after them."""
    env = ExecutionEnv.create(tmp_path)
    config = load_opt_config(given.folder, dtype="float32")
    mixed = policy(
        2, weights=HOMES["mixed"], cache=HOMES["mixed"], activations=HOMES["mixed"], overlap=True
    )
    reserve, asked = os.posix_fallocate, []

    def reserve_some(*arguments: Any) -> None:
        asked.append(arguments)
        if len(asked) == number:
            raise OSError(errno.ENOSPC, "No space left on device")
        reserve(*arguments)

    monkeypatch.setattr(os, "posix_fallocate", reserve_some)
    descriptors = os.listdir("/proc/self/fd")

    def try_it() -> None:
        model = OptLM(config, env, str(given.folder), mixed)
        of_weights = allocated(env)
        try:
            model.generate(given.inputs[:2], GEN_LEN)
        finally:
            assert number <= 5 or allocated(env)[2] == of_weights[2]
            model.close()

    with pytest.raises(RunError, match=r"--offload-dir: .* has no room for .*No space left"):
        try_it()
    gc.collect()
    assert allocated(env) == [0, 0, 0]
    assert os.listdir("/proc/self/fd") == descriptors
    # And there is room again.
    try_it()
    assert allocated(env) == [0, 0, 0]


def test_what_lay_in_a_closed_file_is_not_written_into_the_next(tmp_path: Path) -> None:
    """A thread that hangs in a slow write may go on when the file's number is another's."""
    disk = ExecutionEnv.create(tmp_path).branch().disk
    part = disk.allocate((4, 8), torch.float32)
    part.write(0, torch.ones(4, 8))
    disk.close()

    with ExitStack() as stack:
        # One of them has its number.
        others = [stack.enter_context((tmp_path / name).open("w+b")) for name in "abcd"]
        with pytest.raises(RunError, match="offload folder"):
            part.write(0, torch.ones(4, 8))
        with pytest.raises(RunError, match="offload folder"):
            part.read(0, torch.empty(4, 8))
        assert [other.read() for other in others] == [b""] * 4
    part.close()
    part.close()
    assert disk.ledger.allocated_bytes == 0


@pytest.mark.parametrize("home", ["cache", "activations"])
@pytest.mark.parametrize("loop", LOOPS)
def test_a_write_that_fails_is_told(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loop: str, home: str
) -> None:
    """Once is enough: what was not written must not be read as if it had been."""
    how = policy(2, **{home: HOMES["disk"]}, **LOOPS[loop])
    model = load(given.folder, how, tmp_path)
    original = DiskPart.write
    writes: list[int] = []

    def write_most(part: DiskPart, start: int, rows: Any) -> None:
        writes.append(start)
        if len(writes) == 2:
            raise RunError("cannot write to the offload folder: no space")
        original(part, start, rows)

    monkeypatch.setattr(DiskPart, "write", write_most)

    with pytest.raises(RunError, match="no space"):
        model.generate(given.inputs[:4], GEN_LEN)
    assert allocated(model.env)[1:] == [0, 0]
    model.close()


# --- several processes ---


def cases_of(num_stages: int, stop: int, max_prompts: int) -> Iterator[dict[str, Any]]:
    """All ways to pass units through stages; where they keep what, and what is asked, is random."""
    random = np.random.RandomState(num_stages)
    some = (False, True)
    for iterations, is_async, overlap, num_batches in product(
        [*range(1, num_stages + 2), 8], some, some, (1, 2)
    ):
        batch_size = int(random.randint(1, 3)) if iterations < 8 else 1
        block = batch_size * num_batches * iterations
        asked: list[dict[str, Any]] = [
            {"expected": "greedy"},
            {"expected": "stopped", "stop": stop},
        ]
        random.shuffle(asked)
        if random.randint(2):
            asked[1] = {"expected": "sampled", **SAMPLING}
        yield {
            "iterations": iterations,
            "is_async": is_async,
            "comm_device": str(random.choice(["cpu", "gpu"])),
            "balance": str(random.choice(["layers", "memory", "time"])),
            "policy": {
                "batch_size": batch_size,
                "num_batches": num_batches,
                "overlap": overlap,
                "sep_layer": bool(random.randint(2)),
                "weights": HOMES[str(random.choice(["gpu", "mixed"]))],
                "cache": HOMES[str(random.choice(list(HOMES)))],
                "activations": HOMES[str(random.choice(list(HOMES)))],
            },
            "num_prompts": block * min(2, max_prompts // block),
            "calls": asked,
        }


def has_units_to_skip(case: dict[str, Any], given: Given, stop: int) -> bool:
    """Whether a block of prompts ends early, so that stages have nothing to compute."""
    if not any("stop" in call for call in case["calls"]):
        return False
    block = case["policy"]["batch_size"] * case["policy"]["num_batches"]
    new = given.outputs[: case["num_prompts"], PROMPT_LEN : PROMPT_LEN + SHORT_LEN]
    return count_units(new, block, stop) < count_units(new, block, None)


class Stages:
    """The stages of a pipeline under mpirun; they end with the `with` block at the latest."""

    def __init__(self, folder: Path, num_stages: int) -> None:
        self.folder, self.num_stages = folder, num_stages
        program = (sys.executable, "-W", "error", Path(__file__).parent / "stage.py", folder)
        ours = {
            "PYTHONPATH": str(ROOT),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        }
        self.process = subprocess.Popen(
            list(map(str, (MPIRUN, "--oversubscribe", "-np", num_stages, *program))),
            env={**os.environ, **ours},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()  # it ends its ranks, by force if need be
        self.process.wait(10)

    def reports(self) -> list[dict[str, Any]]:
        """What every rank says at its end. mpirun ends all of them when one has failed."""
        try:
            code = self.process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the stages hang: {self.last_words()}")
        assert code == 0, self.last_words()
        files = (f"report-{self.num_stages}-{rank}.json" for rank in range(self.num_stages))
        return [json.loads((self.folder / file).read_text()) for file in files]

    def last_words(self) -> str:
        logs = sorted(self.folder.glob(f"stage-{self.num_stages}-*.log"))
        return "\n".join(f"{log.name}: {log.read_text()[-2000:]}" for log in logs)


@pytest.mark.mpi
@pytest.mark.parametrize("num_stages", [2, 3])
def test_stages_give_what_one_process_gives(given: Given, tmp_path: Path, num_stages: int) -> None:
    stop = stop_tokens(given)[0]
    length = PROMPT_LEN + SHORT_LEN
    sampled = generate(given.folder, policy(8), tmp_path, given.inputs, SHORT_LEN, **SAMPLING)
    (tmp_path / "model").symlink_to(given.folder)
    np.savez(
        tmp_path / "arrays.npz",
        inputs=given.inputs,
        greedy=given.outputs[:, :length],
        stopped=cut_after(given.outputs[:, :length], stop),
        sampled=sampled,
    )
    cases = list(cases_of(num_stages, stop, len(given.inputs)))
    assert any(has_units_to_skip(case, given, stop) for case in cases)
    (tmp_path / f"cases-{num_stages}.json").write_text(json.dumps(cases))

    with Stages(tmp_path, num_stages) as stages:
        reports = stages.reports()

    assert [(report["rank"], report["cases"]) for report in reports] == [
        (rank, len(cases)) for rank in range(num_stages)
    ]
    assert [problem for report in reports for problem in report["problems"]] == []
