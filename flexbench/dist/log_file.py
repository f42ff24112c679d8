"""The log file of FlexGen's benchmark: lines of figures, and a name that holds the options."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexbench.core.errors import ConfigError, FlexbenchError
from flexbench.dist.config import AUTO_LOG, DistConfig

_GB = 2**30  # as the original counts


def log_path(config: DistConfig, model_name: str) -> Path | None:
    """Where the log goes; None with --no-log. `auto` names it after the options, by the results."""
    if config.no_log:
        return None
    if config.log_file != AUTO_LOG:
        return Path(config.log_file)
    return config.output.parent / f"{_name(config, model_name)}.log"


def _name(config: DistConfig, model_name: str) -> str:
    size = model_name.rpartition("/")[2].rpartition("-")[2]
    percent = "-".join(f"{share:g}" for share in config.percent)
    cache = "cpu" if config.cpu_cache_compute else "gpu"
    name = (
        f"fo-{size}-gbs{config.gpu_batch_size}-ngbs{config.num_gpu_batches}"
        f"-prompt{config.prompt_len}-gen{config.gen_len}-percent-{percent}-{cache}-cache"
    )
    name += "-compw" if config.compress_weight else ""
    return name + ("-compc" if config.compress_cache else "")


def check_log(path: Path) -> None:
    """Raise ConfigError unless the log can be written. Leaves no empty one behind."""
    is_new = not path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8"):
            pass
        if is_new:
            path.unlink()
    except OSError as error:
        raise ConfigError("--log-file", f"cannot write to {path}: {error.strerror}") from error


def append_log(path: Path, figures: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    """Append one run."""
    decode = figures["decode_throughput"]
    lines = (
        f"model size: {sizes['model'] / _GB:.3f} GB\tcache size: {sizes['cache'] / _GB:.3f} GB\t"
        f"hidden size (p): {sizes['hidden'] / _GB:.3f} GB",
        f"peak gpu mem: {sizes['gpu_peak'] / _GB:.3f} GB\tprojected: {figures['projected']}",
        f"prefill latency: {figures['prefill_latency']:.3f} s\t"
        f"prefill throughput: {figures['prefill_throughput']:.3f} token/s",
        f"decode latency: {figures['decode_latency']:.3f} s\t"
        f"decode throughput: {0.0 if decode is None else decode:.3f} token/s",
        f"total latency: {figures['total_latency']:.3f} s\t"
        f"total throughput: {figures['total_throughput']:.3f} token/s",
    )
    text = "\n".join(lines) + "\n"
    try:
        with path.open("a", encoding="utf-8") as log:
            log.write(text)
    except OSError as error:
        raise FlexbenchError(
            f"--log-file: {path} could not be written: {error.strerror}", details=text
        ) from error
