"""Where and how a server computes: what both its memory and its speed depend on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ComputeSetup:
    """Devices and number formats of a server, all resolved: nothing is 'auto' here.

    `devices` are torch's names ('cuda:0', 'cpu', 'mps'), several for tensor parallelism.
    """

    devices: tuple[str, ...]
    torch_dtype: str
    quant_type: str

    @property
    def formats(self) -> tuple[str, str]:
        """Type and quantization."""
        return self.torch_dtype, self.quant_type

    @property
    def device_type(self) -> str:
        """'cuda', 'cpu' or 'mps'."""
        return self.devices[0].partition(":")[0]
