"""What is kept of a run: its row, its record, and the record of one that failed."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any

import torch

from flexbench.core import environment
from flexbench.core.errors import ConfigError, FlexbenchError, Interrupted, RunError
from flexbench.core.progress import Progress
from flexbench.core.results import (
    RECORD_SCHEMA_VERSION,
    ResultsFile,
    mixed_results_note,
    utc_now,
)
from flexbench.dist.kernels import decode_attention, linear
from flexbench.dist.log_file import append_log, check_log, log_path
from flexbench.dist.measurement import Measurement
from flexbench.dist.plan import DistPlan
from flexbench.ranks.launch import Launch

PACKAGES = ("torch", "numpy", "safetensors")
# What runs in one results file should have in common: its columns do not hold it.
_SUBJECT = (
    "model",
    "dtype",
    "percent",
    "compress_weight",
    "compress_cache",
    "attn_sparsity",
    "cpu_cache_compute",
    "overlap",
    "sep_layer",
    "async_comm",
    "cut_gen_len",
    "debug_mode",
)
_PLANNED = ("weights", "cache", "activations", "buffers", "temporaries")


class RunKeeper:
    """Writes what rank 0 keeps of a run: once, whatever comes first."""

    def __init__(self, plan: DistPlan, launch: Launch) -> None:
        self._results = ResultsFile(plan.config.output)
        self._log_path = log_path(plan.config, plan.model.name)
        self._sizes = plan.sizes
        self._is_first = launch.rank == 0
        self._lock = threading.Lock()
        self._is_kept = False
        self._record = _describe(plan, launch) if self._is_first else {}

    def check(self, progress: Progress) -> None:
        """On rank 0: raise ConfigError for what could not be written later."""
        if not self._is_first:
            return
        self._results.check()
        if self._log_path is not None:
            check_log(self._log_path)
        if other := self._results.other_subject(self._record["configuration"], _SUBJECT):
            progress.note(mixed_results_note(self._results.path, other))

    def keep(self, measurement: Measurement) -> None:
        """Append the run's record, and its row unless figures are projected.

        The row's columns have no place for that mark, and a report would take it as measured.
        """
        row = None if measurement.projection is not None else measurement.row()
        figures = {"figures": measurement.figures()}
        with self._lock:
            self._results.append(row, self._record | figures | measurement.observations())
            self._is_kept = True
        if self._log_path is not None:
            peak = max(stage.gpu_peak_bytes for stage in measurement.stages)
            sizes = {**self._sizes, "gpu_peak": peak}
            append_log(self._log_path, measurement.figures(), sizes)

    def keep_failure(self, error: FlexbenchError) -> None:
        """Append the record of a run that failed; mistakes in options and files are no runs."""
        is_run = error.exit_code != ConfigError.exit_code
        with self._lock:
            if is_run and self._is_first and not self._is_kept:
                self._is_kept = True
                with suppress(OSError):  # append_failure says so
                    self._results.path.parent.mkdir(parents=True, exist_ok=True)
                self._results.append_failure(self._record, error)

    @contextmanager
    def failures_kept(self) -> Iterator[None]:
        """Keep the record of a failure in this block."""
        try:
            yield
        except FlexbenchError as error:
            self.keep_failure(error)
            raise
        except KeyboardInterrupt:
            stopped = Interrupted(signal.SIGINT)
            self.keep_failure(stopped)
            raise stopped from None
        except Exception as error:
            self.keep_failure(RunError(f"{type(error).__name__}: {error}"))
            raise


def _describe(plan: DistPlan, launch: Launch) -> dict[str, Any]:
    config, dtype = plan.config, getattr(torch, plan.model.dtype)
    return {
        "schema_version": RECORD_SCHEMA_VERSION,
        "system": "dist",
        "status": "ok",
        "started_at": utc_now(),
        "run": {
            "gpu_batch_size": config.gpu_batch_size,
            "num_gpu_batches": config.num_gpu_batches,
            "num_inner_iterations": plan.num_inner_iterations,
            "num_pipeline_stages": plan.num_stages,
            "prompt_len": config.prompt_len,
            "gen_len": config.gen_len,
            "num_prompts": plan.num_prompts,
        },
        "model": asdict(plan.model)
        | {"weights": "dummy" if plan.is_dummy else "real", "seed": config.seed},
        "configuration": configuration_of(plan),
        "placement": [
            {
                "rank": stage.stage.rank,
                "layers": [stage.stage.layers.start, stage.stage.layers.stop],
                **{name: asdict(getattr(stage, name)) for name in _PLANNED},
            }
            for stage in plan.stages
        ],
        "device": "cuda" if plan.has_gpu else "cpu",
        "attention_kernel": decode_attention.describe(dtype, on_gpu=plan.has_gpu),
        "linear_kernel": linear.describe(dtype, on_gpu=plan.has_gpu),
        "backend": plan.backend,
        "launcher": launch.launcher,
        **environment.describe_run(PACKAGES),
        **({} if plan.search is None else {"policy_search": plan.search.as_json()}),
    }


def configuration_of(plan: DistPlan) -> dict[str, Any]:
    """The options, as JSON has them."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(plan.config), default=str))
    return values | {"model": plan.model.name, "dtype": plan.model.dtype}
