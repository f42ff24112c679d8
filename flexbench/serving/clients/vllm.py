"""vLLM's own server on this machine: started, waited for, asked through OpenAI's API, ended."""

from __future__ import annotations

import http.client
import json
import os
import shlex
import shutil
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

from flexbench.core.checks import check_count
from flexbench.core.endpoint import ServiceContext
from flexbench.core.environment import redact_command_line
from flexbench.core.errors import ConfigError, MissingDependencyError, RunError, WorkerError
from flexbench.core.folders import local_path
from flexbench.core.progress import Phase, Progress, Silence
from flexbench.core.service_process import LOCAL_HOST, ServiceProcess, find_port
from flexbench.http_endpoint.keys import read_key
from flexbench.http_endpoint.openai import OpenAIClient, OpenAIConfig
from flexbench.http_endpoint.requirement import require_http
from flexbench.http_endpoint.started_server import AskedOverHttp, get

_MAX_PORT = 65535
# Below the half second that a wait may take without a look at Ctrl-C.
_CHECK_TIMEOUT_S = 0.4
_QUESTION_TIMEOUT_S = 10.0
# vLLM itself asks for this key where the variable is set, so it is what requests have to carry.
_KEY_VARIABLE = "VLLM_API_KEY"
# Arguments of vLLM that are for other options of ours to give, or for nobody.
_TAKEN = {
    "--model": "--model",
    "--port": "--port",
    "--tensor-parallel-size": "--tp-size",
    "--host": None,
    "--uds": None,
}
# Secrets, with the shortest beginning of their names that is no other option's.
_SECRETS = {"--api-key": "--api", "--hf-token": "--hf-t"}
_NO_METADATA = "No package metadata was found for vllm"
_MODULE = "python -m vllm.entrypoints.openai.api_server"


@dataclass(frozen=True, kw_only=True)
class VLLMConfig:
    """How the server is started, and how it is asked."""

    model: str | None = None
    vllm_command: str = field(
        default="vllm serve",
        metadata={
            "help": "What starts the server, such as '/path/to/env/bin/vllm serve' for that of "
            f"another environment, or '{_MODULE}'"
        },
    )
    tp_size: int = field(default=1, metadata={"help": "Tensor parallel size of the model"})
    port: int | None = field(
        default=None, metadata={"help": "Port of the server; by default a free one"}
    )
    vllm_args: str | None = field(
        default=None,
        metadata={"help": "Further arguments of the server, like '--max-model-len 4096'"},
    )
    endpoint: str = field(default="completions", metadata={"help": "completions or chat"})
    temperature: float = field(
        default=0.0, metadata={"help": "Sampling temperature; 0: the likeliest token"}
    )
    ignore_eos: bool = field(
        default=True, metadata={"help": "Generate exactly as many tokens as are wanted"}
    )
    extra_body: str | None = field(
        default=None,
        metadata={"help": "JSON object with further fields of each request, like '{\"top_k\": 5}'"},
    )

    def __post_init__(self) -> None:
        if self.model in (None, "", "auto"):
            raise ConfigError("--model", "is needed with --api vllm: a folder, or a name on a hub")
        assert self.model is not None
        if self.model.startswith("-"):
            raise ConfigError("--model", "must be a folder, or a name on a hub, not an option")
        check_count("--tp-size", self.tp_size, minimum=1)
        if self.port is not None:
            check_count("--port", self.port, minimum=1, maximum=_MAX_PORT)
        command = _split("--vllm-command", self.vllm_command)
        if not command:
            raise ConfigError("--vllm-command", "must name a command, such as 'vllm serve'")
        _check_secrets("--vllm-command", command)
        _check_secrets("--vllm-args", self.further_arguments())
        _check_arguments(self.further_arguments())
        self.requests_config()

    def further_arguments(self) -> list[str]:
        """What --vllm-args has in it."""
        return _split("--vllm-args", self.vllm_args or "")

    def command(self) -> list[str]:
        """What starts the server. The port has to be known by then."""
        assert self.model is not None
        command = _split("--vllm-command", self.vllm_command)
        # `vllm serve` wants the model as it is, the module of the server with its option.
        model = [self.model] if command[-1] == "serve" else ["--model", self.model]
        place = ["--host", LOCAL_HOST, "--port", str(self.port)]
        size = ["--tensor-parallel-size", str(self.tp_size)]
        # Of an option that is given twice, the last one counts.
        return [*command, *model, *self.further_arguments(), *size, *place]

    def requests_config(self) -> OpenAIConfig:
        """How the server is asked. Where it is, only once the port is known."""
        config = OpenAIConfig(
            model=self.model,
            api_url=f"http://{LOCAL_HOST}:{self.port or 1}",
            endpoint=self.endpoint,
            api_key_env=_KEY_VARIABLE,
            temperature=self.temperature,
            extra_body=self.extra_body,
        )
        if not self.ignore_eos:
            return config
        # For vLLM it is enough. min_tokens, which other servers may need beside it, would make vLLM
        # change the logits of every step, so that the end of a text is never chosen.
        fields = {"ignore_eos": True, **config.extra_fields()}
        return replace(config, extra_body=json.dumps(fields))


class VLLMClient(AskedOverHttp):
    """Starts `vllm serve` and sends requests to it."""

    config_class: ClassVar[type] = VLLMConfig
    requests_per_worker: ClassVar[int | None] = OpenAIClient.requests_per_worker
    preload: ClassVar[tuple[str, ...]] = OpenAIClient.preload
    packages: ClassVar[tuple[str, ...]] = OpenAIClient.packages

    config: VLLMConfig

    def __init__(self, config: VLLMConfig) -> None:
        self.config = config
        self._process: ServiceProcess | None = None
        self._progress: Progress = Silence()
        self._facts: dict[str, Any] = {}

    # --- in the command's process ---

    def start_service(self, context: ServiceContext) -> None:
        """Start the server and wait for it.

        Raises MissingDependencyError when there is no such command, or nothing to send requests
        with, ConfigError for a port that is taken, WorkerError with the last lines of its log when
        it ends, DeadlineError when it takes too long.
        """
        require_http()
        self._progress = context.progress
        self.config = replace(self.config, port=find_port(self.config.port))
        command = self.config.command()
        if shutil.which(command[0]) is None:
            raise MissingDependencyError(
                f"There is no command {command[0]}: install vLLM, or name it with --vllm-command"
            )
        self._process = ServiceProcess(
            "vllm",
            command,
            log_path=context.log_folder / "vllm.log",
            environment=self._environment(),
        )
        with context.progress.phase("Starting vLLM", 1) as phase:
            self._process.start()
            ready_s = self._wait(self._process, context, phase)
            phase.advance()
        self._facts = {
            "version": self._ask("/version").get("version"),
            "command": shlex.join(redact_command_line(command)),
            "ready_after_s": round(ready_s, 1),
            **self._take_model(context),
        }

    def stop_service(self) -> None:
        """End the server and all its processes."""
        if self._process is not None and self._process.is_to_be_stopped:
            with self._progress.phase("Stopping vLLM", 1) as phase:
                self._process.stop()
                phase.advance()

    def check_service(self) -> None:
        """Raise WorkerError, with the end of its log, if the server has ended by itself."""
        if self._process is not None:
            self._process.raise_if_ended()

    def describe_service(self) -> dict[str, Any]:
        """The server's version, how it was started, and how long that took."""
        return {"url": str(self.config.requests_config().request_url()), **self._facts}

    def _environment(self) -> dict[str, str | None]:
        assert self.config.model is not None
        # Nobody has asked for the start of a benchmark to be told to others.
        environment: dict[str, str | None] = {"VLLM_NO_USAGE_STATS": "1"}
        if self.config.vllm_args is None and local_path(self.config.model) is not None:
            environment["HF_HUB_OFFLINE"] = "1"
        # What the person has set is what the person wants.
        return {name: text for name, text in environment.items() if name not in os.environ}

    def _wait(self, process: ServiceProcess, context: ServiceContext, phase: Phase) -> float:
        try:
            return process.wait_until_ready(
                self._is_healthy,
                timeout_s=context.timeout_s,
                raise_if_stopped=context.raise_if_stopped,
                phase=phase,
            )
        except WorkerError as error:
            if _NO_METADATA in (error.details or ""):
                error.add_details(
                    "This build of vLLM is a package of another name, which its own command does "
                    f"not know. This starts it: --vllm-command '{_MODULE}'"
                )
            raise

    def _take_model(self, context: ServiceContext) -> dict[str, Any]:
        """Ask for the model by the name that the server gives it, and compare lengths."""
        entries = self._ask("/v1/models").get("data")
        names = [entry["id"] for entry in entries or [] if isinstance(entry.get("id"), str)]
        if names and self.config.model not in names:
            self.config = replace(self.config, model=names[0])
        longest = entries[0].get("max_model_len") if entries else None
        wanted = context.max_prompt_tokens + context.max_new_tokens
        if isinstance(longest, int) and wanted > longest:
            context.progress.note(
                f"Requests may have up to {wanted} tokens, the server takes {longest}: longer "
                "ones will fail"
            )
        return {"model": self.config.model, "max_model_len": longest}

    def _is_healthy(self) -> bool:
        try:
            return self._get("/health", _CHECK_TIMEOUT_S)[0] == http.client.OK
        except (OSError, http.client.HTTPException):
            return False

    def _ask(self, path: str) -> dict[str, Any]:
        """An answer that is a JSON object; an empty one where the server has no such answer."""
        try:
            status, body = self._get(path, _QUESTION_TIMEOUT_S)
            value = json.loads(body) if status == http.client.OK else {}
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise RunError(f"vLLM does not answer {path} as it should: {error}") from error
        return value if isinstance(value, dict) else {}

    def _get(self, path: str, timeout_s: float) -> tuple[int, bytes]:
        assert self.config.port is not None
        key = read_key("--api vllm", _KEY_VARIABLE)
        return get(self.config.port, path, timeout_s=timeout_s, key=key)

    # --- in a worker ---

    @cached_property
    def _requests(self) -> OpenAIClient:
        assert self.config.port is not None, "start_service() finds the port"
        return OpenAIClient(self.config.requests_config())


def _split(option: str, text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ConfigError(option, f"cannot be split into words: {error}") from error


def _check_arguments(arguments: list[str]) -> None:
    """Refuse what other options of ours give, shortened as argparse takes it, too."""
    for argument in arguments:
        if argument == "--":
            raise ConfigError("--vllm-args", "must not have --: further options follow")
        name = _option_name(argument)
        taken = next((one for one in _TAKEN if name.startswith("--") and one.startswith(name)), "")
        if name == "-t" or name.startswith("-tp"):
            taken = "--tensor-parallel-size"
        if taken:
            other = _TAKEN[taken]
            reason = f"give {other} instead" if other else f"the server listens on {LOCAL_HOST}"
            raise ConfigError("--vllm-args", f"must not have {name}: {reason}")


def _check_secrets(option: str, words: list[str]) -> None:
    """Refuse secrets, which records, logs and lists of processes would show."""
    names = map(_option_name, words)
    is_named = any(
        name.startswith(least) and secret.startswith(name)
        for name in names
        for secret, least in _SECRETS.items()
    )
    # What comes next is the value of an option at the end.
    followed = [*words, "next"]
    if is_named or redact_command_line(followed) != followed:
        raise ConfigError(
            option,
            "must not have keys or other secrets, which end up in logs; vLLM takes its key from "
            f"the environment variable {_KEY_VARIABLE}, and that of a hub from HF_TOKEN",
        )


def _option_name(argument: str) -> str:
    return argument.partition("=")[0].replace("_", "-")
