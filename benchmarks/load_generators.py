"""The load generators that benchmarks/serving_vs_peers.py compares, behind the same few methods.

A load generator has an environment of its own, is told a scenario on its command line, and leaves
files that say what it saw. Nothing here measures.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

INSTALL_TIMEOUT_S = 900
LOG = "log"  # in a run's folder: what the load generator said


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What is asked of a load generator, and how the server behaves."""

    name: str
    title: str
    concurrency: int
    output_tokens: int = 32
    ttft_ms: float = 50
    itl_ms: float = 5
    streaming: bool = True
    prompt_tokens: int = 64
    capacity: int | None = None
    is_search: bool = False
    """Whether the load generator is to find the saturation point itself."""
    duration_s: float = 8.0

    @property
    def request_s(self) -> float:
        """How long the server takes for a request that need not wait."""
        return (self.ttft_ms + (self.output_tokens - 1) * self.itl_ms) / 1e3

    @property
    def ideal_rate(self) -> float | None:
        """Requests/s if nothing takes time but the server's script; None: no limit."""
        places = min(self.concurrency, self.capacity or self.concurrency)
        return places / self.request_s if self.request_s else None


@dataclass(frozen=True, slots=True)
class Reported:
    """A request in a load generator's own words."""

    ttft_ms: float
    sent_at: float
    """By a clock of its own, in s: only the order matters."""
    request_id: str | None = None
    prompt_crc32: int | None = None


@dataclass(frozen=True, slots=True)
class SaturationPoint:
    """What a search found: so many streams, or so many requests/s."""

    streams: float | None = None
    rate_per_s: float | None = None


class LoadGenerator(Protocol):
    """One of those compared."""

    name: ClassVar[str]
    version: str

    def command(self, scenario: Scenario, url: str, folder: Path) -> list[str]:
        """Its command line; what it needs and what it leaves lies in `folder`."""

    def variables(self) -> dict[str, str]:
        """Environment variables that it needs."""

    def reported(self, folder: Path) -> list[Reported]:
        """The single requests that it saw; [] if it keeps none, or no streams."""

    def saturation_point(self, folder: Path) -> SaturationPoint:
        """What its search found."""


class NotInstalledError(Exception):
    """A load generator cannot be had here; says why."""


# --- environments of their own ---


def install(package: str, environments: Path, python: str) -> tuple[Path, str]:
    """The programs' folder and the version of a package, newest when its environment was made.

    Raises NotInstalledError.
    """
    environment = environments / package
    programs = environment / "bin"
    if not (environment / "installed").exists():
        print(f"installing {package} into {environment}", file=sys.stderr, flush=True)
        _run([python, "-m", "venv", "--clear", str(environment)], f"no environment for {package}")
        pip = [str(programs / "python"), "-m", "pip", "install", "--quiet", package]
        _run([*pip, "--disable-pip-version-check"], f"{package} cannot be installed")
        (environment / "installed").touch()
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    version = _run([str(programs / "python"), "-c", code], f"{package} has no version").strip()
    return programs, version


def _run(command: list[str], problem: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotInstalledError(f"{problem}: {error}") from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["?"]
        raise NotInstalledError(f"{problem}: {lines[-1]}")
    return done.stdout


def write_tokenizer(folder: Path) -> Path:
    """A tokenizer as Hugging Face's libraries load it from a folder: every byte is a token."""
    folder.mkdir(parents=True, exist_ok=True)
    # ByteLevel shows bytes that are no visible characters as those from 256 on.
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    vocabulary = {chr(b if b in visible else next(others)): b for b in range(256)}
    end = {"id": 256, "content": "<|end|>", "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end | flags],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary | {"<|end|>": 256}, "merges": []},
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "model_max_length": 100_000,
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    return folder


_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


# --- the load generators ---


class Flexbench:
    """The one in this repository."""

    name: ClassVar[str] = "flexbench"

    def __init__(self) -> None:
        from flexbench import __version__

        self.version = __version__

    def command(self, scenario: Scenario, url: str, folder: Path) -> list[str]:
        """As a user would type it, with the byte tokenizer."""
        load = (
            ["--saturation"]
            if scenario.is_search
            else [
                *("--quiet", "--num-clients", str(scenario.concurrency)),
                *("--duration", f"{scenario.duration_s:g}s"),
            ]
        )
        return [
            *(str(Path(sys.executable).with_name("flexbench")), "serving", "--api", "openai"),
            *("--api-url", url, "--model", "m", "--tokenizer", "byte", *load),
            *("--prompt-length", str(scenario.prompt_tokens), "--prompt-length-var", "0"),
            *("--max-new-tokens", str(scenario.output_tokens), "--max-new-tokens-var", "0"),
            *("--streaming" if scenario.streaming else "--no-streaming", "--force"),
            *("--result-dir", str(folder / "results"), "--early-stop-latency", "0"),
        ]

    def variables(self) -> dict[str, str]:
        """None."""
        return {}

    def reported(self, folder: Path) -> list[Reported]:
        """From the point's file: columns, and a row for each request."""
        found = []
        for path in sorted((folder / "results").glob("*.json")):
            record = json.loads(path.read_bytes())
            if "requests" not in record:  # the curve, which has none of its own
                continue
            released, columns = record["released_at_ns"], record["requests"]["columns"]
            for row in record["requests"]["rows"]:
                request = dict(zip(columns, row, strict=True))
                sent, content = request["sent_ns"], request["content_ns"]
                if content:
                    found.append(Reported((content[0] - sent) / 1e6, (released + sent) / 1e9))
        return found

    def saturation_point(self, folder: Path) -> SaturationPoint:
        """From what it says."""
        found = re.search(r"It saturates at ([\d.]+) client", (folder / LOG).read_text())
        if found is None:
            raise KeyError("it did not say a saturation point")
        return SaturationPoint(streams=float(found[1]))


class GuideLLM:
    """Github: vllm-project/guidellm."""

    name: ClassVar[str] = "guidellm"

    def __init__(self, environments: Path, python: str) -> None:
        self._programs, self.version = install("guidellm", environments, python)
        self._tokenizer = write_tokenizer(environments / "tokenizer")

    def command(self, scenario: Scenario, url: str, folder: Path) -> list[str]:
        """Synthetic text of the same lengths."""
        backend: dict[str, Any] = {
            "kind": "openai_http",
            "target": url,
            "model": "m",
            "request_format": "/v1/completions",
            "stream": scenario.streaming,
        }
        profile: dict[str, Any] = {"kind": "concurrent", "streams": scenario.concurrency}
        if scenario.is_search:
            streams = [1, 2, 4, 8, 16, 32]
            profile = {"kind": "knee", "initial_streams": streams, "adaptive": True}
        data = {
            "kind": "synthetic_text",
            "prompt_tokens": scenario.prompt_tokens,
            "output_tokens": scenario.output_tokens,
        }
        return [
            *(str(self._programs / "guidellm"), "run", "--disable-console"),
            *("--backend", json.dumps(backend), "--profile", json.dumps(profile)),
            *("--constraint", f"kind=max_duration,seconds={scenario.duration_s:g}"),
            *("--tokenizer", f"kind=hf_auto,model={self._tokenizer}", "--data", json.dumps(data)),
            *("--output", f"kind=json,path={folder / 'report.json'}"),
        ]

    def variables(self) -> dict[str, str]:
        """No hub."""
        return _OFFLINE

    def reported(self, folder: Path) -> list[Reported]:
        """From its report, which has the prompts."""
        found = []
        report = json.loads((folder / "report.json").read_bytes())
        for benchmark in report["benchmarks"]:
            for request in benchmark["requests"]["successful"]:
                timings = request["info"]["timings"]
                first = timings.get("first_token_iteration")
                if first is None:
                    continue
                prompt = json.loads(request["request_args"])["body"]["prompt"]
                sent = timings["request_start"]
                found.append(Reported((first - sent) * 1e3, sent, prompt_crc32=crc32(prompt)))
        return found

    def saturation_point(self, folder: Path) -> SaturationPoint:
        """From its conclusions."""
        report = json.loads((folder / "report.json").read_bytes())
        for conclusion in report["conclusions"]:
            if conclusion.get("kind") == "knee_detection":
                # After the refinement; before it, it has one as well ("initial").
                return SaturationPoint(streams=conclusion["final"]["throughput"]["knee"])
        raise KeyError("no conclusion about a knee")


class AIPerf:
    """Github: ai-dynamo/aiperf."""

    name: ClassVar[str] = "aiperf"

    def __init__(self, environments: Path, python: str) -> None:
        self._programs, self.version = install("aiperf", environments, python)
        self._tokenizer = write_tokenizer(environments / "tokenizer")

    def command(self, scenario: Scenario, url: str, folder: Path) -> list[str]:
        """Synthetic prompts of the same lengths."""
        load = ["--concurrency", str(scenario.concurrency)]
        if scenario.is_search:
            load = [
                *("--search-recipe", "max-concurrency-under-sla", "--search-style", "monotonic"),
                # It does not search without one: requests that need not wait meet this one.
                *("--ttft-sla-ms", f"{2 * scenario.ttft_ms:g}"),
                *("--concurrency-min", "1", "--concurrency-max", str(scenario.concurrency)),
            ]
        return [
            *(str(self._programs / "aiperf"), "profile", "-m", "m", "--url", url),
            *("--endpoint-type", "completions", "--tokenizer", str(self._tokenizer), *load),
            *("--benchmark-duration", f"{scenario.duration_s:g}", "--use-legacy-max-tokens"),
            *("--isl", str(scenario.prompt_tokens), "--osl", str(scenario.output_tokens)),
            *("--ui", "none", "--no-gpu-telemetry", "--no-server-metrics"),
            *("--artifact-dir", str(folder / "artifacts")),
            *(["--streaming"] if scenario.streaming else []),
        ]

    def variables(self) -> dict[str, str]:
        """None: told to be offline, it does not look at a folder."""
        return {}

    def reported(self, folder: Path) -> list[Reported]:
        """From its records, whose ids are in the requests' headers."""
        found = []
        for path in folder.rglob("profile_export.jsonl"):
            for line in path.read_text().splitlines():
                record = json.loads(line)
                ttft = record["metrics"].get("time_to_first_token")
                if ttft is None:
                    continue
                about = record["metadata"]
                sent = about["request_start_ns"] / 1e9
                found.append(Reported(ttft["value"], sent, request_id=about["x_request_id"]))
        return found

    def saturation_point(self, folder: Path) -> SaturationPoint:
        """The most streams that met the condition, from the history of its search."""
        history = json.loads((folder / "artifacts" / "search_history.json").read_bytes())
        feasible = (
            step["variation_values"]["phases.profiling.concurrency"]
            for step in history["iterations"]
            if step["feasible"]
        )
        return SaturationPoint(streams=max(feasible))


class InferencePerf:
    """Github: kubernetes-sigs/inference-perf."""

    name: ClassVar[str] = "inference-perf"

    def __init__(self, environments: Path, python: str) -> None:
        self._programs, self.version = install("inference-perf", environments, python)
        self._tokenizer = write_tokenizer(environments / "tokenizer")

    def command(self, scenario: Scenario, url: str, folder: Path) -> list[str]:
        """A file with its configuration. It counts requests instead of time."""
        num_requests = int((scenario.ideal_rate or 1250) * scenario.duration_s)
        load: dict[str, Any] = {
            "type": "concurrent",
            "num_workers": 1,  # there is one core
            "worker_max_concurrency": scenario.concurrency,
            "stages": [{"num_requests": num_requests, "concurrency_level": scenario.concurrency}],
        }
        if scenario.is_search:
            sweep = {"type": "linear", "num_requests": 400, "timeout": 30, "num_stages": 1}
            sweep["stage_duration"] = int(scenario.duration_s)
            load = {"type": "constant", "num_workers": 1, "sweep": sweep}
        # JSON is YAML.
        config = {
            "api": {"type": "completion", "streaming": scenario.streaming},
            "data": {
                "type": "synthetic",
                "input_distribution": _fixed(scenario.prompt_tokens, num_requests),
                "output_distribution": _fixed(scenario.output_tokens, num_requests),
            },
            "load": load,
            "server": {"type": "vllm", "model_name": "m", "base_url": url, "ignore_eos": True},
            "tokenizer": {"pretrained_model_name_or_path": str(self._tokenizer)},
            "report": {
                "request_lifecycle": {"summary": True, "per_stage": True, "per_request": True}
            },
            "storage": {"local_storage": {"path": str(folder / "reports")}},
        }
        path = folder / "config.yml"
        path.write_text(json.dumps(config))
        return [str(self._programs / "inference-perf"), "--config_file", str(path)]

    def variables(self) -> dict[str, str]:
        """No hub."""
        return _OFFLINE

    def reported(self, folder: Path) -> list[Reported]:
        """From its report, which has the prompts."""
        path = folder / "reports" / "per_request_lifecycle_metrics.json"
        found = []
        for record in json.loads(path.read_bytes()):
            metrics = record["info"].get("response_metrics") or {}
            times = metrics.get("output_token_times")
            if not times or not metrics.get("response_chunks"):
                continue
            prompt = json.loads(record["request"])["prompt"]
            sent = record["start_time"]
            found.append(Reported((times[0] - sent) * 1e3, sent, prompt_crc32=crc32(prompt)))
        return found

    def saturation_point(self, folder: Path) -> SaturationPoint:
        """From what it says: its files have the stages up to there, but not the point."""
        found = re.search(r"Saturation point estimated at ([\d.]+)", (folder / LOG).read_text())
        if found is None:
            raise KeyError("it did not say a saturation point")
        return SaturationPoint(rate_per_s=float(found[1]))


def _fixed(length: int, count: int) -> dict[str, Any]:
    same = dict.fromkeys(("mean", "min", "max"), length)
    return {"type": "fixed", **same, "std_dev": 0, "total_count": count}


def crc32(prompt: str) -> int:
    """As the server notes it of a prompt."""
    return zlib.crc32(prompt.encode())
