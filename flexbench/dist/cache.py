"""Keys and values of one layer for one batch, at their homes.

A cache's rows are the B x H pairs of prompt and head, and they are what is split between the homes.
In each home positions come first, (L, R, D): the past of a prompt is one contiguous piece, and a
new position is appended to it.

Letters in names of shapes: B batch, H heads, D head size, S new positions, L positions, R rows.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass

import torch

from flexbench.dist.attention import (
    decode_attention,
    decode_weights,
    gather_positions,
    most_weight,
    sparse_values,
)
from flexbench.dist.compression import compress, decompress, record_bytes
from flexbench.dist.homes import ExecutionEnv, MemoryPart, Part
from flexbench.dist.kernels import decode_attention as kernel
from flexbench.dist.placement import split_rows
from flexbench.dist.policy import CompressionConfig, Policy

Buffer = Callable[[str, tuple[int, ...], torch.dtype, torch.device], torch.Tensor]
"""Memory that is used again: its name, shape, type and device."""


@dataclass(frozen=True, kw_only=True)
class CacheShape:
    """How large the cache of one layer and batch is."""

    batch_size: int
    num_heads: int
    head_dim: int
    max_length: int
    dtype: torch.dtype

    @property
    def num_rows(self) -> int:
        """Pairs of prompt and head."""
        return self.batch_size * self.num_heads

    def row_bytes(self, compression: CompressionConfig | None) -> int:
        """Bytes of the key, or the value, of one pair at one position."""
        if compression is not None:
            return record_bytes(self.head_dim, compression, self.dtype)
        return self.head_dim * int(self.dtype.itemsize)


@dataclass(frozen=True)
class _Share:
    """The rows of one home: (L, R, D), or (L, R, record) of uint8 if the cache is compressed."""

    name: str
    rows: range
    k: Part
    v: Part

    @property
    def is_in_memory(self) -> bool:
        return isinstance(self.k, MemoryPart)


# Products of bfloat16 are made for each length anew, which takes as long as some of them: lengths
# are rounded up to multiples of this where what follows is there, and known to be numbers.
_LENGTH_STEP = 64


@dataclass(frozen=True)
class Segment:
    """Some rows of a cache, ready for the attention of one new position.

    `k` and `v` have the past, the new position's place after it, and perhaps places of later ones.
    With a sparse attention, `v` may still be at its home, for the chosen values to be fetched from
    there.
    """

    rows: range
    past: int
    k: torch.Tensor
    v: torch.Tensor
    is_home: bool
    """Whether this memory is the home itself: what is written here is stored."""


class LayerCache:
    """The cache of one layer for one batch."""

    def __init__(self, shape: CacheShape, policy: Policy, env: ExecutionEnv) -> None:
        self._shape = shape
        self._compression = policy.cache_compression
        self._sparsity = policy.attn_sparsity
        self._gpu = env.gpu.device
        self._is_cpu_computed = policy.cpu_cache_compute
        self._shares = _allocate(shape, policy, env)
        self._in_place = {share.name for share in self._shares if self._is_used_in_place(share)}
        self.is_in_place = len(self._in_place) == len(self._shares)
        """Whether attention reads all of it where it is: nothing has to be loaded or moved."""
        self.whole: tuple[torch.Tensor, torch.Tensor] | None = self._find_whole()
        """Keys and values of all rows and positions, (M, R, D), if they can be attended to as one.

        That is on a CPU, in one home, uncompressed, with no choice among the values.
        """
        is_compiled = self.whole is not None and kernel.is_available(shape.dtype)
        self._is_rounded = shape.dtype != torch.float32 and not is_compiled
        for share in self._shares:
            if share.name in self._in_place and self._is_rounded:
                # Places of later positions may be multiplied with 0, which NaN would survive.
                for tensor in self._at_home(share, shape.max_length):
                    tensor.zero_()
        for tensor in self.whole or ():
            _touch(tensor)

    def _find_whole(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        if not self.is_in_place or len(self._shares) > 1 or self._sparsity < 1:
            return None
        k, v = self._at_home(self._shares[0], self._shape.max_length)
        return (k, v) if k.device.type == "cpu" else None

    # --- loading ---

    def load(self, past: int, buffer: Buffer) -> list[Segment]:
        """All rows of the first `past` positions; copies go to memory that `buffer` gives."""
        return [self._load_share(share, past, buffer) for share in self._shares]

    def _load_share(self, share: _Share, past: int, buffer: Buffer) -> Segment:
        if share.name in self._in_place:
            return self._segment_in_place(share, past)
        k = self._fetch(share, share.k, past, buffer, "k")
        if self._sparsity < 1 and self._compression is None and share.is_in_memory:
            v = self._at_home(share, past + 1)[1]
        else:
            v = self._fetch(share, share.v, past, buffer, "v")
        return Segment(share.rows, past, k, v, is_home=False)

    def in_place(self, past: int) -> list[Segment]:
        """All rows, where nothing has to be loaded."""
        return [self._segment_in_place(share, past) for share in self._shares]

    def _segment_in_place(self, share: _Share, past: int) -> Segment:
        k, v = self._at_home(share, self._rounded(past + 1))
        return Segment(share.rows, past, k, v, is_home=True)

    def _rounded(self, length: int) -> int:
        if not self._is_rounded:
            return length
        return min(-(-length // _LENGTH_STEP) * _LENGTH_STEP, self._shape.max_length)

    def _is_used_in_place(self, share: _Share) -> bool:
        if self._compression is not None or not share.is_in_memory:
            return False
        return share.name == "gpu" or self._is_cpu_computed

    def _at_home(self, share: _Share, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert isinstance(share.k, MemoryPart)
        assert isinstance(share.v, MemoryPart)
        return share.k.tensor[:length], share.v.tensor[:length]

    def _fetch(
        self, share: _Share, part: Part, past: int, buffer: Buffer, kind: str
    ) -> torch.Tensor:
        is_on_cpu = self._is_cpu_computed and share.name != "gpu"
        device = torch.device("cpu") if is_on_cpu else self._gpu
        shape, rows = self._shape, len(share.rows)
        name = f"{kind}.{share.name}"
        # As large as it will ever be, so that it is allocated once.
        whole = (shape.max_length, rows, shape.head_dim)
        out = buffer(name, whole, shape.dtype, device)[: past + 1]
        if self._compression is None:
            part.read(0, out[:past])
            return out
        if isinstance(part, MemoryPart) and part.tensor.device == device:
            records = part.tensor[:past]
        else:
            size = shape.row_bytes(self._compression)
            packed = (shape.max_length, rows, size)
            records = buffer(f"{name}.records", packed, torch.uint8, device)[:past]
            part.read(0, records)
        out[:past] = decompress(records, shape.head_dim, self._compression, shape.dtype)
        return out

    # --- storing ---

    def store(self, start: int, k_BSHD: torch.Tensor, v_BSHD: torch.Tensor) -> None:
        """Put new positions, from `start` on, into all homes."""
        for kind, new in (("k", k_BSHD), ("v", v_BSHD)):
            new_SBHD = new.transpose(0, 1)
            # As rows it would be a copy already.
            positions = new_SBHD if self.whole is not None else new_SBHD.flatten(1, 2)
            for share in self._shares:
                # A single position has been written in place by `attend`.
                if start > 0 and share.name in self._in_place:
                    continue
                part = share.k if kind == "k" else share.v
                part.write(start, self._stored(positions, share))

    def _stored(self, positions: torch.Tensor, share: _Share) -> torch.Tensor:
        """A share of (S, R, D) as it is stored; of a whole cache, (S, B, H, D) as it is."""
        if self.whole is not None:
            return positions
        rows = positions[:, share.rows.start : share.rows.stop]
        return rows if self._compression is None else compress(rows, self._compression)

    def close(self) -> None:
        """Give the memory back."""
        self.whole = None
        for share in self._shares:
            share.k.close()
            share.v.close()

    # --- computing ---

    def attend(
        self,
        segments: list[Segment],
        q_BHD: torch.Tensor,
        k_BHD: torch.Tensor,
        v_BHD: torch.Tensor,
        is_real_RL: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of one new position over the past and itself: (B, H, D)."""
        q, k, v = (x.flatten(0, 1) for x in (q_BHD, k_BHD, v_BHD))
        outputs = []
        for segment in segments:
            rows = slice(segment.rows.start, segment.rows.stop)
            device = segment.k.device
            output = _attend_segment(
                segment,
                q[rows].to(device),
                k[rows].to(device),
                v[rows].to(device),
                None if is_real_RL is None else is_real_RL[rows].to(device),
                sparsity=self._sparsity,
            )
            outputs.append(output.to(q.device, q.dtype))
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return out.view(q_BHD.shape)


def _attend_segment(
    segment: Segment,
    q_RD: torch.Tensor,
    k_RD: torch.Tensor,
    v_RD: torch.Tensor,
    is_real_RL: torch.Tensor | None,
    *,
    sparsity: float,
) -> torch.Tensor:
    past = segment.past
    segment.k[past] = k_RD
    if segment.is_home or sparsity == 1:
        segment.v[past] = v_RD
    k, v = segment.k, segment.v
    # float16 is for GPUs: on a CPU it is slow, and its sums are inexact.
    is_half_on_cpu = k.device.type == "cpu" and k.dtype == torch.float16
    if is_half_on_cpu:
        q_RD, k, v_RD = q_RD.float(), k.float(), v_RD.float()
    if sparsity == 1:
        v = v.float() if is_half_on_cpu else v
        return decode_attention(q_RD, k, v, past + 1, is_real_RL)
    weights = decode_weights(q_RD, k, past + 1, is_real_RL)
    top, index = most_weight(weights[:, : past + 1], sparsity)
    chosen = gather_positions(v[:past], index.to(v.device)).to(v_RD.device, v_RD.dtype)
    return sparse_values(top, chosen, weights[:, past], v_RD)


def _touch(tensor: torch.Tensor) -> None:
    """Have the system give its pages now: it does so at the first write to each."""
    tensor.view(-1).view(torch.uint8)[:: mmap.PAGESIZE].zero_()


def _allocate(shape: CacheShape, policy: Policy, env: ExecutionEnv) -> list[_Share]:
    compression = policy.cache_compression
    ranges = split_rows(shape.num_rows, policy.cache).ranges()
    if compression is None:
        dtype, width = shape.dtype, shape.head_dim
    else:
        dtype, width = torch.uint8, shape.row_bytes(compression)
    gpu, cpu, disk = ((shape.max_length, len(rows), width) for rows in ranges)
    k, v = (env.mixed.allocate((gpu, cpu, disk), dtype, pin=True) for _ in range(2))
    homes = zip(("gpu", "cpu", "disk"), ranges, k.homes, v.homes, strict=True)
    return [
        _Share(name, rows, k_part, v_part)
        for name, rows, k_part, v_part in homes
        if k_part is not None and v_part is not None
    ]
