"""A step of decoding with weights of 4 bits (--compress-weight), and with weights as they are.

Both are in one process, and take turns. Shown are medians of the time of a step, and the median of
the turns' ratios, beside the ratio of bytes: the goal is to be faster by nearly as much. The same
for one product by itself, where nothing else takes time, and what 4 bits cost in exactness: the
error of a product, as a share of its norm, with weights of a uniform and of a normal distribution.

    .venv/bin/python benchmarks/dist_compression.py
    .venv/bin/python benchmarks/dist_compression.py --models opt-125m --batch-size 4
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch

from benchmarks.dist_turns import Point
from flexbench.dist import ExecutionEnv, OptLM
from flexbench.dist.compression import compress, decompress
from flexbench.dist.config import DistConfig
from flexbench.dist.kernels import four_bits
from flexbench.dist.kernels.linear import PackedMap
from flexbench.dist.opt_config import get_opt_config
from flexbench.dist.policy import CompressionConfig

_SHAPE = (8192, 2048)  # of the product by itself: fc1 of OPT-1.3B
_CALLS = 20
_ERROR_ROWS = 256
_IN_MEMORY = (100.0, 0.0, 100.0, 0.0, 100.0, 0.0)


@dataclass(frozen=True)
class Turns:
    """Seconds of each turn, as they are and compressed, and the bytes that were read."""

    plain_s: list[float]
    compressed_s: list[float]
    plain_bytes: int
    compressed_bytes: int

    def __str__(self) -> str:
        ratio = statistics.median(
            plain / compressed
            for plain, compressed in zip(self.plain_s, self.compressed_s, strict=True)
        )
        plain, compressed = map(statistics.median, (self.plain_s, self.compressed_s))
        return (
            f"{plain * 1e3:9.2f}{compressed * 1e3:12.2f}{ratio:8.2f}"
            f"{self.plain_bytes / self.compressed_bytes:10.2f}"
        )


def take_turns(
    plain: Callable[[], float], compressed: Callable[[], float], repeats: int
) -> tuple[list[float], list[float]]:
    """Seconds of each call of both, after one of each that does not count."""
    plain(), compressed()
    turns = [(plain(), compressed()) for _ in range(repeats)]
    return [one for one, _ in turns], [other for _, other in turns]


def compare_steps(name: str, dtype: str, args: argparse.Namespace) -> Turns:
    """A step of decoding of a model with random weights."""
    shape = get_opt_config(f"facebook/{name}", dtype=dtype)
    env = ExecutionEnv.create(tempfile.gettempdir())
    point = Point(args.batch_size, args.prompt_len, args.gen_len)
    ids = np.array(point.prompts(shape.vocab_size))
    models = []
    for is_compressed in (False, True):
        config = DistConfig(
            model=name,
            dtype=dtype,
            gpu_batch_size=args.batch_size,
            percent=_IN_MEMORY,
            compress_weight=is_compressed,
        )
        models.append(OptLM(shape, env, "_DUMMY_", config.policy()))

    def step_of(model: OptLM) -> Callable[[], float]:
        def step_s() -> float:
            model.generate(ids, args.gen_len)
            ends = model.times.token_ends
            return (ends[-1] - ends[0]) / (len(ends) - 1)

        return step_s

    seconds = take_turns(*map(step_of, models), args.repeats)
    num_bytes = [sum(weights.layout.num_bytes for weights in model._weights) for model in models]
    for model in models:
        model.close()
    return Turns(*seconds, *num_bytes)


def compare_products(dtype: str, args: argparse.Namespace) -> Turns:
    """A product with one matrix of several in turn, which do not all fit into a cache."""
    torch_dtype, config = getattr(torch, dtype), CompressionConfig()
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(_SHAPE, generator=generator).to(torch_dtype) for _ in range(8)]
    x = torch.randn(args.batch_size, _SHAPE[1], generator=generator).to(torch_dtype)
    packed = [PackedMap(matrix) for matrix in matrices]
    four_bit = [
        four_bits.FourBitMap(four_bits.pack(matrix, config), _SHAPE, config, torch_dtype)
        for matrix in matrices
    ]
    for one in packed:
        one.apply(x)  # it is packed when it is used for the second time

    def time_of(maps: list[PackedMap] | list[four_bits.FourBitMap]) -> Callable[[], float]:
        def product_s() -> float:
            started_at = time.perf_counter()
            for _ in range(_CALLS):
                for one in maps:
                    one.apply(x)
            return (time.perf_counter() - started_at) / (_CALLS * len(maps))

        return product_s

    seconds = take_turns(time_of(packed), time_of(four_bit), args.repeats)
    rows, width = _SHAPE
    plain_bytes = rows * width * torch_dtype.itemsize
    return Turns(*seconds, plain_bytes, rows * four_bits.row_bytes(width, config))


def error_of(weight: torch.Tensor) -> float:
    """Of random inputs' product with (N, K): the difference's norm as a share of its own."""
    config, width = CompressionConfig(), weight.shape[1]
    x = torch.randn(_ERROR_ROWS, width, generator=torch.Generator().manual_seed(1))
    rounded = decompress(compress(weight, config), width, config, weight.dtype)
    exact = x @ weight.T
    return float((x @ rounded.T - exact).norm() / exact.norm())


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["opt-125m", "opt-1.3b"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--prompt-len", type=int, default=32)
    parser.add_argument("--gen-len", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores"
    )
    return parser


def main() -> None:
    """Measure, and print."""
    args = make_parser().parse_args()
    torch.set_num_threads(args.threads)
    print(f"{args.batch_size} prompts, {args.threads} threads, milliseconds (medians)")
    print(f"{'':28}{'as it is':>9}{'compressed':>12}{'ratio':>8}{'of bytes':>10}")
    for name, dtype in product(args.models, args.dtypes):
        print(f"{f'step, {name}, {dtype}':28}{compare_steps(name, dtype, args)}", flush=True)
    with torch.inference_mode():
        for dtype in args.dtypes:
            print(f"{f'product, {dtype}':28}{compare_products(dtype, args)}", flush=True)
    generator = torch.Generator().manual_seed(0)
    for name, weight in (
        ("uniform", torch.rand(_SHAPE, generator=generator) - 0.5),
        ("normal", torch.randn(_SHAPE, generator=generator)),
    ):
        print(f"error of a product by 4 bits, {name} weights: {error_of(weight):.1%} of its norm")


if __name__ == "__main__":
    main()
