"""A dist pipeline as an endpoint: `flexbench serving --api dist`.

The pipeline runs as `python -m flexbench.dist.service`, with several stages under mpirun, and is
asked over HTTP like any other server. What takes time to import is left to that process.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import shlex
import shutil
import sys
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from flexbench.core.checks import check_count, check_seconds
from flexbench.core.endpoint import ServiceContext
from flexbench.core.environment import redact_command_line
from flexbench.core.errors import ConfigError, MissingDependencyError
from flexbench.core.progress import Progress, Silence
from flexbench.core.service_process import LOCAL_HOST, ServiceProcess, find_port
from flexbench.dist.batching import check_batch_wait
from flexbench.dist.config import (
    DEFAULT_COMM_TIMEOUT_S,
    DEFAULT_MODEL,
    DUMMY_WEIGHT,
    DistConfig,
    default_offload_dir,
    is_folder,
)
from flexbench.dist.opt_config import OptConfig, get_opt_config, load_opt_config
from flexbench.dist.partition import Balance, split_layers
from flexbench.http_endpoint.requirement import require_http
from flexbench.http_endpoint.started_server import AskedOverHttp, get

if TYPE_CHECKING:
    from flexbench.core.endpoint import Client

_MAX_PORT = 65535
_CHECK_TIMEOUT_S = 0.4
_INSTALL = "pip install 'flexbench[dist]'"
# The service asks for no key; none of the person's is to be sent to it.
_KEY_VARIABLE = "FLEXBENCH_DIST_API_KEY"
# What a rank of Open MPI has in its environment, and what mpirun takes for its own.
_IS_RANK = "OMPI_COMM_WORLD_RANK"
_RANK_VARIABLES = ("OMPI_", "PMIX_", "PRTE_", "PMI_")
_AS_ROOT = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")


@dataclass(frozen=True, kw_only=True)
class DistEndpointConfig:
    """A pipeline to start. The options are those of `flexbench dist`, where they mean the same."""

    model: str | None = None
    """A published OPT model, or a Hugging Face folder with one; None or 'auto': opt-125m."""
    path: str | None = field(
        default=None,
        metadata={
            "help": "The weights: a Hugging Face folder, a name on its hub, or _DUMMY_ for random "
            "ones. Default: --model if that is a folder, else _DUMMY_"
        },
    )
    num_stages: int = field(
        default=1, metadata={"help": "Pipeline stages; several run under mpirun"}
    )
    port: int | None = field(
        default=None, metadata={"help": "Port of the service on 127.0.0.1; by default a free one"}
    )
    gpu_batch_size: int = field(default=4, metadata={"help": "Prompts computed at once"})
    num_gpu_batches: int = field(
        default=1, metadata={"help": "Batches that pass through a layer while it is loaded"}
    )
    num_inner_iterations: int | None = field(
        default=None,
        metadata={"help": "Blocks of prompts at once; by default one a stage"},
    )
    batch_wait: float = field(
        default=0.01,
        metadata={
            "help": "How long a block that has its first prompt waits for more",
            "metavar": "SECONDS",
        },
    )
    percent: str = field(
        default="100 0 100 0 100 0",
        metadata={
            "help": "Weights on gpu and cpu, cache on gpu and cpu, activations on gpu and cpu, in "
            "percent; the rest is on disk",
            "metavar": "'W W C C A A'",
        },
    )
    dtype: str = field(default="auto", metadata={"help": "Type of weights, cache, activations"})
    offload_dir: Path | None = field(
        default=None, metadata={"help": "Where 'disk' is. Default: /var/tmp"}
    )
    sep_layer: bool = field(
        default=True, metadata={"help": "Attention and MLP are layers of their own"}
    )
    pin_weight: bool = field(default=True, metadata={"help": "Page-lock weights in host memory"})
    cpu_cache_compute: bool = field(
        default=False, metadata={"help": "Attention over the cache outside of the GPU on the CPU"}
    )
    attn_sparsity: float = field(
        default=1.0, metadata={"help": "Share of past values in the attention of a new token"}
    )
    compress_weight: bool = field(default=False, metadata={"help": "Weights in 4 bits"})
    compress_cache: bool = field(default=False, metadata={"help": "Keys and values in 4 bits"})
    overlap: bool = field(default=True, metadata={"help": "Load and store while computing"})
    comm_device: str = field(
        default="gpu", metadata={"help": "gpu or cpu: where hidden states are sent from"}
    )
    async_comm: bool = field(default=False, metadata={"help": "Send while computing"})
    balance: str = field(
        default=Balance.LAYERS.value,
        metadata={"help": "What is to be equal on all stages: layers, memory or time"},
    )
    stage_timeout: float = field(
        default=DEFAULT_COMM_TIMEOUT_S,
        metadata={"help": "How long a stage may be silent", "metavar": "SECONDS"},
    )
    allow_overcommit: bool = field(
        default=False, metadata={"help": "Start even if the placement does not fit"}
    )
    seed: int = field(default=0, metadata={"help": "Of random weights"})

    def __post_init__(self) -> None:
        if self.model in (None, "", "auto"):
            object.__setattr__(self, "model", DEFAULT_MODEL)
        check_count("--num-stages", self.num_stages, minimum=1)
        if self.port is not None:
            check_count("--port", self.port, minimum=1, maximum=_MAX_PORT)
        check_batch_wait(self.batch_wait)
        check_seconds("--stage-timeout", self.stage_timeout)
        self.pipeline_config()

    def pipeline_config(self, *, prompt_len: int = 1, gen_len: int = 1) -> DistConfig:
        """The pipeline, for prompts and answers of these lengths at most."""
        assert self.model is not None
        return DistConfig(
            model=self.model,
            path=self.path,
            offload_dir=self.offload_dir or default_offload_dir(),
            dtype=self.dtype,
            prompt_len=prompt_len,
            gen_len=gen_len,
            gpu_batch_size=self.gpu_batch_size,
            num_gpu_batches=self.num_gpu_batches,
            percent=_read_percent(self.percent),
            sep_layer=self.sep_layer,
            pin_weight=self.pin_weight,
            cpu_cache_compute=self.cpu_cache_compute,
            attn_sparsity=self.attn_sparsity,
            compress_weight=self.compress_weight,
            compress_cache=self.compress_cache,
            overlap=self.overlap,
            seed=self.seed,
            num_inner_iterations=self.num_inner_iterations,
            async_comm=self.async_comm,
            comm_device=self.comm_device,
            balance=self.balance,
            comm_timeout_s=self.stage_timeout,
            allow_overcommit=self.allow_overcommit,
        )

    @property
    def block_size(self) -> int:
        """Prompts that are generated together."""
        iterations = self.num_inner_iterations or self.num_stages
        return self.pipeline_config().policy().block_size * iterations

    def arguments(self, *, prompt_len: int, gen_len: int) -> list[str]:
        """The service's options. The port has to be known by then."""
        config = self.pipeline_config(prompt_len=prompt_len, gen_len=gen_len)
        values: dict[str, object] = {
            "--port": self.port,
            "--batch-wait": self.batch_wait,
            "--served-name": self.model,
            "--comm-timeout": config.comm_timeout_s,
        }
        for name in _PASSED_ON:
            value = getattr(config, name)
            # Switches of the service take a value, too.
            text = str(value).lower() if isinstance(value, bool) else value
            if text is not None:
                values[f"--{name.replace('_', '-')}"] = text
        arguments = [word for option, value in values.items() for word in (option, str(value))]
        return [*arguments, "--percent", *(f"{share:g}" for share in config.percent)]


_PASSED_ON = (
    "model",
    "path",
    "offload_dir",
    "dtype",
    "prompt_len",
    "gen_len",
    "gpu_batch_size",
    "num_gpu_batches",
    "seed",
    "sep_layer",
    "pin_weight",
    "cpu_cache_compute",
    "attn_sparsity",
    "compress_weight",
    "compress_cache",
    "overlap",
    "allow_overcommit",
    "comm_device",
    "num_inner_iterations",
    "async_comm",
    "balance",
)


class DistClient(AskedOverHttp):
    """Starts a pipeline behind an HTTP service, and sends requests to it."""

    config_class: ClassVar[type] = DistEndpointConfig
    requests_per_worker: ClassVar[int | None] = None
    preload: ClassVar[tuple[str, ...]] = ()
    packages: ClassVar[tuple[str, ...]] = ("torch", "numpy", "safetensors", "tokenizers")

    config: DistEndpointConfig

    def __init__(self, config: DistEndpointConfig) -> None:
        self.config = config
        self._process: ServiceProcess | None = None
        self._progress: Progress = Silence()
        self._facts: dict[str, Any] = {}

    # --- in the command's process ---

    def start_service(self, context: ServiceContext) -> None:
        """Start the pipeline and wait for it.

        Raises ConfigError and InputFileError for a model, stages or a port that cannot be,
        MissingDependencyError without torch, mpirun or what sends requests, WorkerError with the
        last lines of its log when the service ends instead, DeadlineError when it takes too long.
        """
        require_http()
        self._progress = context.progress
        prompt_len = self._longest_prompt(context)
        self.config = replace(self.config, port=find_port(self.config.port))
        command = [
            *self._launcher(),
            *self.config.arguments(prompt_len=prompt_len, gen_len=context.max_new_tokens),
        ]
        self._process = ServiceProcess(
            "dist service",
            command,
            log_path=context.log_folder / "dist-service.log",
            environment=_environment(context.scratch_folder),
        )
        with context.progress.phase(f"Starting {self._title}", 1) as phase:
            self._process.start()
            ready_s = self._process.wait_until_ready(
                self._is_healthy,
                timeout_s=context.timeout_s,
                raise_if_stopped=context.raise_if_stopped,
                phase=phase,
            )
            phase.advance()
        self._facts = {
            "command": shlex.join(redact_command_line(command)),
            "ready_after_s": round(ready_s, 1),
            "max_prompt_tokens": prompt_len,
        }

    def stop_service(self) -> None:
        """End the service and all its processes."""
        if self._process is not None and self._process.is_to_be_stopped:
            with self._progress.phase(f"Stopping {self._title}", 1) as phase:
                self._process.stop()
                phase.advance()

    def check_service(self) -> None:
        """Raise WorkerError, with the end of its log, if the server has ended by itself."""
        if self._process is not None:
            self._process.raise_if_ended()

    def describe_service(self) -> dict[str, Any]:
        """How the pipeline was started, and how it batches."""
        return {
            "url": self._url,
            "model": self.config.model,
            "num_pipeline_stages": self.config.num_stages,
            "batching": "static",
            "block_size": self.config.block_size,
            **self._facts,
        }

    def _longest_prompt(self, context: ServiceContext) -> int:
        model = self._find_model()
        longest = model.max_position_embeddings - context.max_new_tokens
        if longest < 1:
            raise ConfigError(
                "--max-new-tokens",
                f"up to {context.max_new_tokens} tokens are asked for, and {model.name} has "
                f"{model.max_position_embeddings} positions for prompt and answer",
            )
        if context.max_prompt_tokens > longest:
            context.progress.note(
                f"Prompts may have up to {context.max_prompt_tokens} tokens, {model.name} takes "
                f"{longest} beside the answer: longer ones will fail"
            )
        return min(longest, context.max_prompt_tokens)

    def _find_model(self) -> OptConfig:
        """The model's dimensions; checks that its layers can be shared among the stages."""
        name, path = self.config.model, self.config.path
        assert name is not None
        folder = path if path not in (None, DUMMY_WEIGHT) else name
        if folder is not None and is_folder(folder):
            model = load_opt_config(Path(folder).expanduser(), dtype=self.config.dtype)
        else:
            model = get_opt_config(name, dtype=self.config.dtype)
        try:
            split_layers(model, self.config.num_stages, Balance(self.config.balance))
        except ConfigError as error:
            raise ConfigError("--num-stages", error.problem) from error
        return model

    def _launcher(self) -> list[str]:
        if find_spec("torch") is None:
            raise MissingDependencyError(f"--api dist needs torch, which is not there: {_INSTALL}")
        service = [sys.executable, "-m", "flexbench.dist.service"]
        if self.config.num_stages == 1:
            # Whatever started this process, the service is no rank of that.
            return [*service, "--rank", "0", "--world-size", "1"]
        beside = Path(sys.executable).with_name("mpirun")
        mpirun = str(beside) if beside.exists() else shutil.which("mpirun")
        if mpirun is None:
            raise MissingDependencyError(
                f"--num-stages needs mpirun, which is not there: {_INSTALL}"
            )
        # Ranks see to their share of the cores themselves.
        how = ["--oversubscribe", "--bind-to", "none", "-np", str(self.config.num_stages)]
        return [mpirun, *how, *service]

    @property
    def _title(self) -> str:
        stages = self.config.num_stages
        return f"a pipeline of {stages} stages" if stages > 1 else "a service of one process"

    @property
    def _url(self) -> str:
        return f"http://{LOCAL_HOST}:{self.config.port}"

    def _is_healthy(self) -> bool:
        assert self.config.port is not None
        try:
            status, body = get(self.config.port, "/health", timeout_s=_CHECK_TIMEOUT_S)
            return status == http.client.OK and json.loads(body)["status"] == "ok"
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
            return False

    # --- in a worker ---

    @cached_property
    def _requests(self) -> Client:
        assert self.config.port is not None, "start_service() finds the port"
        return _http_client(self._url, self.config.model)


def _read_percent(text: str) -> tuple[float, ...]:
    try:
        shares = tuple(float(word) for word in text.replace(",", " ").split())
    except ValueError:
        shares = ()
    if len(shares) != 6 or not all(map(math.isfinite, shares)):
        raise ConfigError(
            "--percent",
            f"takes six numbers in one argument, like '20 80 0 100 0 100', not {text!r}",
        )
    return shares


def _environment(scratch_folder: Path) -> dict[str, str | None]:
    environment: dict[str, str | None] = {"TMPDIR": str(scratch_folder)}
    if _IS_RANK in os.environ:  # an mpirun of its own is none of this one's ranks
        environment |= {
            name: None
            for name in os.environ
            if name.startswith(_RANK_VARIABLES) and name not in _AS_ROOT
        }
    if hasattr(os, "geteuid") and os.geteuid() == 0:  # mpirun refuses to run as root otherwise
        environment |= dict.fromkeys(_AS_ROOT, "1")
    return environment


def _http_client(url: str, model: str | None) -> Client:
    """What speaks OpenAI's API over HTTP."""
    from flexbench.http_endpoint.openai import OpenAIClient, OpenAIConfig

    config = OpenAIConfig(model=model, api_url=url, api_key_env=_KEY_VARIABLE)
    return OpenAIClient(config)
