"""`flexbench dist`'s own products with weights beside oneDNN's, which most peers go through.

Of each matrix of a model, both have the weights in the order in which they read them. They take
turns within one process, as other programs on a host disturb one minute more than the next. Shown
are the median GFLOP/s of each and the median ratio of single turns. Where there are few rows,
memory bounds both: copies of a matrix take turns, so that none is in a cache.

Beside it stands what share of both the roofline is: the longer of reading the weights and of
multiplying at the highest speeds that were seen on this machine right before and after. With a
number of rows for which both take equally long, it takes more to come near to it.

    .venv/bin/python benchmarks/dist_products.py --dtype float32
    .venv/bin/python benchmarks/dist_products.py --model facebook/opt-1.3b --rows 1 16 2048
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.dist_bounds import Bounds
from flexbench.dist.kernels import panel_product
from flexbench.dist.kernels.linear import OneDnnMatrix, Product, has_onednn
from flexbench.dist.kernels.panel_product import PanelMatrix
from flexbench.dist.opt_config import OptConfig, get_opt_config
from flexbench.dist.roofline.ceilings import Ceilings
from flexbench.dist.roofline.counting import Operation
from flexbench.dist.roofline.floors import operation_floor

# More than caches hold, when there are so few rows that weights are most of what is read.
_COPIES_BYTES = 128 << 20
_FEW_ROWS = 64


@dataclass(frozen=True)
class Pair:
    """One matrix (N, K) with some rows: seconds of a product, turn by turn."""

    name: str
    shape: tuple[int, int]
    num_rows: int
    ours: Sequence[float]
    onednn: Sequence[float]
    ceilings: Ceilings

    @property
    def flops(self) -> int:
        """Two a multiplication with its addition."""
        num_outputs, num_inputs = self.shape
        return 2 * self.num_rows * num_outputs * num_inputs

    @property
    def floor_s(self) -> float:
        """As `--roofline` has it: activations are in no floor."""
        num_bytes = self.shape[0] * self.shape[1] * getattr(torch, self.ceilings.dtype).itemsize
        product = Operation(name=self.name, flops=self.flops, weight_bytes=num_bytes)
        return operation_floor(product, self.ceilings).seconds

    def gflops(self, seconds: Sequence[float]) -> float:
        """Of the median turn."""
        return self.flops / statistics.median(seconds) / 1e9

    def of_roofline(self, seconds: Sequence[float]) -> float:
        """The floor's share of the median turn."""
        return self.floor_s / statistics.median(seconds)

    @property
    def ratio(self) -> float:
        """Our speed by oneDNN's: the median of the turns'."""
        return statistics.median(b / a for a, b in zip(self.ours, self.onednn, strict=True))


def shapes_of(config: OptConfig) -> dict[str, tuple[int, int]]:
    """The matrices of a decoder layer, (N, K)."""
    h, f = config.hidden_size, config.ffn_dim
    return {"qkv": (3 * h, h), "out": (h, h), "fc1": (f, h), "fc2": (h, f)}


def compare(
    name: str, shape: tuple[int, int], num_rows: int, dtype: torch.dtype, args: argparse.Namespace
) -> Pair:
    """Both kinds of product, in turns."""
    bounds = Bounds(args.dtype, args.threads)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_rows, shape[1], generator=generator).to(dtype)
    weight = torch.randn(shape, generator=generator).to(dtype)
    num_copies = max(1, _COPIES_BYTES // weight.nbytes) if num_rows <= _FEW_ROWS else 1
    ours = [PanelMatrix.of([weight]) for _ in range(num_copies)]
    onednn = [OneDnnMatrix(weight) for _ in range(num_copies)]
    kinds: tuple[Sequence[Product], Sequence[Product]] = (ours, onednn)
    seconds: tuple[list[float], list[float]] = ([], [])
    bounds.measure()
    began_at = time.time()
    for turn in range(args.repeats + 1):
        for kind, matrices in enumerate(kinds):
            taken = timed(partial(multiply, matrices, x)) / num_copies
            if turn > 0:  # the first touches memory and makes ready
                seconds[kind].append(taken)
    ended_at = time.time()
    bounds.measure()
    return Pair(name, shape, num_rows, *seconds, bounds.around(began_at, ended_at))


def multiply(matrices: Sequence[Product], x: torch.Tensor) -> None:
    """One product with each."""
    for matrix in matrices:
        matrix.apply(x)


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    started_at = time.perf_counter()
    work()
    return time.perf_counter() - started_at


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="facebook/opt-125m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16, 128, 512, 2048])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores"
    )
    return parser


def main() -> None:
    """Measure, and print."""
    parser = make_parser()
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config, dtype = get_opt_config(args.model, dtype=args.dtype), getattr(torch, args.dtype)
    if not panel_product.fits(dtype, 2) or not has_onednn(torch.empty(1, 2, dtype=dtype)):
        parser.error(f"there are not both products of {args.dtype} on this machine")
    print(f"{config.name}, {args.dtype}, {args.threads} threads")
    print(f"{'':27}{'GFLOP/s':>16}{'of the roofline':>18}")
    print(
        f"{'':4}{'outputs':>9}{'inputs':>8}{'rows':>6}{'ours':>8}{'oneDNN':>8}"
        f"{'ours':>10}{'oneDNN':>8}  ours / oneDNN"
    )
    ratios = []
    for (name, shape), rows in itertools.product(shapes_of(config).items(), args.rows):
        pair = compare(name, shape, rows, dtype, args)
        ratios.append(pair.ratio)
        print(
            f"{name:4}{shape[0]:9}{shape[1]:8}{rows:6}"
            f"{pair.gflops(pair.ours):8.0f}{pair.gflops(pair.onednn):8.0f}"
            f"{pair.of_roofline(pair.ours):10.0%}{pair.of_roofline(pair.onednn):8.0%}"
            f"  {pair.ratio:.2f}",
            flush=True,
        )
    print(f"ratios: {min(ratios):.2f} to {max(ratios):.2f}, median {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
