"""Weights that are not compressed, at their homes and on the way from there."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="flexbench dist needs torch")

from flexbench.dist.compression import CompressedMap  # noqa: E402
from flexbench.dist.homes import (  # noqa: E402
    ExecutionEnv,
    TorchDevice,
    TorchDisk,
    TorchMixedDevice,
    aligned_empty,
)
from flexbench.dist.kernels import four_bits, panel_product  # noqa: E402
from flexbench.dist.kernels.linear import DenseMap  # noqa: E402
from flexbench.dist.layers import WeightSpec  # noqa: E402
from flexbench.dist.model import OptLM  # noqa: E402
from flexbench.dist.opt_config import OptConfig  # noqa: E402
from flexbench.dist.policy import CompressionConfig  # noqa: E402
from flexbench.dist.weights import LayerWeights, ReadyWeights, layout_of  # noqa: E402
from tests.integration.dist.stage import allocated, policy  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GROUPS = CompressionConfig(group_size=64)
WIDTH, OUTPUTS = 70, 15  # of each of three pieces: panels have a power of two
SPECS = (
    WeightSpec("norm", (WIDTH,), ("norm",)),
    WeightSpec("table", (50, WIDTH), ("table",), is_table=True),
    WeightSpec("qkv", (3 * OUTPUTS, WIDTH), ("q", "k", "v")),
    WeightSpec("bias", (3 * OUTPUTS,), ("bias",)),
    WeightSpec("out", (33, 45), ("out",)),
)


class Given:
    """A source of random weights."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        shapes = {name: spec.source_shape for spec in SPECS for name in spec.sources}
        self.tensors = {
            name: torch.rand(shape, generator=generator).sub_(0.5) for name, shape in shapes.items()
        }

    def shape(self, name: str) -> tuple[int, ...] | None:
        return tuple(self.tensors[name].shape)

    def read(self, name: str) -> Any:
        return self.tensors[name]

    def whole(self, name: str, dtype: Any) -> Any:
        spec = next(spec for spec in SPECS if spec.name == name)
        return torch.cat([self.tensors[source].to(dtype) for source in spec.sources])


def load(weights: LayerWeights) -> ReadyWeights:
    buffer = aligned_empty(weights.load_bytes, torch.device("cpu"))
    weights.load(buffer)
    return weights.ready(buffer)


@pytest.mark.parametrize("is_compiled", [True, False])
@pytest.mark.parametrize("homes", [(100, 0), (0, 100), (0, 0), (30, 40), (77, 11), (0, 50)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_they_are_the_same_wherever_they_are(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    dtype: Any,
    homes: tuple[int, int],
    is_compiled: bool,
) -> None:
    if not is_compiled:
        monkeypatch.setattr(panel_product, "fits", lambda *_: False)
    given, env = Given(), ExecutionEnv.create(tmp_path)
    weights = LayerWeights(SPECS, policy(weights=homes), env, dtype)
    weights.fill(given)
    index = torch.tensor([[3, 3, 0], [49, 17, 4]])
    for _ in range(3):  # those that stay are packed the second time
        ready = load(weights)
        for spec in SPECS:
            assert torch.equal(ready.get(spec.name), given.whole(spec.name, dtype))
        assert torch.equal(ready.rows("table", index), given.whole("table", dtype)[index])
        for rows in (1, 40):
            x = torch.rand(rows, WIDTH, generator=torch.Generator().manual_seed(rows)).to(dtype)
            y = ready.linear("qkv", x, bias="bias", is_relu=True)
            exact = x.double() @ given.whole("qkv", dtype).double().T
            exact = (exact + given.whole("bias", dtype).double()).relu()
            # A sum of 70 terms below 0.5, rounded in float32, and once or twice to the type.
            bound = 2 * torch.finfo(dtype).eps * exact.abs() + WIDTH**2 * 2**-24
            bound = bound + 2 * torch.finfo(dtype).eps  # before relu, where torch does it in steps
            assert ((y.double() - exact).abs() <= bound).all()
    layout = layout_of(SPECS, policy(weights=homes), dtype)
    sizes = layout.home_bytes
    assert weights.layout == layout
    assert (weights.load_bytes == 0) == (homes[0] == 100)
    assert allocated(env)[1:] == [sizes.cpu, sizes.disk]
    weights.close()
    assert allocated(env) == [0, 0, 0]


@pytest.mark.parametrize("homes", [(0, 100), (0, 0), (30, 40)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_loaded_lies_as_it_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dtype: Any, homes: tuple[int, int]
) -> None:
    """Nothing is put in order for a product: that was done once, on the way to the homes."""
    weights = LayerWeights(SPECS, policy(weights=homes), ExecutionEnv.create(tmp_path), dtype)
    weights.fill(Given())
    monkeypatch.delattr(panel_product, "pack")
    ready = load(weights)
    for name in ("qkv", "out"):
        width = next(spec.shape[1] for spec in SPECS if spec.name == name)
        panels = ready.in_panels(name)
        assert (panels is not None) == panel_product.fits(dtype, width)
        if panels is not None:
            ready.linear(name, torch.ones(40, width, dtype=dtype))
    assert ready.in_panels("table") is None
    weights.close()


def test_on_another_device_they_stay_as_they_are(tmp_path: Path) -> None:
    """'meta' stands for a GPU: what is put there is not packed for this CPU."""
    gpu, cpu, disk = TorchDevice("meta"), TorchDevice("cpu"), TorchDisk(tmp_path)
    env = ExecutionEnv(gpu=gpu, cpu=cpu, disk=disk, mixed=TorchMixedDevice((gpu, cpu, disk)))
    weights = LayerWeights(SPECS, policy(), env, torch.float32)
    weights.fill(Given())
    ready = weights.ready(torch.empty(0, dtype=torch.uint8))
    for name in ("qkv", "out"):
        assert isinstance(ready.maps[name], DenseMap)
        assert ready.get(name).device.type == "meta"


@pytest.mark.parametrize("homes", [(100, 0), (0, 100), (60, 0)])
@pytest.mark.parametrize("is_compressed", [False, True])
def test_what_a_visit_needed_goes_with_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, homes: tuple[int, int], is_compressed: bool
) -> None:
    """Without a fused product matrices are decompressed: never those of all layers at once."""
    monkeypatch.setattr(four_bits, "fits", lambda *_: False)
    decompressed: weakref.WeakSet[CompressedMap] = weakref.WeakSet()
    most, dense = 0, CompressedMap.dense

    def counted(self: CompressedMap) -> Any:
        nonlocal most
        decompressed.add(self)
        most = max(most, len(decompressed))
        return dense(self)

    monkeypatch.setattr(CompressedMap, "dense", counted)
    config = OptConfig(
        name="small",
        hidden_size=64,
        num_attention_heads=2,
        num_hidden_layers=6,
        ffn_dim=64,
        vocab_size=50,
        max_position_embeddings=64,
        dtype="float32",
    )
    how = policy(weights=homes, compress_weight=is_compressed, comp_weight_config=GROUPS)
    model = OptLM(config, ExecutionEnv.create(tmp_path), "_DUMMY_", how)
    model.generate([[5, 6, 7], [8, 9, 10]], 4)
    model.close()
    # A layer has four matrices; those of the one before may still be there.
    assert most == 0 if not is_compressed else 4 <= most <= 8
