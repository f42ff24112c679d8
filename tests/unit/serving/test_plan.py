"""From the command's options to sweeps and loads."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from flexbench.core.errors import ConfigError, InputFileError
from flexbench.serving.clients.dummy import DummyConfig
from flexbench.serving.command import serving
from flexbench.serving.config import DEFAULT_NUM_CLIENTS, Arrival, Load, ServingConfig
from flexbench.serving.plan import check_plan, config_from, make_sweeps


def arguments(**given: Any) -> dict[str, Any]:
    """The command's parameters with their defaults, but for what is given."""
    parameters = inspect.signature(serving).parameters.values()
    values = {one.name: one.default for one in parameters if one.name != "context"}
    assert given.keys() <= values.keys()
    return values | {"api": "dummy"} | given


def loads(**given: Any) -> list[Load]:
    (sweep,) = make_sweeps(arguments(**given))
    return list(sweep.loads)


def configured(**given: Any) -> ServingConfig:
    return config_from(arguments(**given), lambda _: DummyConfig())


def test_by_default_so_many_clients_one_after_the_other():
    found = loads()
    assert [load.concurrency for load in found] == list(DEFAULT_NUM_CLIENTS)
    # 16 for each client, but 128 at least: up to 8 clients.
    assert [load.num_requests for load in found][:6] == [128, 128, 128, 128, 128, 192]
    assert found[-1] == Load(concurrency=32, num_requests=512)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"num_clients": [3, 50]}, [Load(concurrency=3, num_requests=128), Load(concurrency=50, num_requests=800)]),
        ({"num_clients": [3], "min_requests": 0}, [Load(concurrency=3, num_requests=48)]),
        ({"num_clients": [3], "num_requests_per_client": 1, "min_requests": 2}, [Load(concurrency=3, num_requests=3)]),
        # Time instead of a number.
        ({"num_clients": [3], "duration": "30s"}, [Load(concurrency=3, duration_s=30.0)]),
        ({"rate": [0.5, 20.0]}, [Load(rate_per_s=0.5, num_requests=128), Load(rate_per_s=20.0, num_requests=128)]),
        ({"rate": [20.0], "duration": "500ms", "arrival": Arrival.BURST, "burst_size": 4}, [Load(rate_per_s=20.0, arrival=Arrival.BURST, burst_size=4, duration_s=0.5)]),
        # Where a search begins.
        ({"saturation": True}, [Load(concurrency=1, duration_s=1.0)]),
        ({"saturation": True, "num_clients": [4], "duration": "3s"}, [Load(concurrency=4, duration_s=3.0)]),
        ({"saturation": True, "rate": [2.0]}, [Load(rate_per_s=2.0, duration_s=1.0)]),
    ],
)  # fmt: skip
def test_loads(given, expected):
    assert loads(**given) == expected


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"num_clients": [1], "rate": [1.0]}, "--rate: is another kind of load than --num-clients"),
        ({"saturation": True, "num_clients": [1, 2]}, "--num-clients: with --saturation, give one value"),
        ({"saturation": True, "rate": [1.0, 2.0]}, "--rate: with --saturation, give one value"),
        ({"num_clients": [0]}, "--num-clients"),
        ({"rate": [0.0]}, "--rate: must be above 0"),
        ({"num_requests_per_client": 0}, "--num-requests-per-client"),
        ({"min_requests": -1}, "--min-requests"),
        ({"duration": "soon"}, "--duration"),
        ({"duration": "0s"}, "--duration"),
        ({"rate": [1.0], "burst_size": 0}, "--burst-size"),
        ({"request_timeout": "0s"}, "--request-timeout"),
        ({"warmup_timeout": "no"}, "--warmup-timeout"),
        ({"service_timeout": "-1s"}, "--service-timeout"),
        ({"early_stop_latency": -1.0}, "--early-stop-latency"),
        ({"max_errors": -1}, "--max-errors"),
        ({"max_error_rate": 1.1}, "--max-error-rate"),
        ({"warmup_requests": -1}, "--warmup-requests"),
        ({"num_workers": 0}, "--num-workers"),
        ({"max_clients": 0}, "--max-clients"),
        ({"max_rate": 0.0}, "--max-rate"),
        ({"prompt_length": 0}, "--prompt-length"),
        ({"prompt_length": 100, "max_prompt_length": 99}, "--max-prompt-length"),
        ({"max_new_tokens": 0}, "--max-new-tokens"),
        ({"prompt_length_var": -0.1}, "--prompt-length-var"),
        ({"max_new_tokens_var": 11.0}, "--max-new-tokens-var"),
        ({"shared_prefix": -1}, "--shared-prefix"),
        ({"prompt_generator_seed": -1}, "--prompt-generator-seed"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_told_by_its_option(given, words):
    with pytest.raises(ConfigError) as raised:
        configured(**given)
    assert raised.value.message.startswith(words)


def test_a_long_prompt_is_its_own_limit():
    def longest(**given: Any) -> int:
        return configured(**given).sweeps[0].prompts.max_prompt_length

    assert longest() == 4000
    assert longest(prompt_length=4000) == 4000
    assert longest(prompt_length=5000) == 5000
    assert longest(prompt_length=5000, max_prompt_length=6000) == 6000


def test_a_run_has_what_the_options_say():
    config = configured(
        duration="2s", slo=["ttft:p99<200ms"], request_timeout="60s", early_stop_latency=3.0,
        max_errors=4, num_workers=2, use_threading=True, result_dir=Path("there"), force=True,
        saturation=True, max_clients=64,
    )  # fmt: skip
    assert config.search_point_s == 2.0
    assert config.slo == ("ttft:p99<200ms",)
    assert (config.limits.request_timeout_s, config.limits.early_stop_latency_s) == (60.0, 3.0)
    assert (config.limits.max_errors, config.limits.max_error_rate) == (4, 0.5)
    assert (config.num_workers, config.use_threading, config.force) == (2, True, True)
    assert (config.result_dir, config.is_search, config.max_clients) == (Path("there"), True, 64)


def test_how_long_a_searchs_points_are_is_up_to_it_unless_said():
    assert configured(saturation=True).search_point_s is None


def test_files_make_a_sweep_of_each_combination(tmp_path):
    pytest.importorskip("yaml", reason="--config-file needs PyYAML")
    path = tmp_path / "sweep.yaml"
    path.write_text("prompt_length: [64, 5000]\nrate: [1, 2]\nmax_new_tokens: 8\n")
    sweeps = make_sweeps(arguments(config_file=[path], num_clients=[7], min_requests=10))
    assert [sweep.prompts.prompt_length for sweep in sweeps] == [64, 5000]
    assert [sweep.prompts.max_prompt_length for sweep in sweeps] == [4000, 5000]
    assert {sweep.prompts.max_new_tokens for sweep in sweeps} == {8}
    for sweep in sweeps:
        assert [load.rate_per_s for load in sweep.loads] == [1.0, 2.0]
    path.write_text("prompt_length: [64, many]\n")
    with pytest.raises(InputFileError, match=r"sweep.yaml:1: prompt_length must be a whole number"):
        make_sweeps(arguments(config_file=[path]))


# --- what is found out before anything is sent ---------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"slo": ["ttft<"]}, "--slo"),
        ({"slo": ["ttft:p99<1s"], "streaming": False}, "--slo"),
        ({"api": "no-such-client"}, "--api"),
        ({"prompt_text_source": "missing/words.txt"}, "there is no such file"),
        ({"prompt_text_source": " "}, "--prompt-text-source"),
    ],
)  # fmt: skip
def test_a_plan_that_would_stop_later(given, words):
    with pytest.raises((ConfigError, InputFileError)) as raised:
        check_plan(configured(**given))
    assert words in raised.value.message


def test_a_plan_that_works():
    check_plan(configured(slo=["e2e:p99<1s", "errors<1%"], streaming=False))
    check_plan(configured(slo=["ttft:p99<1s"]))
