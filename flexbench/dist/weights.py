"""The weights of one layer at their homes, and how they get to where they are computed with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from math import prod

import torch

from flexbench.dist.compression import compress, decompress, record_bytes
from flexbench.dist.homes import ExecutionEnv, Part, Parts
from flexbench.dist.layers import WeightSpec
from flexbench.dist.placement import LayerLayout, TensorSpec, lay_out
from flexbench.dist.policy import CompressionConfig, Policy
from flexbench.dist.weight_files import WeightSource


def layout_of(specs: Sequence[WeightSpec], policy: Policy, dtype: torch.dtype) -> LayerLayout:
    """How a layer's weights are laid out under `policy`."""
    tensors = [_stored(spec, policy.weight_compression, dtype) for spec in specs]
    return lay_out(tensors, policy.weights)


def _stored(
    spec: WeightSpec, compression: CompressionConfig | None, dtype: torch.dtype
) -> TensorSpec:
    if not spec.is_matrix:
        return TensorSpec(spec.name, 1, prod(spec.shape) * dtype.itemsize)
    rows, width = spec.shape
    if compression is None:
        return TensorSpec(spec.name, rows, width * dtype.itemsize)
    return TensorSpec(spec.name, rows, record_bytes(width, compression, dtype))


class LayerWeights:
    """The weights of one layer where they live. `load` makes them ready for computing."""

    def __init__(
        self, specs: Sequence[WeightSpec], policy: Policy, env: ExecutionEnv, dtype: torch.dtype
    ) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self._compression = policy.weight_compression
        self._dtype = dtype
        self.layout = layout_of(specs, policy, dtype)
        layout = self.layout
        sizes = layout.home_bytes
        self._parts: Parts = env.mixed.allocate(
            ((sizes.gpu,), (sizes.cpu,), (sizes.disk,)), torch.uint8, pin=policy.pin_weight
        )

    def fill(self, source: WeightSource) -> None:
        """Read the weights from `source`, compress them if asked to, and put them away."""
        for tensor, start in zip(self.layout.tensors, self.layout.offsets, strict=True):
            spec, offset = self._specs[tensor.name], start
            for name in spec.sources:
                piece = source.read(name).to(self._dtype)
                if self._compression is not None and spec.is_matrix:
                    piece = compress(piece, self._compression)
                data = piece.contiguous().flatten().view(torch.uint8)
                self._write(offset, data)
                offset += len(data)

    def _write(self, offset: int, data: torch.Tensor) -> None:
        for part, start, end in self._ranges():
            low, high = max(start, offset), min(end, offset + len(data))
            if low < high:
                part.write(low - start, data[low - offset : high - offset])

    def _ranges(self) -> list[tuple[Part, int, int]]:
        layout = self.layout
        bounds = (0, layout.gpu_end, layout.cpu_end, layout.num_bytes)
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
            low = max(start, begin)
            if low < end:
                part.read(low - start, buffer[low - begin : end - begin])

    def close(self) -> None:
        """Give the memory back."""
        self._parts.close()

    def ready(self, buffer: torch.Tensor) -> ReadyWeights:
        """The weights for computing, once `buffer` is loaded."""
        begin = self.layout.load_start
        resident = self._parts.gpu.tensor if self._parts.gpu is not None else buffer[:0]
        stored = {}
        for tensor, offset in zip(self.layout.tensors, self.layout.offsets, strict=True):
            memory, start = (resident, offset) if offset < begin else (buffer, offset - begin)
            stored[tensor.name] = memory[start : start + tensor.num_bytes]
        return ReadyWeights(stored, self._specs, self._compression, self._dtype)


class ReadyWeights:
    """A layer's weights on the gpu. Compressed ones are decompressed when first asked for."""

    def __init__(
        self,
        stored: dict[str, torch.Tensor],
        specs: dict[str, WeightSpec],
        compression: CompressionConfig | None,
        dtype: torch.dtype,
    ) -> None:
        self._stored = stored
        self._specs = specs
        self._compression = compression
        self._dtype = dtype
        self._dense: dict[str, torch.Tensor] = {}

    def get(self, name: str) -> torch.Tensor:
        """A whole weight."""
        if name not in self._dense:
            self._dense[name] = self._decode(name, self._rows_of(name))
        return self._dense[name]

    def rows(self, name: str, index: torch.Tensor) -> torch.Tensor:
        """Some rows of a matrix: `index` of shape (...) gives (..., width)."""
        return self._decode(name, self._rows_of(name)[index])

    def _rows_of(self, name: str) -> torch.Tensor:
        """The weight as it is stored: rows of records if it is compressed."""
        spec, data = self._specs[name], self._stored[name]
        if self._compression is not None and spec.is_matrix:
            return data.view(spec.shape[0], -1)
        return data.view(self._dtype).view(spec.shape)

    def _decode(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        spec = self._specs[name]
        if self._compression is None or not spec.is_matrix:
            return rows
        return decompress(rows, spec.shape[1], self._compression, self._dtype)
