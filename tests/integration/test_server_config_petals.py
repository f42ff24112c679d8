"""The figures of server-config beside those of Petals' own functions. Nothing is started."""

from __future__ import annotations

import inspect
import json
import logging
import math
import multiprocessing
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from flexbench.models.config_file import find_model
from flexbench.models.families import DTYPE_BYTES, DecoderSpec, decoder_spec
from flexbench.models.published import PUBLISHED_NAMES, published_spec
from flexbench.server_config.budget import (
    GIB,
    QUANT_TYPES,
    TOO_LITTLE_MEMORY,
    BlockCosts,
    announced_cache_tokens,
    autograd_bytes,
    block_bytes,
    block_costs,
    cache_bytes_per_block,
    disk_bytes,
    petals_key_value_groups,
    resolve_dtype,
    server_defaults,
)
from flexbench.server_config.config import (
    NO_FLOAT16,
    NO_GPU,
    UNEVEN_GPUS,
    ServerConfig,
    resolve_machine,
)
from flexbench.server_config.hardware import COMMON_CARD_GIB, Gpu, GpuSet
from flexbench.server_config.placement import best_start, servers_for, swarm_throughput
from flexbench.server_config.speeds import (
    DEFAULT_BITS_PER_S,
    DEFAULT_INFERENCE_RPS,
    HOP_OVERHEAD_S,
    MAX_DELAY_S,
    RELAY_PENALTY,
    UNKNOWN_DELAY_S,
    Network,
    client_step_s,
    server_throughput,
)

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "intermediate_size": 100,
}
FALCON = {
    "model_type": "falcon",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
}
# What no published model has.
VARIANTS: dict[str, dict[str, Any]] = {
    "bloom, other names": {
        "model_type": "bloom",
        "n_embed": 64,
        "num_attention_heads": 8,
        "num_hidden_layers": 3,
        "torch_dtype": "float32",
    },
    "bloom, n_embed wins": {
        "model_type": "bloom",
        "n_embed": 64,
        "hidden_size": 1000,
        "n_head": 8,
        "n_layer": 3,
    },
    "bloom, both names": {
        "model_type": "bloom",
        "hidden_size": 64,
        "n_head": 4,
        "num_attention_heads": 8,
        "n_layer": 4,
        "num_hidden_layers": 3,
    },
    "llama": {**LLAMA, "torch_dtype": "float32"},
    "llama, kv heads unset": {**LLAMA, "num_key_value_heads": None, "torch_dtype": None},
    "llama, grouped heads": {**LLAMA, "num_key_value_heads": 2, "torch_dtype": "float16"},
    "llama, one kv head": {**LLAMA, "num_key_value_heads": 1},
    "llama, attention bias": {**LLAMA, "attention_bias": True},
    "llama, grouped heads and bias": {**LLAMA, "num_key_value_heads": 4, "attention_bias": True},
    "falcon": FALCON,
    "falcon, n_embed": {**FALCON, "n_embed": 128},
    "falcon, null": {**FALCON, "multi_query": None, "parallel_attn": None, "bias": None},
    "falcon, bias": {**FALCON, "bias": True},
    "falcon, one after the other": {**FALCON, "parallel_attn": False},
    "falcon, many queries": {**FALCON, "multi_query": False},
    "falcon, kv heads unused": {**FALCON, "num_kv_heads": 4},
    "falcon, many queries, kv heads unused": {**FALCON, "multi_query": False, "num_kv_heads": 4},
    "falcon, alibi": {**FALCON, "alibi": True, "bias": True, "multi_query": False},
    "falcon, new": {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon, new, kv heads unset": {**FALCON, "new_decoder_architecture": True},
    "falcon, new, bias": {
        **FALCON,
        "new_decoder_architecture": True,
        "num_kv_heads": 4,
        "bias": True,
        "parallel_attn": False,
    },
}
PUBLISHED = [
    name for name in PUBLISHED_NAMES if published_spec(name).family in ("bloom", "falcon", "llama")
]
MODELS = [*PUBLISHED, *VARIANTS]
# One of each kind of block, and of each number of groups.
FEW_MODELS = [
    "bigscience/bloom",
    "meta-llama/Llama-2-7b-hf",
    "meta-llama/Llama-3.1-8B",
    "tiiuae/falcon-rw-1b",
    "tiiuae/falcon-7b",
    "tiiuae/falcon-180B",
]
every_model = pytest.mark.parametrize("model", MODELS)
few_models = pytest.mark.parametrize("model", FEW_MODELS)


def spec_of(model: str) -> DecoderSpec:
    return decoder_spec(model, VARIANTS[model]) if model in VARIANTS else published_spec(model)


@pytest.fixture(scope="module")
def petals() -> Iterator[SimpleNamespace]:
    """Petals' own modules, imported as the commands import them, in this process."""
    environment = set(os.environ)
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # First: it restores names that petals misses in the hivemind of today.
        import flexbench.petals_runtime.imports  # noqa: F401, I001
        import dijkstar
        import hivemind
        import torch
        from petals import constants, data_structures
        from petals.client.routing import sequence_info, sequence_manager
        from petals.models.bloom import DistributedBloomConfig
        from petals.models.falcon import DistributedFalconConfig
        from petals.models.llama import DistributedLlamaConfig
        from petals.server import block_selection, block_utils, memory_cache, server, throughput
        from petals.utils import dht, peft
        from petals.utils.auto_config import AutoDistributedConfig
        from petals.utils.convert_block import QuantType

    yield SimpleNamespace(
        AutoDistributedConfig=AutoDistributedConfig,
        PeerID=hivemind.PeerID,
        QuantType=QuantType,
        block_selection=block_selection,
        block_utils=block_utils,
        config_classes={
            "bloom": DistributedBloomConfig,
            "falcon": DistributedFalconConfig,
            "llama": DistributedLlamaConfig,
        },
        constants=constants,
        data=data_structures,
        dht=dht,
        dijkstar=dijkstar,
        memory_cache=memory_cache,
        peft=peft,
        sequence_info=sequence_info,
        sequence_manager=sequence_manager,
        server=server,
        throughput=throughput,
        torch=torch,
    )
    # Other tests in this process need not know of all this.
    for name in set(os.environ) - environment:
        del os.environ[name]
    root.handlers[:] = handlers
    root.setLevel(level)


def config_of(petals: SimpleNamespace, values: Mapping[str, Any]) -> Any:
    """Petals' configuration made of the values of a config.json."""
    options = {key: value for key, value in values.items() if key != "model_type"}
    return petals.config_classes[values["model_type"]](**options)


def petals_config(petals: SimpleNamespace, spec: DecoderSpec) -> Any:
    return config_of(petals, without_rope_scaling(spec))


def without_rope_scaling(spec):
    """The pinned transformers refuses that of Llama 3.1, and no size depends on it."""
    return {name: value for name, value in spec.values.items() if name != "rope_scaling"}


def quant_type_of(petals: SimpleNamespace, quant_type: str) -> Any:
    return petals.QuantType[quant_type.upper()]


# --- one block ---


@every_model
def test_a_block_takes_as_many_bytes_as_petals_counts(petals, model):
    spec = spec_of(model)
    config = petals_config(petals, spec)
    for dtype in DTYPE_BYTES:
        for quant_type in QUANT_TYPES:
            size = petals.block_utils.get_block_size(
                config,
                "memory",
                dtype=getattr(petals.torch, dtype),
                quant_type=quant_type_of(petals, quant_type),
            )
            assert block_bytes(spec, dtype, quant_type) == size
    assert disk_bytes(spec) == petals.block_utils.get_block_size(config, "disk")


@every_model
def test_a_block_has_as_many_parameters_as_the_one_that_petals_builds(petals, model):
    spec = spec_of(model)
    config = petals_config(petals, spec)
    with petals.block_utils.init_empty_weights(include_buffers=True):
        block = config.block_class(config)
    assert spec.block_parameters == sum(value.numel() for value in block.parameters())


@every_model
def test_dimensions_and_types_are_those_that_petals_reads_from_the_file(petals, model, tmp_path):
    spec = spec_of(model)
    (tmp_path / "config.json").write_text(json.dumps(without_rope_scaling(spec)))
    from_file = petals.AutoDistributedConfig.from_pretrained(str(tmp_path), dht_prefix="x")
    found = find_model(str(tmp_path))

    assert type(from_file) is petals.config_classes[spec.family]
    for config in (from_file, petals_config(petals, spec)):
        assert found.hidden_size == spec.hidden_size == config.hidden_size
        assert found.num_hidden_layers == spec.num_hidden_layers == config.num_hidden_layers
        assert found.num_attention_heads == spec.num_attention_heads == config.num_attention_heads
        assert petals_key_value_groups(spec) == config.num_key_value_groups
        for dtype in ("auto", *DTYPE_BYTES):
            resolved = petals.block_utils.resolve_block_dtype(
                config, petals.constants.DTYPE_MAP[dtype]
            )
            assert resolved == getattr(petals.torch, resolve_dtype(found, dtype))
        assert disk_bytes(found) == petals.block_utils.get_block_size(config, "disk")


def test_heads_that_do_not_divide_are_refused_by_both(petals):
    values = {**LLAMA, "num_attention_heads": 7, "num_key_value_heads": 7}
    config = config_of(petals, values)
    with pytest.raises(ValueError, match="hidden_size must be divisible by num_heads"):
        petals.block_utils.get_block_size(config, "disk")
    with pytest.raises(ValueError, match="hidden_size must be divisible by num_heads"):
        decoder_spec("x", values)


# --- how many blocks fit ---


@pytest.fixture
def gpus(petals, monkeypatch):
    """Sets the memory of the GPUs that petals sees, in bytes."""
    memory_bytes: list[int] = []
    sizes: dict[tuple[int, Any, Any], tuple[Any, int]] = {}
    get_block_size = petals.block_utils.get_block_size

    def remembered(config: Any, location: str, *, dtype: Any, quant_type: Any) -> int:
        """The same for the same arguments; asked here for thousands of sizes of memory."""
        key = (id(config), dtype, quant_type)
        if key not in sizes:
            size = get_block_size(config, location, dtype=dtype, quant_type=quant_type)
            sizes[key] = (config, size)  # as long as it lives, its id is its own
        return sizes[key][1]

    monkeypatch.setattr(petals.server, "get_block_size", remembered)

    def properties(device: Any) -> SimpleNamespace:
        return SimpleNamespace(total_memory=memory_bytes[device.index])

    monkeypatch.setattr(petals.torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(petals.torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(petals.torch.cuda, "get_device_name", lambda device: "Any")
    return memory_bytes


def given(sizes: Iterable[int]) -> GpuSet:
    """GPUs of these sizes, in bytes."""
    return GpuSet(gpus=tuple(Gpu(memory_bytes=size) for size in sizes), source="given")


def stand_in(
    petals: SimpleNamespace, spec: DecoderSpec, *, quant_type: str, dtype: str, num_devices: int = 1
) -> SimpleNamespace:
    """What Server._choose_num_blocks reads of a server."""
    devices = tuple(petals.torch.device("cuda", index) for index in range(num_devices))
    tokens = server_defaults(spec).attn_cache_tokens
    return SimpleNamespace(
        device=devices[0],
        tensor_parallel_devices=devices,
        block_config=petals_config(petals, spec),
        torch_dtype=getattr(petals.torch, dtype),
        quant_type=quant_type_of(petals, quant_type),
        adapters=(),
        _cache_bytes_per_block=cache_bytes_per_block(spec, dtype, tokens),
    )


def chosen_by_petals(petals: SimpleNamespace, server: SimpleNamespace) -> int:
    """What petals chooses, 0 where it refuses."""
    try:
        return petals.server.Server._choose_num_blocks(server)
    except AssertionError as error:
        assert str(error) == TOO_LITTLE_MEMORY  # noqa: PT017 - one outcome of two
        return 0


def our_costs(
    spec: DecoderSpec, *, quant_type: str, dtype: str, num_devices: int = 1
) -> BlockCosts:
    return block_costs(
        spec,
        dtype=dtype,
        quant_type=quant_type,
        attn_cache_tokens=server_defaults(spec).attn_cache_tokens,
        num_devices=num_devices,
    )


def sizes_of_gpus(costs: BlockCosts, layers: int, num_devices: int) -> list[int]:
    """Cards from 1 to 192 GiB, what they really report, and both sides of each further block."""
    cards = [gib * GIB for gib in (1, 2, 4, 6, *COMMON_CARD_GIB)]
    real = [round(size * 0.985) for size in cards]
    enough = [math.ceil(costs.memory_for(n) / num_devices) for n in range(1, layers + 2)]
    return [1, *cards, *real, *enough, *(size - 1 for size in enough)]


@pytest.mark.parametrize("num_devices", [1, 2])
@every_model
def test_as_many_blocks_fit_as_petals_chooses(petals, gpus, model, num_devices):
    spec = spec_of(model)
    layers = spec.num_hidden_layers
    for dtype in DTYPE_BYTES:
        for quant_type in QUANT_TYPES:
            kind = {"quant_type": quant_type, "dtype": dtype, "num_devices": num_devices}
            server, costs = stand_in(petals, spec, **kind), our_costs(spec, **kind)
            chosen = set()
            for size in sizes_of_gpus(costs, layers, num_devices):
                gpus[:] = [size] * num_devices
                num_blocks = chosen_by_petals(petals, server)
                assert costs.blocks_in(given(gpus).memory_bytes, layers) == num_blocks
                chosen.add(num_blocks)
            # All that could be chosen was.
            assert chosen == set(range(layers + 1))


def test_adapters_take_memory_with_each_block(petals, gpus, monkeypatch):
    spec = spec_of("bigscience/bloom")
    monkeypatch.setattr(
        petals.peft, "estimate_adapter_memory_per_block", lambda *args, **options: 10**9
    )
    server = stand_in(petals, spec, quant_type="nf4", dtype="bfloat16")
    server.adapters, server.token, server.cache_dir, server.max_disk_space = (
        ("x",),
        None,
        None,
        None,
    )
    gpus[:] = [80 * GIB]
    costs = block_costs(
        spec,
        dtype="bfloat16",
        quant_type="nf4",
        attn_cache_tokens=4096,
        adapter_bytes_per_block=10**9,
    )
    assert costs.blocks_in(80 * GIB, 70) == chosen_by_petals(petals, server) == 32


def test_a_mac_shares_all_of_its_memory(petals, gpus, monkeypatch):
    spec = spec_of("meta-llama/Llama-2-7b-hf")
    memory = SimpleNamespace(total=16 * GIB)
    monkeypatch.setattr(petals.server, "psutil", SimpleNamespace(virtual_memory=lambda: memory))
    server = stand_in(petals, spec, quant_type="none", dtype="float16")
    server.device = petals.torch.device("mps")
    server.tensor_parallel_devices = (server.device,)
    costs = our_costs(spec, quant_type="none", dtype="float16")
    assert costs.blocks_in(16 * GIB, 32) == chosen_by_petals(petals, server) == 32
    memory.total = 4 * GIB
    assert costs.blocks_in(4 * GIB, 32) == chosen_by_petals(petals, server) < 32


@pytest.mark.parametrize(
    "memory_gib", [(24, 24), (24, 16), (16, 24), (24, 36), (24, 37), (80, 24), (24, 24, 12)]
)
def test_uneven_gpus(petals, gpus, memory_gib):
    spec = spec_of("bigscience/bloom")
    kind = {"quant_type": "nf4", "dtype": "bfloat16", "num_devices": len(memory_gib)}
    gpus[:] = [gib * GIB for gib in memory_gib]
    server = stand_in(petals, spec, **kind)
    if given(gpus).is_uneven:
        with pytest.raises(ValueError, match="GPU devices have highly uneven memory") as excinfo:
            petals.server.Server._choose_num_blocks(server)
        assert UNEVEN_GPUS.replace("--num-blocks", "--num_blocks") in str(excinfo.value)
    else:
        expected = our_costs(spec, **kind).blocks_in(
            given(gpus).memory_bytes, spec.num_hidden_layers
        )
        assert petals.server.Server._choose_num_blocks(server) == expected > 0


def test_a_server_without_a_gpu_has_to_be_told_a_number(petals, gpus):
    server = stand_in(petals, spec_of("bigscience/bloom"), quant_type="none", dtype="bfloat16")
    server.device = petals.torch.device("cpu")
    with pytest.raises(AssertionError) as excinfo:
        petals.server.Server._choose_num_blocks(server)
    assert str(excinfo.value) == NO_GPU.replace("--num-blocks", "--num_blocks")


def test_too_little_memory_is_refused_in_the_same_words(petals, gpus):
    gpus[:] = [GIB]
    server = stand_in(petals, spec_of("bigscience/bloom"), quant_type="none", dtype="bfloat16")
    with pytest.raises(AssertionError) as excinfo:
        petals.server.Server._choose_num_blocks(server)
    assert str(excinfo.value) == TOO_LITTLE_MEMORY


# --- a server, from its arguments to its announcement ---


@pytest.fixture
def make_server(petals, gpus, monkeypatch, tmp_path):
    """Constructs Petals' Server for a model; neither a network nor a GPU is needed."""
    dht = SimpleNamespace(get_visible_maddrs=lambda: [])
    monkeypatch.setattr(petals.server, "DHT", lambda **options: dht)
    monkeypatch.setattr(
        petals.server, "ReachabilityProtocol", SimpleNamespace(attach_to_dht=lambda dht: None)
    )
    measured = {"inference": 321.0, "forward": 4321.0}
    monkeypatch.setattr(
        petals.throughput,
        "measure_compute_rps",
        lambda *args, inference, **options: measured["inference" if inference else "forward"],
    )
    monkeypatch.setattr(
        petals.throughput, "measure_network_rps", lambda config: Network().rps(config.hidden_size)
    )

    def make(spec: DecoderSpec, **options: Any) -> Any:
        folder = tmp_path / "model"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(without_rope_scaling(spec)))
        options = {
            "initial_peers": [],
            "dht_prefix": "x",
            "converted_model_name_or_path": str(folder),
            "throughput": "auto",
            "cache_dir": str(tmp_path / "cache"),
            "device": "cuda",
            "reachable_via_relay": False,
            **options,
        }
        return petals.server.Server(**options)

    return make


@pytest.mark.parametrize("relay", [False, True])
@few_models
def test_a_server_with_its_defaults(petals, gpus, make_server, model, relay):
    spec = spec_of(model)
    gpus[:] = [24 * GIB]
    server = make_server(spec, reachable_via_relay=relay)

    config = ServerConfig(model=spec, device="cuda", gpu_memory=(given(gpus),))
    setup = resolve_machine(config, is_this_machine=False).setup
    assert setup.devices == (str(server.device),)
    assert setup.torch_dtype == str(server.torch_dtype).removeprefix("torch.")
    assert setup.quant_type == server.quant_type.name.lower()
    defaults = server_defaults(spec)
    assert server.inference_max_length == defaults.inference_max_length
    assert server.max_batch_size == defaults.max_batch_size

    kind = {"quant_type": setup.quant_type, "dtype": setup.torch_dtype}
    costs = our_costs(spec, **kind)
    num_blocks = costs.blocks_in(24 * GIB, spec.num_hidden_layers)
    assert server._cache_bytes_per_block == costs.cache_bytes_per_block
    assert server.num_blocks == num_blocks
    assert server.attn_cache_bytes == num_blocks * costs.cache_bytes_per_block

    rps = Network().rps(spec.hidden_size)
    throughput = server_throughput(4321.0, rps, num_blocks, relay=relay)
    assert server.server_info.throughput == throughput.tokens_per_s
    assert server.server_info.inference_rps == 321.0
    assert server.server_info.using_relay is relay


@pytest.mark.parametrize(
    ("device", "torch_dtype", "quant_type"),
    [
        ("cuda", "auto", None),
        ("cuda", "float32", "int8"),
        ("cuda:1", "float16", "none"),
        ("cpu", "auto", None),
        ("cpu", "float32", None),
        ("mps", "auto", None),
        ("mps", "float32", "none"),
    ],
)
@pytest.mark.parametrize("model", ["bigscience/bloom", "meta-llama/Llama-3.1-8B"])
def test_formats_are_resolved_alike(
    petals, gpus, make_server, model, device, torch_dtype, quant_type
):
    spec = spec_of(model)
    gpus[:] = [24 * GIB] * 2
    server = make_server(
        spec,
        device=device,
        torch_dtype=torch_dtype,
        quant_type=None if quant_type is None else quant_type_of(petals, quant_type),
        num_blocks=2,
        attn_cache_tokens=5000,
    )
    config = ServerConfig(
        model=spec,
        device=device,
        torch_dtype=torch_dtype,
        quant_type=quant_type,
        num_blocks=2,
        gpu_memory=() if device == "cpu" else (given(gpus[:1]),),
    )
    setup = resolve_machine(config, is_this_machine=False).setup
    assert (setup.torch_dtype, setup.quant_type) == (
        server.server_info.torch_dtype,
        server.server_info.quant_type,
    )
    assert setup.devices == (str(server.device),)
    assert server._cache_bytes_per_block == cache_bytes_per_block(spec, setup.torch_dtype, 5000)


def test_float16_on_the_cpu_is_refused_in_the_same_words(petals, gpus, make_server):
    with pytest.raises(ValueError, match="float16 is not supported") as excinfo:
        make_server(spec_of("bigscience/bloom"), device="cpu", torch_dtype="float16", num_blocks=1)
    assert str(excinfo.value) == NO_FLOAT16.replace("--torch-dtype", "--torch_dtype")


def test_all_the_memory_of_several_gpus(petals, gpus, make_server):
    spec = spec_of("bigscience/bloom")
    gpus[:] = [24 * GIB, 20 * GIB]
    server = make_server(spec, tensor_parallel_devices=["cuda:0", "cuda:1"])
    costs = our_costs(spec, quant_type="nf4", dtype="bfloat16", num_devices=2)
    assert costs.blocks_in(given(gpus).memory_bytes, spec.num_hidden_layers) == server.num_blocks
    assert costs.autograd_bytes == autograd_bytes(spec, 2) == 4 * GIB


@pytest.mark.parametrize("num_blocks", [1, 7])
@every_model
def test_the_cache_that_an_idle_server_announces(petals, monkeypatch, model, num_blocks):
    spec = spec_of(model)
    dtype = resolve_dtype(spec, "auto")
    costs = our_costs(spec, quant_type="nf4", dtype=dtype)
    info = petals.data.ServerInfo(petals.data.ServerState.OFFLINE, 1.0, torch_dtype=dtype)
    monkeypatch.setattr(petals.server, "declare_active_modules", lambda *args, **options: None)
    announcer = petals.server.ModuleAnnouncerThread(
        [f"x.{number}" for number in range(num_blocks)],
        SimpleNamespace(),
        info,
        petals.data.ModelInfo(num_blocks=spec.num_hidden_layers),
        block_config=petals_config(petals, spec),
        memory_cache=petals.memory_cache.MemoryCache(costs.cache_bytes_per_block * num_blocks),
        update_period=60,
        expiration=300,
    )
    announcer.run()  # once, because the server is about to leave
    assert announced_cache_tokens(spec, dtype, costs, num_blocks) == info.cache_tokens_left


# --- speeds ---


@pytest.mark.parametrize("relay", [False, True])
@pytest.mark.parametrize("num_blocks", [1, 2, 15, 70])
@pytest.mark.parametrize(("forward_rps", "network_rps"), [(900.0, 1e5), (1e5, 333.0), (5e3, 5e3)])
def test_the_throughput_that_petals_reports(
    petals, monkeypatch, tmp_path, forward_rps, network_rps, num_blocks, relay
):
    spec = spec_of("bigscience/bloom")
    monkeypatch.setattr(
        petals.throughput,
        "measure_throughput_info",
        lambda *args, **options: {
            "inference_rps": 1.0,
            "forward_rps": forward_rps,
            "network_rps": network_rps,
        },
    )
    reported = petals.throughput.get_server_throughput(
        "x",
        petals_config(petals, spec),
        petals.torch.device("cpu"),
        petals.torch.bfloat16,
        num_blocks=num_blocks,
        quant_type=petals.QuantType.NONE,
        tensor_parallel_devices=(),
        reachable_via_relay=relay,
        cache_dir=str(tmp_path),
    )["throughput"]
    found = server_throughput(forward_rps, network_rps, num_blocks, relay=relay)
    assert found.tokens_per_s == reported


@pytest.mark.parametrize(
    ("answer", "network"),
    [
        (
            {"download": 50e6, "upload": 20e6},
            Network(download_bits_per_s=50e6, upload_bits_per_s=20e6),
        ),
        (
            {"download": 3e6, "upload": 1e9},
            Network(download_bits_per_s=3e6, upload_bits_per_s=1e9),
        ),
        ({"exception": "no network"}, Network()),
        ({"download": 0, "upload": 1e9}, Network()),
    ],
)
@few_models
def test_the_network_as_petals_measures_it(petals, monkeypatch, model, answer, network):
    spec = spec_of(model)

    def speed_test(target: object, args: tuple[Any]) -> SimpleNamespace:
        """A process that answers at once."""
        return SimpleNamespace(start=lambda: args[0].send(answer))

    stub = SimpleNamespace(Pipe=multiprocessing.Pipe, Process=speed_test)
    monkeypatch.setattr(petals.throughput, "mp", stub)
    measured = petals.throughput.measure_network_rps(petals_config(petals, spec))
    assert network.rps(spec.hidden_size) == measured


# --- a swarm ---


def peer_ids(petals: SimpleNamespace, count: int) -> list[Any]:
    return [petals.PeerID(b"\x12\x20" + number.to_bytes(32, "big")) for number in range(count)]


def modules(
    petals: SimpleNamespace, layers: int, servers: list[tuple[Any, range, Any]]
) -> list[Any]:
    """The swarm as it is read from the DHT: each server is its peer, its blocks, its information."""
    infos = [petals.data.RemoteModuleInfo(f"x.{block}", {}) for block in range(layers)]
    for peer, blocks, info in servers:
        for block in blocks:
            infos[block].servers[peer] = info
    return infos


def online(petals: SimpleNamespace, throughput: float, **more: Any) -> Any:
    return petals.data.ServerInfo(petals.data.ServerState.ONLINE, throughput, **more)


@st.composite
def swarms(draw: st.DrawFn) -> tuple[int, list[tuple[range, float]], int]:
    """Layers of the model, blocks and throughput of the servers, blocks of the one that joins."""
    layers = draw(st.integers(1, 40))
    servers = []
    for _ in range(draw(st.integers(0, 8))):
        length = draw(st.integers(1, layers))
        start = draw(st.integers(0, layers - length))
        throughput = draw(st.sampled_from([1.0, 2.5, 100.0]) | st.floats(0, 1e4))
        servers.append((range(start, start + length), throughput))
    return layers, servers, draw(st.integers(1, layers))


@hypothesis.settings(deadline=None)
@hypothesis.given(swarms())
def test_a_server_joins_where_petals_puts_it(petals, swarm):
    layers, others, num_blocks = swarm
    peers = peer_ids(petals, len(others))
    servers = [
        (peer, blocks, online(petals, throughput))
        for peer, (blocks, throughput) in zip(peers, others, strict=True)
    ]
    chosen = petals.block_selection.choose_best_blocks(num_blocks, modules(petals, layers, servers))
    offered = [0.0] * layers
    for _, blocks, info in servers:  # in the order of their peers: sums are the same to the bit
        for block in blocks:
            offered[block] += info.throughput
    start = best_start(offered, num_blocks)
    assert chosen == list(range(start, start + num_blocks))


@pytest.mark.parametrize(
    ("layers", "num_blocks"), [(70, 15), (32, 32), (60, 7), (24, 5), (10, 1), (3, 2), (30, 29)]
)
def test_a_swarm_of_equal_servers_as_petals_builds_it(petals, layers, num_blocks):
    # A power of two: sums are exact, and equal windows stay equal.
    tokens_per_s, servers = 16.0, []
    for peer in peer_ids(petals, 2 * servers_for(layers, num_blocks) + 3):
        infos = modules(petals, layers, servers)
        spans = petals.dht.compute_spans(infos, min_state=petals.data.ServerState.JOINING)
        offered = petals.block_selection.compute_throughputs(spans, total_blocks=layers)
        found = swarm_throughput(layers, num_blocks, len(servers), tokens_per_s)
        assert found == offered.min()

        blocks = petals.block_selection.choose_best_blocks(num_blocks, infos)
        servers.append((peer, blocks, online(petals, tokens_per_s)))
    assert found >= 2 * tokens_per_s


# --- one client ---


def petals_step_s(
    petals: SimpleNamespace, servers: list[tuple[Any, range, Any]], layers: int, rtt_s: float | None
) -> tuple[float, int]:
    """Seconds of a step on the way that a client of Petals chooses, and the servers on it."""
    manager_class = petals.sequence_manager.RemoteSequenceManager
    infos = modules(petals, layers, servers)
    sequence = petals.sequence_info.RemoteSequenceInfo.make_empty([info.uid for info in infos])
    sequence.update_(infos)
    rtts = {} if rtt_s is None else {peer: rtt_s for peer, _, _ in servers}
    manager = SimpleNamespace(
        state=SimpleNamespace(sequence_info=sequence),
        ping_aggregator=SimpleNamespace(to_dict=lambda: rtts),
        lock_changes=threading.Lock(),
        _rtt_to_delay=manager_class._rtt_to_delay,
        _has_cache_for=manager_class._has_cache_for,
    )
    graph = manager_class._build_inference_graph(manager, 0, layers, cache_tokens_needed=None)
    path = petals.dijkstar.find_path(graph, "start", "end")
    return path.total_cost, len({peer for peer, _ in path.nodes[1:-1]})


def chain(
    petals: SimpleNamespace,
    layers: int,
    hops: int,
    rtt_s: float | None,
    inference_rps: float | None,
) -> list[tuple[Any, range, Any]]:
    """Servers that together hold every block once."""
    peers = peer_ids(petals, hops)
    pings = None if rtt_s is None else {peer.to_base58(): rtt_s for peer in peers}
    bounds = [number * layers // hops for number in range(hops + 1)]
    return [
        (
            peer,
            range(bounds[number], bounds[number + 1]),
            online(petals, 1.0, inference_rps=inference_rps, next_pings=pings),
        )
        for number, peer in enumerate(peers)
    ]


@pytest.mark.parametrize("inference_rps", [None, 50.0, 1234.5])
@pytest.mark.parametrize("rtt_s", [None, 0.0, 0.02, 0.3, 9.99, 12.0, float("inf")])
@pytest.mark.parametrize(("layers", "hops"), [(70, 1), (70, 3), (32, 7), (5, 5)])
def test_a_step_takes_as_long_as_petals_clients_expect(petals, layers, hops, rtt_s, inference_rps):
    servers = chain(petals, layers, hops, rtt_s, inference_rps)
    cost, hops_taken = petals_step_s(petals, servers, layers, rtt_s)
    assert hops_taken == hops
    found = client_step_s(layers, hops, rtt_s, inference_rps or DEFAULT_INFERENCE_RPS)
    assert found == pytest.approx(cost, rel=1e-12)


def test_a_client_takes_the_way_with_the_fewest_servers(petals):
    # The same blocks by two servers, and by four others, which are as far away.
    layers, rtt_s = 12, 0.02
    peers = peer_ids(petals, 6)
    pings = {peer.to_base58(): rtt_s for peer in peers}
    blocks = [range(0, 6), range(6, 12), range(0, 3), range(3, 6), range(6, 9), range(9, 12)]
    servers = [
        (peer, held, online(petals, 1.0, inference_rps=100.0, next_pings=pings))
        for peer, held in zip(peers, blocks, strict=True)
    ]
    cost, hops = petals_step_s(petals, servers, layers, rtt_s)
    assert hops == servers_for(layers, 6) == 2
    assert client_step_s(layers, 2, rtt_s, 100.0) == pytest.approx(cost, rel=1e-12)


def test_assumptions_are_the_defaults_of_petals(petals):
    manager = petals.sequence_manager.RemoteSequenceManager
    graph, delay = manager._build_inference_graph, manager._rtt_to_delay
    assert default_of(graph, "default_inference_rps") == DEFAULT_INFERENCE_RPS
    assert default_of(graph, "overhead_delay") == HOP_OVERHEAD_S
    assert default_of(delay, "default_delay") == UNKNOWN_DELAY_S
    assert default_of(delay, "max_delay") == MAX_DELAY_S
    assert default_of(petals.throughput.get_server_throughput, "relay_penalty") == RELAY_PENALTY
    speed = default_of(petals.throughput.measure_network_rps, "default_speed")
    assert speed == DEFAULT_BITS_PER_S


def default_of(function: Callable[..., Any], name: str) -> Any:
    return inspect.signature(function).parameters[name].default
