"""What `flexbench dist` was asked to do, validated before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

from flexbench.core.checks import check_count, check_seconds, check_seed
from flexbench.core.errors import ConfigError
from flexbench.dist.partition import Balance
from flexbench.dist.policy import Policy
from flexbench.models.families import DTYPE_BYTES

DEFAULT_MODEL = "facebook/opt-125m"
DUMMY_WEIGHT = "_DUMMY_"
DEFAULT_OUTPUT = Path("results/dist.tsv")
DEFAULT_COMM_TIMEOUT_S = 60.0
DTYPES = ("auto", *DTYPE_BYTES)
COMM_DEVICES = ("gpu", "cpu")
AUTO_LOG = "auto"


class DebugMode(StrEnum):
    """Shorter runs, from which the figures of the whole are projected."""

    FEWER_BATCH = "fewer_batch"
    BREAKDOWN = "breakdown"


def check_temperature(temperature: float, *, do_sample: bool) -> None:
    """Raise ConfigError for a temperature that logits cannot be divided by."""
    if do_sample and not 0 < temperature < float("inf"):
        raise ConfigError("--temperature", f"must be above 0, not {temperature:g}")


def check_stop(stop: int | None, *, cut_gen_len: int | None, debug_mode: str | None) -> None:
    """Raise ConfigError for no token, and where one would make a projection a guess."""
    if stop is not None:
        check_count("--stop", stop, minimum=0)
    if stop is not None and (cut_gen_len is not None or debug_mode is not None):
        other = "--debug-mode" if cut_gen_len is None else "--cut-gen-len"
        raise ConfigError("--stop", f"nobody knows how many tokens {other} would have to project")


def is_folder(text: str) -> bool:
    """Whether `text` names a folder that there is."""
    try:
        return bool(text) and Path(text).expanduser().is_dir()
    except (OSError, RuntimeError, ValueError):
        return False  # no such user, or no name of a file


def default_offload_dir() -> Path:
    """A folder on a disk, if there is one: /tmp is memory on many systems."""
    return Path("/var/tmp")  # noqa: S108 - files without names are made in there


@dataclass(frozen=True, kw_only=True)
class DistConfig:
    """The whole benchmark, the same on every rank. Times are in seconds.

    Raises ConfigError, which names the option and what it accepts, for values that cannot work.
    """

    model: str = DEFAULT_MODEL
    """A published OPT model, or a Hugging Face folder with one."""
    path: str | None = None
    """Its weights: a folder, a name on the hub, or _DUMMY_. None: `model` if that is a folder."""
    offload_dir: Path = field(default_factory=default_offload_dir)
    dtype: str = "auto"
    prompt_len: int = 512
    gen_len: int = 32
    cut_gen_len: int | None = None
    debug_mode: str | None = None
    gpu_batch_size: int = 4
    num_gpu_batches: int = 1
    percent: tuple[float, ...] = (100, 0, 100, 0, 100, 0)
    """Weights on gpu and cpu, cache on gpu and cpu, activations on gpu and cpu."""
    sep_layer: bool = True
    pin_weight: bool = True
    cpu_cache_compute: bool = False
    attn_sparsity: float = 1.0
    compress_weight: bool = False
    compress_cache: bool = False
    overlap: bool = True
    do_sample: bool = False
    temperature: float = 1.0
    stop: int | None = None
    seed: int = 0
    """Of the prompts, the dummy weights, and of sampling."""
    num_inner_iterations: int | None = None
    """Blocks of prompts under way at once. None: as many as there are ranks."""
    async_comm: bool = False
    comm_device: str = "gpu"
    balance: str = Balance.LAYERS
    comm_timeout_s: float = DEFAULT_COMM_TIMEOUT_S
    allow_overcommit: bool = False
    """Start even if the placement does not fit into free memory or disk space."""
    output: Path = DEFAULT_OUTPUT
    log_file: str = AUTO_LOG
    no_log: bool = False
    verbose: int = 1
    roofline: bool = False
    """Measure what the machine can do at best, and set it beside the run."""

    def __post_init__(self) -> None:
        """Check every value on its own, then what has to fit together."""
        for option, value in (
            ("--prompt-len", self.prompt_len),
            ("--gen-len", self.gen_len),
        ):
            check_count(option, value, minimum=1)
        if self.num_inner_iterations is not None:
            check_count("--num-inner-iterations", self.num_inner_iterations, minimum=1)
        check_seed("--seed", self.seed)
        check_count("--verbose", self.verbose, minimum=0)
        check_seconds("--comm-timeout", self.comm_timeout_s)
        if len(self.percent) != 6:
            raise ConfigError(
                "--percent",
                "takes six numbers: weights on gpu and cpu, cache on gpu and cpu, activations on "
                f"gpu and cpu; not {len(self.percent)}",
            )
        _check_choice("--dtype", self.dtype, DTYPES)
        _check_choice("--comm-device", self.comm_device, COMM_DEVICES)
        _check_choice("--balance", self.balance, tuple(Balance))
        if self.debug_mode is not None:
            _check_choice("--debug-mode", self.debug_mode, tuple(DebugMode))
        check_temperature(self.temperature, do_sample=self.do_sample)
        check_stop(self.stop, cut_gen_len=self.cut_gen_len, debug_mode=self.debug_mode)
        if self.temperature != 1.0 and not self.do_sample:
            raise ConfigError("--temperature", "changes nothing without --do-sample")
        self._check_projection()
        self._check_roofline()
        self.policy()  # which has checks of its own

    def _check_projection(self) -> None:
        if self.cut_gen_len is not None:
            # One token is the prefill's: of the decoding, nothing would have been measured.
            least = min(2, self.gen_len)
            if self.cut_gen_len < least:
                raise ConfigError(
                    "--cut-gen-len", f"must be at least {least}, not {self.cut_gen_len}"
                )
            if self.debug_mode is not None:
                raise ConfigError("--debug-mode", "cannot be combined with --cut-gen-len")

    def _check_roofline(self) -> None:
        """What is computed is counted before, all layers and all tokens."""
        if self.roofline and self.debug_mode is not None:
            raise ConfigError("--roofline", "cannot count the layers that --debug-mode leaves out")
        if self.roofline and self.stop is not None:
            raise ConfigError("--roofline", "cannot count the tokens that --stop leaves out")

    def policy(self) -> Policy:
        """The policy that the options describe."""
        w_gpu, w_cpu, cache_gpu, cache_cpu, act_gpu, act_cpu = self.percent
        return Policy(
            gpu_batch_size=self.gpu_batch_size,
            num_gpu_batches=self.num_gpu_batches,
            w_gpu_percent=w_gpu,
            w_cpu_percent=w_cpu,
            cache_gpu_percent=cache_gpu,
            cache_cpu_percent=cache_cpu,
            act_gpu_percent=act_gpu,
            act_cpu_percent=act_cpu,
            overlap=self.overlap,
            sep_layer=self.sep_layer,
            pin_weight=self.pin_weight,
            cpu_cache_compute=self.cpu_cache_compute,
            attn_sparsity=self.attn_sparsity,
            compress_weight=self.compress_weight,
            comp_weight_config=None,
            compress_cache=self.compress_cache,
            comp_cache_config=None,
        )

    @property
    def positions_per_token(self) -> float:
        """Positions that layers compute for each new token, the prompt's shared among them."""
        return (self.prompt_len + self.gen_len - 1) / self.gen_len

    @property
    def num_tokens(self) -> int:
        """Tokens of a prompt that are really generated."""
        if self.debug_mode is not None:
            return min(2, self.gen_len)
        return min(self.gen_len, self.cut_gen_len or self.gen_len)

    @property
    def is_projected(self) -> bool:
        """Whether figures of the whole run follow from a part of it."""
        return self.debug_mode is not None or self.num_tokens < self.gen_len

    @property
    def weights_path(self) -> str:
        """Where the weights come from."""
        if self.path is not None:
            return self.path
        return self.model if is_folder(self.model) else DUMMY_WEIGHT


def config_from(arguments: Mapping[str, Any]) -> DistConfig:
    """The configuration that options describe, by their names on the command line.

    They are the names of FlexGen's scripts. What is missing, or None, has its default; what is no
    option of ours is left alone.
    """
    renamed = {"comm_timeout": "comm_timeout_s"}
    given = {renamed.get(name, name): value for name, value in arguments.items()}
    known = {field.name for field in fields(DistConfig)}
    values = {name: given[name] for name in known if given.get(name) is not None}
    if "percent" in values:
        values["percent"] = tuple(values["percent"])
    for name in ("offload_dir", "output"):
        if name in values:
            values[name] = Path(values[name]).expanduser()
    return DistConfig(**values)


def _check_choice(option: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ConfigError(option, f"unknown value {value!r}; accepted: {', '.join(accepted)}")
