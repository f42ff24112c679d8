"""The weights of one layer at their homes, and how they get to where they are computed with.

Tensors that are wholly on the gpu stay there, in the form that is computed with. All others are one
range of bytes, laid out from `load_start` on, which is loaded into a buffer for each visit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch

from flexbench.dist.compression import CompressedMap, compress, record_bytes
from flexbench.dist.homes import ExecutionEnv, MemoryPart, Part, Parts
from flexbench.dist.kernels import four_bits, panel_product
from flexbench.dist.kernels.epilogue import Epilogue
from flexbench.dist.kernels.four_bits import FourBitMap
from flexbench.dist.kernels.linear import DenseMap, LinearMap, PackedMap, can_be_packed
from flexbench.dist.kernels.panel_product import PanelMatrix
from flexbench.dist.kernels.panels import InPanels
from flexbench.dist.layers import WeightSpec
from flexbench.dist.placement import LayerLayout, TensorSpec, lay_out
from flexbench.dist.policy import CompressionConfig, Policy
from flexbench.dist.weight_files import WeightSource


def layout_of(specs: Sequence[WeightSpec], policy: Policy, dtype: torch.dtype) -> LayerLayout:
    """How a layer's weights are laid out under `policy` on this machine."""
    device = "cuda" if torch.cuda.is_available() else "cpu"  # as in ExecutionEnv
    forms = (_Form(spec, policy.weight_compression, dtype, device) for spec in specs)
    return lay_out([form.stored for form in forms], policy.weights)


class _Form:
    """How a weight is stored: as it is, as rows of records, or as a product of ours reads it."""

    def __init__(
        self,
        spec: WeightSpec,
        compression: CompressionConfig | None,
        dtype: torch.dtype,
        device: str,
    ) -> None:
        self.spec, self.dtype = spec, dtype
        self._config = compression if spec.is_matrix else None
        self._is_fused = (
            self._config is not None
            and not spec.is_table
            and four_bits.fits(spec.shape, self._config, device)
        )
        self._is_in_panels = (
            self.is_plain_map and device == "cpu" and panel_product.fits(dtype, spec.shape[1])
        )

    @property
    def stored(self) -> TensorSpec:
        """Its rows and bytes."""
        spec = self.spec
        if not spec.is_matrix:
            return TensorSpec(spec.name, 1, prod(spec.shape) * self.dtype.itemsize)
        rows, width = spec.shape
        if self._config is None:
            rows = panel_product.filled_rows(rows) if self._is_in_panels else rows
            return TensorSpec(spec.name, rows, width * self.dtype.itemsize)
        if self._is_fused:
            size = four_bits.row_bytes(width, self._config)
            return TensorSpec(spec.name, four_bits.filled_rows(rows), size)
        return TensorSpec(spec.name, rows, record_bytes(width, self._config, self.dtype))

    @property
    def is_decompressed(self) -> bool:
        """Whether it is made a whole matrix before it is multiplied with."""
        return self._config is not None and not self._is_fused

    @property
    def is_plain_map(self) -> bool:
        """Whether it is only multiplied with, and not compressed."""
        return self.spec.is_matrix and not self.spec.is_table and self._config is None

    def read(self, source: WeightSource) -> list[torch.Tensor]:
        """The tensors it is made of, in the model's type. What has it already is not copied."""
        return [source.read(name).to(self.dtype) for name in self.spec.sources]

    def encode(self, pieces: list[torch.Tensor]) -> torch.Tensor:
        """Its bytes: uint8 of one dimension."""
        if self._is_in_panels:
            return panel_product.pack(pieces).view(torch.uint8)
        weight = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        if self._is_fused:
            assert self._config is not None
            return four_bits.pack(weight, self._config)
        if self._config is not None:
            weight = compress(weight, self._config)
        return weight.contiguous().flatten().view(torch.uint8)

    def map_of(self, data: torch.Tensor) -> LinearMap:
        """The matrix of which these are the bytes."""
        if self._is_in_panels:
            return PanelMatrix(data.view(self.dtype), self.spec.shape)
        if self._config is None:
            return DenseMap(data.view(self.dtype).view(self.spec.shape))
        if self._is_fused:
            return FourBitMap(data, self.spec.shape, self._config, self.dtype)
        rows, width = self.spec.shape
        return CompressedMap(data.view(rows, -1), width, self._config, self.dtype)


class LayerWeights:
    """The weights of one layer where they live. `load` makes them ready for computing."""

    def __init__(
        self, specs: Sequence[WeightSpec], policy: Policy, env: ExecutionEnv, dtype: torch.dtype
    ) -> None:
        device = env.gpu.device.type
        self._forms = [_Form(spec, policy.weight_compression, dtype, device) for spec in specs]
        self._gpu = env.gpu
        self.layout = lay_out([form.stored for form in self._forms], policy.weights)
        begin, sizes = self.layout.load_start, self.layout.home_bytes
        self._resident = ReadyWeights({}, {})
        self._resident_parts: list[MemoryPart] = []
        self._compressed: list[tuple[_Form, torch.Tensor]] = []
        """Resident, but made anew for each visit: what they are decompressed to goes with it."""
        self._packed_bytes = 0
        self._parts: Parts = env.mixed.allocate(
            ((sizes.gpu - min(begin, sizes.gpu),), (sizes.cpu,), (sizes.disk,)),
            torch.uint8,
            pin=policy.pin_weight,
        )

    def fill(self, source: WeightSource) -> None:
        """Read the weights from `source`, compress them if asked to, and put them away."""
        for form, offset in zip(self._forms, self.layout.offsets, strict=True):
            pieces = form.read(source)
            if offset < self.layout.load_start:
                self._keep(form, pieces)
            else:
                self._write(offset, form.encode(pieces))

    def _keep(self, form: _Form, pieces: list[torch.Tensor]) -> None:
        """Put a weight on the gpu for good."""
        is_on_cpu = self._gpu.device.type == "cpu"
        if is_on_cpu and form.is_plain_map and can_be_packed(pieces[0]):
            self._resident.maps[form.spec.name] = PackedMap(*pieces)
            self._packed_bytes += form.stored.num_bytes
            self._gpu.ledger.take(form.stored.num_bytes)
            return
        data = form.encode(pieces)
        part = self._gpu.allocate((len(data),), torch.uint8)
        part.write(0, data)
        self._resident_parts.append(part)
        if form.is_decompressed:
            self._compressed.append((form, part.tensor))
        else:
            self._resident.add(form, part.tensor)

    def _write(self, offset: int, data: torch.Tensor) -> None:
        for part, start, end in self._ranges():
            low, high = max(start, offset), min(end, offset + len(data))
            if low < high:
                part.write(low - start, data[low - offset : high - offset])

    def _ranges(self) -> list[tuple[Part, int, int]]:
        """The parts of what is loaded: each with its range of the layer's bytes."""
        layout = self.layout
        begin = layout.load_start
        bounds = (begin, max(begin, layout.gpu_end), layout.cpu_end, layout.num_bytes)
        return [
            (part, bounds[index], bounds[index + 1])
            for index, part in enumerate(self._parts.homes)
            if part is not None
        ]

    @cached_property
    def load_bytes(self) -> int:
        """Size of the buffer that `load` needs; 0 when all weights are on the gpu."""
        return self.layout.num_bytes - self.layout.load_start

    def load(self, buffer: torch.Tensor) -> None:
        """Copy all that is not wholly on the gpu into `buffer`, uint8 on the gpu."""
        begin = self.layout.load_start
        for part, start, end in self._ranges():
            part.read(0, buffer[start - begin : end - begin])

    def close(self) -> None:
        """Give the memory back."""
        self._parts.close()
        for part in self._resident_parts:
            part.close()
        self._gpu.ledger.take(-self._packed_bytes)
        self._resident, self._resident_parts, self._packed_bytes = ReadyWeights({}, {}), [], 0
        self._compressed = []

    def ready(self, buffer: torch.Tensor) -> ReadyWeights:
        """The weights for computing, once `buffer` is loaded."""
        if not self.load_bytes and not self._compressed:
            return self._resident
        begin = self.layout.load_start
        ready = ReadyWeights(dict(self._resident.maps), dict(self._resident.vectors))
        for form, data in self._compressed:
            ready.add(form, data)
        for form, offset in zip(self._forms, self.layout.offsets, strict=True):
            if offset >= begin:
                start = offset - begin
                ready.add(form, buffer[start : start + form.stored.num_bytes])
        return ready


@dataclass(frozen=True)
class ReadyWeights:
    """A layer's weights on the gpu, by name."""

    maps: dict[str, LinearMap]
    vectors: dict[str, torch.Tensor]

    def add(self, form: _Form, data: torch.Tensor) -> None:
        """Another one, of which `data` are the bytes."""
        if form.spec.is_matrix:
            self.maps[form.spec.name] = form.map_of(data)
        else:
            self.vectors[form.spec.name] = data.view(form.dtype).view(form.spec.shape)

    def get(self, name: str) -> torch.Tensor:
        """A whole weight."""
        return self.vectors[name] if name in self.vectors else self.maps[name].dense()

    def rows(self, name: str, index: torch.Tensor) -> torch.Tensor:
        """Some rows of a matrix: `index` of shape (...) gives (..., width)."""
        return self.maps[name].rows(index)

    def in_panels(self, name: str) -> InPanels | None:
        """A matrix as kernels read it that do more than multiply, if it lies so."""
        return self.maps[name].in_panels()

    def linear(
        self,
        name: str,
        x: torch.Tensor,
        *,
        bias: str | None = None,
        is_relu: bool = False,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """relu(x W^T + bias) + residual: x of shape (..., K) gives (..., N)."""
        bias_N = None if bias is None else self.vectors[bias]
        return self.maps[name].apply(x, Epilogue(bias_N, is_relu, residual))
