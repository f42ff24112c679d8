"""Measuring a server's speed: real blocks in a real worker, and what is kept of it."""

from __future__ import annotations

import re
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flexbench.core.environment import may_have_gpu
from flexbench.core.errors import (
    ConfigError,
    DeadlineError,
    FlexbenchError,
    MissingDependencyError,
    WorkerError,
)
from flexbench.core.fork_server import fork_server
from flexbench.core.processes import Deadline, WorkerChannel
from flexbench.core.progress import Silence
from flexbench.models.families import DecoderSpec, decoder_spec
from flexbench.models.published import published_spec
from flexbench.petals_runtime.crew import open_crew
from flexbench.server_config import compute
from flexbench.server_config import measure as measure_module
from flexbench.server_config.bandwidth import SpeedTest
from flexbench.server_config.compute_setup import ComputeSetup
from flexbench.server_config.measure import Measurement, measure
from flexbench.server_config.speed_cache import SpeedCache
from flexbench.server_config.speeds import ComputeSpeed, Network

SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
BLOOM = decoder_spec("small bloom", {"model_type": "bloom", **SIZES})
LLAMA = decoder_spec("small llama", {"model_type": "llama", **SIZES, "intermediate_size": 128})
CPU = ComputeSetup(devices=("cpu",), torch_dtype="float32", quant_type="none")
NETWORK = Network(source="given")


class Notes(Silence):
    """Keeps the phases and the notes."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.notes: list[str] = []

    @contextmanager
    def phase(self, description: str, total: int):  # noqa: ARG002
        self.phases.append(description)
        yield self

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module", autouse=True)
def warm_fork_server():
    """Its imports are paid for once, not for each measurement."""
    with fork_server(["flexbench.petals_runtime.preload"]):
        yield


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, temporary_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def measure_now(
    spec: DecoderSpec = BLOOM, setup: ComputeSetup = CPU, **changes: Any
) -> Measurement:
    options = {"network": NETWORK, "force": False, "timeout_s": 100, "progress": Silence()}
    return measure(spec, setup, **options | changes)


def hide(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    is_installed = compute.is_installed
    monkeypatch.setattr(
        compute, "is_installed", lambda name: name not in packages and is_installed(name)
    )


def refuse_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a process is to be started")

    monkeypatch.setattr(measure_module, "open_crew", refuse)


def assert_measured(measurement: Measurement, block: str) -> None:
    speed = measurement.compute
    assert speed.forward_rps > 0
    assert speed.inference_rps > 0
    # A batch of 1024 tokens keeps the processor busier than a single one.
    assert speed.forward_rps > speed.inference_rps
    minute = r"\d{4}-\d\d-\d\dT\d\d:\d\dZ"
    device = r"CPU \(.+, \d+ cores\)"
    assert re.fullmatch(f"measured {minute} on {device}, {re.escape(block)}", speed.source)
    assert measurement.network == NETWORK
    assert not measurement.is_cached


# --- real measurements -------------------------------------------------------------------------


def test_opt_is_measured_as_the_bloom_block_of_petals():
    progress = Notes()
    measurement = measure_now(published_spec("opt-125m"), progress=progress)
    version = compute.metadata.version("petals")
    assert_measured(measurement, f"WrappedBloomBlock of petals {version} in place of OPT's")
    assert progress.phases == [
        "Starting a process to measure in",
        "Measuring inference: 100 steps of 1 token",
        "Measuring forward: 10 steps of 1024 tokens",
    ]
    assert "as many parameters" in progress.notes[0]


def test_the_second_time_nothing_is_started_and_force_measures_again(monkeypatch):
    first = measure_now()
    with monkeypatch.context() as context:
        refuse_processes(context)
        assert measure_now() == replace(first, is_cached=True)
        # Another model of these dimensions has this speed; another type has not.
        same = decoder_spec("another name", {**BLOOM.values, "num_hidden_layers": 70})
        assert measure_now(same).is_cached
        for changes in ({"force": True}, {"setup": replace(CPU, torch_dtype="bfloat16")}):
            with pytest.raises(AssertionError, match="to be started"):
                measure_now(**changes)
    again = measure_now(force=True)
    assert not again.is_cached
    assert again.measured_at > first.measured_at
    assert again.compute.forward_rps != first.compute.forward_rps
    assert measure_now() == replace(again, is_cached=True)


@pytest.mark.parametrize("family", ["bloom", "opt"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_petals_our_own_block_is_measured(monkeypatch, family, dtype):
    hide(monkeypatch, "petals", "hivemind")
    spec = decoder_spec("small", {"model_type": family, **SIZES})
    progress = Notes()
    measurement = measure_now(spec, replace(CPU, torch_dtype=dtype), progress=progress)
    assert_measured(measurement, "flexbench's own block")
    assert progress.notes == []


def test_an_opt_block_that_is_like_no_bloom_block_is_ours():
    spec = decoder_spec("narrow", {"model_type": "opt", **SIZES, "ffn_dim": 64})
    assert_measured(measure_now(spec), "flexbench's own block")
    with pytest.raises(ConfigError, match="has no block like that of narrow"):
        measure_now(spec, replace(CPU, quant_type="nf4"))


def test_llama_is_measured_with_the_block_of_petals():
    version = compute.metadata.version("petals")
    assert_measured(measure_now(LLAMA), f"WrappedLlamaBlock of petals {version}")


def count_parameters(channel: WorkerChannel, specs: list[DecoderSpec]) -> None:
    for spec in specs:
        config = compute.petals_config(spec)
        parameters = config.block_class(config).parameters()
        channel.queue.put(sum(parameter.numel() for parameter in parameters))


def test_the_blocks_of_petals_have_the_dimensions_of_the_model():
    falcon = {"model_type": "falcon", **SIZES}
    rope = {"rope_type": "llama3", "factor": 8.0}
    specs = [
        decoder_spec("b", {"model_type": "bloom", "n_embed": 64, "n_head": 2, "n_layer": 2}),
        decoder_spec("o", {"model_type": "opt", **SIZES}),
        decoder_spec("l", {**LLAMA.values, "num_key_value_heads": 1, "rope_scaling": rope}),
        decoder_spec("f", falcon),
        decoder_spec("f", {**falcon, "multi_query": False, "bias": True, "alibi": True}),
        decoder_spec("f", {**falcon, "new_decoder_architecture": True, "num_kv_heads": 1}),
    ]
    with open_crew() as crew:
        crew.start("count", count_parameters, specs)
        deadline = Deadline(60, lambda: "no answer")
        counts = [crew.next_message(deadline)[1].payload for _ in specs]
    assert counts == [spec.block_parameters for spec in specs]


# --- what goes wrong ---------------------------------------------------------------------------


def hang(channel: WorkerChannel, *_: object) -> None:
    channel.ready.set()
    time.sleep(3600)


def fail(channel: WorkerChannel, *_: object) -> None:
    channel.ready.set()
    print("the last words", flush=True)
    raise RuntimeError("no such kernel")


def measure_half(channel: WorkerChannel, *_: object) -> None:
    channel.ready.set()
    channel.queue.put(compute.Rate(kind="inference", value=123.456, block="a block"))
    time.sleep(3600)


def refuse(channel: WorkerChannel, *_: object) -> None:
    channel.ready.set()
    channel.queue.put(compute.Refused(option="--device", problem="no such GPU"))


def test_what_takes_too_long_is_named_with_the_option(monkeypatch):
    with pytest.raises(DeadlineError) as error:
        measure_now(timeout_s=0.01)
    assert error.value.message == (
        "starting a process to measure in did not end within 0.01 s (--measure-timeout)"
    )
    monkeypatch.setattr(measure_module, "measure_compute", hang)
    with pytest.raises(DeadlineError, match=r"inference \(100 steps of 1 token\) did not end"):
        measure_now(timeout_s=2)


def test_the_rate_that_was_measured_already_is_told(monkeypatch, cache_folder):
    monkeypatch.setattr(measure_module, "measure_compute", measure_half)
    with pytest.raises(DeadlineError, match=r"forward \(10 steps of 1024 tokens\)") as error:
        measure_now(timeout_s=3)
    assert (
        "Measured before that, and not kept: inference with 123.456 tokens/s; "
        "--inference-rps 123.456 gives it without a measurement"
    ) in error.value.details
    assert not cache_folder.exists()


def test_a_worker_that_fails_is_reported_with_its_last_lines(monkeypatch, tmp_path):
    monkeypatch.setattr(measure_module, "measure_compute", fail)
    with pytest.raises(WorkerError, match="measurement failed: RuntimeError: no such kernel") as e:
        measure_now(log_folder=tmp_path / "logs")
    assert "the last words" in e.value.details
    assert (tmp_path / "logs" / "measurement.log").exists()


def test_what_the_machine_cannot_do_is_an_option_that_cannot_work(monkeypatch, temporary_folder):
    monkeypatch.setattr(measure_module, "measure_compute", refuse)
    with pytest.raises(ConfigError, match="--device: no such GPU"):
        measure_now()
    assert list(temporary_folder.rglob("*.log")) == []


def test_a_gpu_that_is_not_there_is_refused():
    if may_have_gpu():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError, match="--device: cuda:0: torch finds 0 GPUs"):
        measure_now(setup=replace(CPU, devices=("cuda:0",)))


def test_an_error_of_quantization_says_what_was_tried():
    quantized = replace(CPU, quant_type="nf4")
    error = RuntimeError("no kernel image")
    refused = compute._refusal(error, BLOOM, quantized)
    assert refused.option == "--quant-type"
    assert re.fullmatch(
        r"nf4 does not work on cpu with bitsandbytes \S+: RuntimeError: no kernel image",
        refused.problem,
    )
    assert compute._refusal(error, BLOOM, CPU) is None


def test_a_block_that_does_not_fit_is_not_begun(monkeypatch):
    refuse_processes(monkeypatch)
    monkeypatch.setattr(compute, "available_memory_bytes", lambda: 8 * 2**30)
    with pytest.raises(ConfigError) as error:
        measure_now(published_spec("bigscience/bloom"))
    # 12 x 14336^2 parameters of 4 bytes; 4 x 112 x 1024^2 attention weights, and 16 hidden states.
    assert error.value.message == (
        "--measure: one block of bigscience/bloom takes 9.19 GiB while it is built in float32, "
        "1024 tokens 2.62 GiB; this machine has 8 GiB of memory left; measure a smaller model, or "
        "give --forward-rps and --inference-rps"
    )
    monkeypatch.setattr(compute, "available_memory_bytes", lambda: None)
    with pytest.raises(AssertionError, match="to be started"):
        measure_now(published_spec("bigscience/bloom"))


@pytest.mark.parametrize(
    ("hidden", "spec", "setup", "problem"),
    [
        (["torch"], BLOOM, CPU, "not installed: torch"),
        (["petals"], LLAMA, CPU, "not installed: petals; the blocks of the family llama are"),
        (["petals", "hivemind"], LLAMA, CPU, "not installed: petals, hivemind;"),
        (["petals"], BLOOM, replace(CPU, quant_type="int8"), "--quant-type int8 is done by Petals"),
        (["petals"], BLOOM, replace(CPU, devices=("cuda:0", "cuda:1")), "tensor parallelism is"),
        (["bitsandbytes"], LLAMA, replace(CPU, quant_type="nf4"), "not installed: bitsandbytes"),
    ],
)
def test_what_is_missing_is_named_with_how_to_get_it(monkeypatch, hidden, spec, setup, problem):
    refuse_processes(monkeypatch)
    hide(monkeypatch, *hidden)
    with pytest.raises(MissingDependencyError, match=re.escape(problem)) as error:
        measure_now(spec, setup)
    assert "pip install" in error.value.message


def test_a_family_that_this_petals_lacks_is_named(monkeypatch):
    refuse_processes(monkeypatch)
    if not compute.metadata.version("petals").startswith("2.2."):
        pytest.skip("newer versions of Petals have Mixtral")
    with pytest.raises(
        MissingDependencyError, match=r"petals 2\.2.*no block of the family mixtral"
    ):
        measure_now(published_spec("mixtral-8x7b"))


def test_ctrl_c_ends_the_worker(flexbench, tmp_path):
    script = tmp_path / "measure.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "from rich.console import Console\n"
        "from flexbench.core.errors import Interrupted\n"
        "from flexbench.core.progress import PlainProgress\n"
        "from tests.integration import test_server_config_measure as tests\n"
        "if __name__ == '__main__':\n"
        "    tests.measure_module.measure_compute = tests.hang\n"
        "    try:\n"
        "        tests.measure_now(progress=PlainProgress(Console(stderr=True)))\n"
        "    except Interrupted as error:\n"
        "        sys.exit(error.exit_code)\n"
    )
    command = flexbench(program=(sys.executable, str(script)))
    command.wait_for_text("Measuring inference")
    command.process.send_signal(signal.SIGINT)
    assert command.finish(10) == 130, command.stderr
    command.assert_nothing_left(within_s=2)
    assert command.temporary_files() == []


# --- what is kept, with nothing measured -------------------------------------------------------


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was measured, in place of measuring it."""
    measured: list[str] = []

    def compute_speed(*_: object, **__: object) -> ComputeSpeed:
        measured.append("compute")
        return ComputeSpeed(forward_rps=2.0, inference_rps=1.0, source="measured")

    def network(timeout_s: float) -> Network:
        measured.append(f"network within {timeout_s:g} s")
        return Network(upload_bits_per_s=5e6, source="measured with a tool")

    tools = (SpeedTest(name="speedtest-cli", path=Path("speedtest-cli")),)
    monkeypatch.setattr(measure_module, "_measure_compute", compute_speed)
    monkeypatch.setattr(measure_module, "measure_network", network)
    monkeypatch.setattr(measure_module, "find_speed_tests", lambda: tools)
    return measured


def test_the_network_is_measured_once_unless_it_is_given(counted):
    assert measure_now().network == NETWORK
    assert counted == ["compute"]
    progress = Notes()
    measurement = measure_now(network=None, progress=progress)
    assert progress.phases == ["Measuring the network with speedtest-cli"]
    assert measurement.network.upload_bits_per_s == 5e6
    assert re.fullmatch(r"measured with a tool, \d{4}-\d\d-\d\d", measurement.network.source)
    assert measurement.is_cached  # computing is
    assert counted == ["compute", "network within 60 s"]
    assert measure_now(network=None) == measurement
    assert measure_now().network == NETWORK
    # It is that of the machine, not of a model.
    assert measure_now(LLAMA, network=None).network == measurement.network
    assert counted[2:] == ["compute"]
    measure_now(network=None, force=True, timeout_s=7)
    assert counted[3:] == ["compute", "network within 7 s"]


def test_a_new_measurement_without_the_network_keeps_what_is_known_of_it(counted):
    measure_now(network=None)
    measure_now(force=True)
    assert measure_now(network=None).network.upload_bits_per_s == 5e6
    assert counted == ["compute", "network within 60 s", "compute"]


def test_a_network_that_was_measured_long_ago_is_measured_again(counted):
    old = Network(upload_bits_per_s=1e6, source="measured with a tool, 2020-01-01")
    SpeedCache().store_network(old, measured_at="2020-01-01T00:00:00.000+00:00")
    assert measure_now(network=None).network.upload_bits_per_s == 5e6
    assert counted == ["compute", "network within 60 s"]
    assert SpeedCache().lookup_network().measured_at > "2020-01-02"


def test_what_is_assumed_of_the_network_is_tried_again(counted, monkeypatch):
    with monkeypatch.context() as context:
        context.setattr(measure_module, "measure_network", lambda timeout_s: Network())
        assert measure_now(network=None).network == Network()
        assert SpeedCache().lookup_network() is None
    assert measure_now(network=None).network.upload_bits_per_s == 5e6
    assert counted == ["compute", "network within 60 s"]


def test_when_both_rates_are_given_only_the_network_is_measured(counted):
    measurement = measure_now(network=None, needs_compute=False)
    assert measurement.compute == ComputeSpeed()
    assert (measurement.is_cached, measurement.measured_at) == (False, None)
    assert measurement.network.upload_bits_per_s == 5e6
    assert measure_now(needs_compute=False, force=True).network == NETWORK
    assert counted == ["network within 60 s"]


def test_without_a_speed_test_the_next_run_looks_for_one_again(counted, monkeypatch):
    with monkeypatch.context() as context:
        context.setattr(measure_module, "find_speed_tests", lambda: ())
        context.setattr(measure_module, "measure_network", lambda timeout_s: Network())
        progress = Notes()
        measure_now(network=None, progress=progress)
        assert progress.phases == []
    measure_now(network=None)
    assert counted == ["compute", "network within 60 s"]


def test_computing_is_kept_when_the_speed_test_is_interrupted(counted, monkeypatch):
    def interrupt(timeout_s: float) -> Network:
        raise FlexbenchError("stopped")

    with monkeypatch.context() as context:
        context.setattr(measure_module, "measure_network", interrupt)
        with pytest.raises(FlexbenchError, match="stopped"):
            measure_now(network=None)
    assert measure_now().is_cached
    assert counted == ["compute"]


def test_a_cache_that_cannot_be_written_is_a_note(counted, cache_folder):
    cache_folder.write_text("a file, not a folder")
    progress = Notes()
    assert measure_now(progress=progress).compute.forward_rps == 2
    assert "could not be kept" in progress.notes[0]
