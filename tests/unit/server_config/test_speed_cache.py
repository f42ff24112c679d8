"""The cache of measured speeds: what it tells apart, and what it survives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from flexbench.core.environment import DriverGpu, GpuListing
from flexbench.core.errors import FlexbenchError
from flexbench.models.families import decoder_spec
from flexbench.models.published import published_spec
from flexbench.server_config import compute, speed_cache
from flexbench.server_config.compute_setup import ComputeSetup
from flexbench.server_config.speed_cache import (
    CachedNetwork,
    CachedSpeed,
    SpeedCache,
    device_name,
)
from flexbench.server_config.speeds import ComputeSpeed, Network

BLOOM = published_spec("bloom-560m")
LLAMA = published_spec("llama-2-7b")
SETUP = ComputeSetup(devices=("cuda:0",), torch_dtype="bfloat16", quant_type="none")
SPEED = CachedSpeed(
    compute=ComputeSpeed(forward_rps=2000.5, inference_rps=100.25, source="measured"),
    measured_at="2026-11-21T10:00:00.000+00:00",
)
NETWORK = Network(download_bits_per_s=9e7, upload_bits_per_s=4e7, source="measured with a tool")


@pytest.fixture
def cache(tmp_path: Path) -> SpeedCache:
    return SpeedCache(tmp_path / "cache" / "speeds.json")


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    versions = {"torch": "2.5", "petals": "2.2", "transformers": "4.34", "bitsandbytes": "0.45"}
    monkeypatch.setattr(speed_cache, "_version", versions.get)
    monkeypatch.setattr(compute, "is_installed", lambda name: True)
    return versions


def store(cache: SpeedCache, spec=BLOOM, setup=SETUP, device="A100", speed=SPEED) -> None:
    cache.store(spec, setup, device, speed.compute, measured_at=speed.measured_at)


def test_what_is_stored_is_found_again(cache):
    assert cache.lookup(BLOOM, SETUP, "A100") is None
    store(cache)
    assert cache.lookup(BLOOM, SETUP, "A100") == SPEED


def test_a_new_measurement_takes_the_place_of_the_old_one_and_of_no_other(cache):
    newer = replace(SPEED, measured_at="2026-11-22T10:00:00.000+00:00")
    store(cache)
    store(cache, LLAMA)
    store(cache, speed=newer)
    assert cache.lookup(BLOOM, SETUP, "A100") == newer
    assert cache.lookup(LLAMA, SETUP, "A100") == SPEED


def test_the_network_is_that_of_the_machine_and_not_of_a_model(cache, monkeypatch):
    assert cache.lookup_network() is None
    cache.store_network(NETWORK, measured_at=SPEED.measured_at)
    assert cache.lookup(BLOOM, SETUP, "A100") is None
    for spec in (BLOOM, LLAMA):
        store(cache, spec)
        assert cache.lookup(spec, SETUP, "A100") == replace(SPEED, network=NETWORK)
    newer = replace(NETWORK, upload_bits_per_s=1e6)
    cache.store_network(newer, measured_at="2026-11-23T10:00:00.000+00:00")
    assert cache.lookup_network() == CachedNetwork(
        network=newer, measured_at="2026-11-23T10:00:00.000+00:00"
    )
    assert cache.lookup(BLOOM, SETUP, "A100") == replace(SPEED, network=newer)
    # A home folder may be used by many machines.
    monkeypatch.setattr(speed_cache.platform, "node", lambda: "another-machine")
    assert cache.lookup_network() is None
    assert cache.lookup(BLOOM, SETUP, "A100") == SPEED
    cache.store_network(NETWORK, measured_at=SPEED.measured_at)
    monkeypatch.undo()
    assert cache.lookup_network().network == newer
    assert "another-machine" not in cache.path.read_text()


def test_what_was_assumed_is_not_stored(cache):
    with pytest.raises(AssertionError, match="assumed, as Petals does"):
        cache.store_network(Network(), measured_at=SPEED.measured_at)


@pytest.mark.parametrize(
    ("age", "is_recent"),
    [
        (timedelta(minutes=1), True),
        (timedelta(days=6), True),
        (timedelta(days=8), False),
        (timedelta(days=-1), False),  # a clock that was set back
    ],
)
def test_a_network_gets_old(age, is_recent):
    measured_at = (datetime.now(UTC) - age).isoformat(timespec="milliseconds")
    assert CachedNetwork(network=NETWORK, measured_at=measured_at).is_recent is is_recent


@pytest.mark.parametrize(
    ("spec", "setup", "device"),
    [
        (LLAMA, SETUP, "A100"),
        (BLOOM, replace(SETUP, torch_dtype="float16"), "A100"),
        (BLOOM, replace(SETUP, quant_type="nf4"), "A100"),
        (BLOOM, replace(SETUP, devices=("cuda:0", "cuda:1")), "A100"),
        (BLOOM, SETUP, "H100"),
    ],
    ids=["model", "dtype", "quantization", "number of devices", "device"],
)
def test_another_setup_is_another_speed(cache, spec, setup, device):
    store(cache)
    assert cache.lookup(spec, setup, device) is None


@pytest.mark.parametrize("package", ["torch", "petals", "transformers", "bitsandbytes"])
def test_another_version_is_another_speed(cache, versions, package):
    setup = replace(SETUP, quant_type="int8")
    store(cache, setup=setup)
    versions[package] += ".1"
    assert cache.lookup(BLOOM, setup, "A100") is None


def test_only_quantized_blocks_depend_on_bitsandbytes(cache, versions):
    store(cache)
    versions["bitsandbytes"] = "0.46"
    assert cache.lookup(BLOOM, SETUP, "A100") == SPEED


def test_our_own_block_is_not_that_of_petals(cache, versions, monkeypatch):
    store(cache)
    monkeypatch.setattr(compute, "is_installed", lambda name: name != "petals")
    assert cache.lookup(BLOOM, SETUP, "A100") is None
    store(cache)
    monkeypatch.setattr(speed_cache, "OWN_BLOCK_VERSION", 1000)
    assert cache.lookup(BLOOM, SETUP, "A100") is None


def test_the_dimensions_count_and_the_name_does_not(cache):
    store(cache, LLAMA)
    mine = {**LLAMA.values, "vocab_size": 5, "num_hidden_layers": 3}
    assert cache.lookup(decoder_spec("mine", mine), SETUP, "A100") == SPEED
    for change in ({"intermediate_size": 64}, {"num_key_value_heads": 8}, {"hidden_act": "gelu"}):
        changed = decoder_spec(LLAMA.name, {**LLAMA.values, **change})
        assert cache.lookup(changed, SETUP, "A100") is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b"[" * 100_000,
        b'{"schema_version": 2, "speeds": 5}',
        b'{"schema_version": 2, "speeds": {}, "networks": [3]}',
        b'{"schema_version": 1, "speeds": {}}',
    ],
    ids=lambda content: repr(content[:40]),
)
def test_a_file_that_cannot_be_understood_holds_nothing_and_is_written_anew(cache, content):
    cache.path.parent.mkdir()
    cache.path.write_bytes(content)
    assert cache.lookup(BLOOM, SETUP, "A100") is None
    store(cache)
    assert cache.lookup(BLOOM, SETUP, "A100") == SPEED


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: entry.clear(),
        lambda entry: entry.pop("compute"),
        lambda entry: entry.update(compute=[]),
        lambda entry: entry["compute"].update(forward_rps=0),
        lambda entry: entry["compute"].update(forward_rps=None),
        lambda entry: entry["compute"].update(forward_rps=True),
        lambda entry: entry["compute"].update(forward_rps=10**400),
        lambda entry: entry["compute"].update(inference_rps="fast"),
        lambda entry: entry["compute"].update(source=None),
        lambda entry: entry["compute"].update(something="new"),
        lambda entry: entry.update(measured_at="yesterday"),
        lambda entry: entry.update(measured_at="2026-11-21T10:00:00"),
        lambda entry: entry.update(measured_at=5),
    ],
)
def test_a_damaged_entry_is_none(cache, damage):
    store(cache)
    content = json.loads(cache.path.read_text())
    damage(next(iter(content["speeds"].values())))
    cache.path.write_text(json.dumps(content))
    assert cache.lookup(BLOOM, SETUP, "A100") is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: entry.clear(),
        lambda entry: entry.update(upload_bits_per_s=-1),
        lambda entry: entry.update(upload_bits_per_s=float("nan")),
        lambda entry: entry.update(upload_bits_per_s=float("inf")),
        lambda entry: entry.update(download_bits_per_s=10**400),
        lambda entry: entry.update(source=5),
        lambda entry: entry.update(source="assumed, as Petals does"),
        lambda entry: entry.update(something="new"),
        lambda entry: entry.update(measured_at="yesterday"),
        lambda entry: entry.update(measured_at="2026-11-21T10:00:00"),
    ],
)
def test_a_damaged_network_is_none(cache, damage):
    store(cache)
    cache.store_network(NETWORK, measured_at=SPEED.measured_at)
    content = json.loads(cache.path.read_text())
    damage(next(iter(content["networks"].values())))
    cache.path.write_text(json.dumps(content))
    assert cache.lookup_network() is None
    assert cache.lookup(BLOOM, SETUP, "A100") == SPEED


def test_on_a_cpu_the_number_of_threads_counts(cache, monkeypatch):
    cpu = replace(SETUP, devices=("cpu",))
    monkeypatch.setattr(speed_cache, "num_cpus", lambda: 4)
    for same in ("", "4", "4,2", "0", "many"):
        monkeypatch.setenv("OMP_NUM_THREADS", same)
        assert speed_cache._num_threads() == 4
    store(cache, setup=cpu)
    store(cache)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert cache.lookup(BLOOM, cpu, "A100") == SPEED
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert cache.lookup(BLOOM, cpu, "A100") is None
    assert cache.lookup(BLOOM, SETUP, "A100") == SPEED  # a GPU does not care


def test_many_writers_lose_nothing(cache):
    devices = [f"GPU {number}" for number in range(20)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda device: store(cache, device=device), devices))
    assert all(cache.lookup(BLOOM, SETUP, device) == SPEED for device in devices)
    # Nothing but the file and its lock: no temporary file is left.
    assert sorted(path.name for path in cache.path.parent.iterdir()) == [
        "speeds.json",
        "speeds.lock",
    ]


def test_a_folder_that_cannot_be_written_is_an_error_that_names_it(tmp_path):
    (tmp_path / "file").write_text("")
    cache = SpeedCache(tmp_path / "file" / "speeds.json")
    assert cache.lookup(BLOOM, SETUP, "A100") is None
    with pytest.raises(FlexbenchError, match=r"file/speeds\.json: .*could not be kept"):
        store(cache)


def test_the_old_file_stays_when_the_new_one_cannot_be_written(cache, monkeypatch):
    store(cache)

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(FlexbenchError, match="No space left"):
        store(cache, device="H100")
    assert cache.lookup(BLOOM, SETUP, "A100") == SPEED
    assert len(list(cache.path.parent.iterdir())) == 2


def test_where_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for unusable in ("", "relative/folder"):
        monkeypatch.setenv("XDG_CACHE_HOME", unusable)
        assert SpeedCache().path == tmp_path / ".cache/flexbench/speeds.json"
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert SpeedCache().path == Path("/somewhere/flexbench/speeds.json")


def test_names_of_devices(monkeypatch):
    gpus = [DriverGpu(name="A100"), DriverGpu(name="H100"), DriverGpu()]
    monkeypatch.setattr(speed_cache, "visible_gpus", lambda: GpuListing(gpus=tuple(gpus)))
    monkeypatch.setattr(speed_cache, "cpu_model", lambda: "Some CPU")
    monkeypatch.setattr(speed_cache, "num_cpus", lambda: 4)

    def name(*devices: str) -> str:
        return device_name(replace(SETUP, devices=devices))

    assert name("cpu") == "CPU (Some CPU, 4 cores)"
    assert name("mps") == "MPS"
    assert name("cuda:1") == "H100"
    assert name("cuda:0", "cuda:1") == "A100 + H100"
    assert name("cuda:2") == "GPU"
    assert name("cuda:7") == "GPU"
    gpus[0] = gpus[1]
    assert name("cuda:0", "cuda:1") == "H100"


def test_a_look_up_imports_nothing_heavy(tmp_path):
    code = (
        "import sys\n"
        "from flexbench.models.published import published_spec\n"
        "from flexbench.server_config.compute_setup import ComputeSetup\n"
        "from flexbench.server_config.speed_cache import SpeedCache, device_name\n"
        "setup = ComputeSetup(devices=('cpu',), torch_dtype='float32', quant_type='nf4')\n"
        "assert SpeedCache().lookup(published_spec('opt-125m'), setup, device_name(setup)) is None\n"
        "print(*sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    heavy = {"torch", "petals", "hivemind", "transformers", "bitsandbytes", "numpy"}
    assert heavy.isdisjoint(done.stdout.split())
    assert list(tmp_path.iterdir()) == []
