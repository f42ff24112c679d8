"""The benchmark on one rank: meet the others, load, warm up, measure; rank 0 keeps the results."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from flexbench import __version__
from flexbench.core import environment
from flexbench.core.errors import ConfigError, FlexbenchError, RunError
from flexbench.core.progress import Progress
from flexbench.core.results import RECORD_SCHEMA_VERSION, ResultsFile, mixed_results_note, utc_now
from flexbench.core.units import format_bytes
from flexbench.dist.homes import ExecutionEnv, TorchDisk
from flexbench.dist.launch import Launch
from flexbench.dist.log_file import append_log, check_log, log_path
from flexbench.dist.measurement import Measurement, Projection, StageReport
from flexbench.dist.partition import Balance
from flexbench.dist.pipeline import DistOptLM
from flexbench.dist.placement import HomeBytes
from flexbench.dist.plan import DistPlan
from flexbench.dist.process_group import open_process_group
from flexbench.dist.rank import Backstop, num_threads
from flexbench.dist.schedule import Workload
from flexbench.dist.task import IntArray
from flexbench.dist.watch import PeerWatch

PACKAGES = ("torch", "numpy", "safetensors")
# Ranks end their part of a run at about the same time, but a run may take days; that they are
# alive is the watch's business.
_LONGEST_RUN_S = 30 * 24 * 3600.0
_FIRST_REAL_TOKEN = 4  # OPT's tokens 0 to 3 are special
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
_WARMUP_TOKENS = 2  # one of the prefill, one of decoding


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run gave: figures, and the tokens."""

    measurement: Measurement
    output_ids: IntArray


def run_benchmark(
    plan: DistPlan,
    launch: Launch,
    *,
    head_ip: str | None = None,
    port: int | None = None,
    progress: Progress,
) -> Outcome | None:
    """Measure the plan together with all other ranks; rank 0 writes the results and returns them.

    Raises ConfigError before anything is allocated, RunError naming the rank when one is lost,
    Interrupted when told to stop.
    """
    results = ResultsFile(plan.config.output)
    log = log_path(plan.config, plan.model.name)
    if launch.rank == 0:
        results.check()
        if log is not None:
            check_log(log)
        if other := results.other_subject(_configuration(plan), _SUBJECT):
            progress.note(mixed_results_note(results.path, other))
    torch.set_num_threads(num_threads(launch))
    keeper = _Keeper(plan, launch, results)
    with keeper.failures_kept(), Backstop(keeper.keep_failure) as backstop:
        try:
            outcome = _meet_and_run(plan, launch, backstop, head_ip, port, progress)
        except BaseException as error:
            if backstop.lost is None:
                raise
            raise backstop.error() from error
    if outcome is None:
        return None
    keeper.keep(outcome.measurement)
    if log is not None:
        append_log(log, outcome.measurement.figures(), _sizes(plan, outcome.measurement))
    return outcome


def _meet_and_run(
    plan: DistPlan,
    launch: Launch,
    backstop: Backstop,
    head_ip: str | None,
    port: int | None,
    progress: Progress,
) -> Outcome | None:
    watch = PeerWatch(
        launch,
        head_ip=head_ip,
        port=port,
        timeout_s=plan.config.comm_timeout_s,
        fingerprint=_fingerprint(plan),
        on_lost=backstop.on_lost,
    )
    with ExitStack() as stack:
        if launch.world_size > 1:
            with progress.phase(f"Waiting for {launch.world_size} ranks", total=1):
                stack.enter_context(watch)
        if not plan.config.allow_overcommit:
            check_room(plan, launch)
        _meet(watch, launch, "room")
        env = ExecutionEnv.create(plan.config.offload_dir, local_rank=launch.local_rank)
        if env.has_gpu:
            torch.cuda.set_device(env.gpu.device)
        with open_process_group(watch, launch, backend=plan.backend), _memory_errors():
            return _run(plan, launch, watch, env, progress)


def _meet(watch: PeerWatch, launch: Launch, where: str) -> None:
    """Wait until all ranks are here."""
    watch.publish(where, None)
    if launch.rank == 0:
        watch.collect(where, _LONGEST_RUN_S)
    watch.share(f"{where}: go on", None, _LONGEST_RUN_S)


def _run(
    plan: DistPlan, launch: Launch, watch: PeerWatch, env: ExecutionEnv, progress: Progress
) -> Outcome | None:
    config = plan.config
    prompts = _prompts(plan)
    model = _load(plan, launch, env, progress)
    environment.reset_peak_resident_bytes()  # checkpoints are mapped while they are read
    try:
        generate = partial(
            model.generate,
            prompts,
            do_sample=config.do_sample,
            temperature=config.temperature,
            debug_mode=config.debug_mode,
            seed=config.seed,
        )
        num_warmup = min(_WARMUP_TOKENS, config.gen_len)
        with progress.phase("Warm-up", total=num_warmup * plan.num_inner_iterations) as phase:
            model.on_unit = phase.advance
            generate(max_new_tokens=num_warmup)
        if env.has_gpu:
            torch.cuda.reset_peak_memory_stats()
        _meet(watch, launch, "warm-up")
        with progress.phase("Run", total=config.num_tokens * plan.num_inner_iterations) as phase:
            model.on_unit = phase.advance
            output_ids = generate(
                max_new_tokens=config.gen_len, stop=config.stop, cut_gen_len=config.cut_gen_len
            )
        watch.publish("report", asdict(_report(plan, launch, env, model)))
        if launch.rank != 0:
            return None
        reports = watch.collect("report", _LONGEST_RUN_S)
        stages = [StageReport.from_json(reports[rank]) for rank in sorted(reports)]
        return Outcome(
            measurement=_measurement(plan, stages, model, output_ids), output_ids=output_ids
        )
    finally:
        model.close()


def _load(plan: DistPlan, launch: Launch, env: ExecutionEnv, progress: Progress) -> DistOptLM:
    config = plan.config
    stage = plan.stages[launch.rank].stage
    num_layers = len(stage.layers) * (2 if plan.policy.sep_layer else 1)
    with progress.phase(
        "Loading weights", total=num_layers + stage.is_first + stage.is_last
    ) as phase:
        return DistOptLM(
            plan.model,
            env,
            plan.weights_path,
            plan.policy,
            launch.rank,
            plan.num_stages,
            config.comm_device,
            plan.num_inner_iterations,
            config.async_comm,
            balance=Balance(config.balance),
            weight_seed=config.seed,
            on_layer=phase.advance,
        )


def _prompts(plan: DistPlan) -> IntArray:
    """Random tokens, other ones in every prompt, the same on every rank."""
    vocabulary = plan.model.vocab_size
    low = min(_FIRST_REAL_TOKEN, vocabulary - 1)
    shape = (plan.num_prompts, plan.config.prompt_len)
    prompts = np.random.default_rng(plan.config.seed).integers(low, vocabulary, shape)
    # With a tiny vocabulary the padding token may be among them, which would not be attended to.
    return np.where(prompts == plan.model.pad_token_id, 0, prompts)


def _report(plan: DistPlan, launch: Launch, env: ExecutionEnv, model: DistOptLM) -> StageReport:
    times = model.times
    layers = plan.stages[launch.rank].stage.layers
    device = env.gpu.device
    gpu_peak = torch.cuda.max_memory_allocated(device) if env.has_gpu else env.gpu.ledger.peak_bytes
    return StageReport(
        rank=launch.rank,
        layers=(layers.start, layers.stop),
        wall_s=times.wall_s,
        compute_s=times.compute_s,
        weight_load_s=times.busy_s["weight"],
        cache_load_s=times.busy_s["cache_load"],
        cache_store_s=times.busy_s["cache_store"],
        hidden_s=times.busy_s["hidden"],
        stalled_s=times.stalled_s,
        send_s=times.send_s,
        receive_s=times.receive_s,
        gpu_peak_bytes=gpu_peak,
        cpu_peak_bytes=environment.peak_resident_bytes(),
        disk_peak_bytes=env.disk.ledger.peak_bytes,
        prefill_layer_s=times.layer_seconds(is_prefill=True),
        decode_layer_s=times.layer_seconds(is_prefill=False),
        token_ends_s=tuple(times.token_ends),
    )


def _measurement(
    plan: DistPlan, stages: list[StageReport], model: DistOptLM, output_ids: IntArray
) -> Measurement:
    config = plan.config
    projection = None
    if config.is_projected:
        projection = Projection(
            num_tokens=config.num_tokens, gen_len=config.gen_len, layers=model.projected_layers
        )
    return Measurement(
        num_prompts=plan.num_prompts,
        gpu_batch_size=config.gpu_batch_size,
        num_micro_batches=config.num_gpu_batches * plan.num_inner_iterations,
        prompt_len=config.prompt_len,
        gen_len=config.gen_len,
        generated_tokens=_count_generated(output_ids[:, config.prompt_len :], config.stop),
        workload=Workload(
            num_rounds=1,
            num_tokens=config.num_tokens,
            num_iterations=plan.num_inner_iterations,
            num_layers=1,
            num_batches=config.num_gpu_batches,
        ),
        stages=stages,
        projection=projection,
    )


def _count_generated(new_ids: IntArray, stop: int | None) -> int:
    """Tokens up to the stop token of each prompt, that one included."""
    if stop is None:
        return int(new_ids.size)
    is_stop = new_ids == stop
    lengths = np.where(is_stop.any(axis=1), is_stop.argmax(axis=1) + 1, new_ids.shape[1])
    return int(lengths.sum())


# --- before anything is allocated ---


def check_room(plan: DistPlan, launch: Launch) -> None:
    """Raise ConfigError unless what the ranks will hold fits into what is free.

    Each rank looks at its GPU; the first on a host at memory and disk, for all of them there.
    """
    if plan.has_gpu:
        own = plan.stages[launch.rank].total
        free, _ = torch.cuda.mem_get_info(launch.local_rank % torch.cuda.device_count())
        _check_fits("the GPU", own.gpu, free)
    if launch.local_rank > 0:
        return
    local = plan.stages[launch.rank : launch.rank + launch.local_world_size]
    needed = sum((stage.total for stage in local), HomeBytes())
    if needed.disk:
        folder = plan.config.offload_dir
        TorchDisk(folder).check()
        free = shutil.disk_usage(folder.expanduser()).free
        _check_fits(f"the disk of {folder}", needed.disk, free)
    on_host = needed.cpu if plan.has_gpu else needed.cpu + needed.gpu
    _check_fits("memory", on_host, environment.available_memory_bytes())


def _check_fits(where: str, needed: int, free: int | None) -> None:
    if free is not None and needed > free:
        raise ConfigError(
            "--percent",
            f"{where} has {format_bytes(free)} free, and the placement takes "
            f"{format_bytes(needed)}; choose other percentages, smaller batches, or start anyway "
            "with --allow-overcommit",
        )


def _fingerprint(plan: DistPlan) -> str:
    """What has to be the same on all ranks, hashed. Folders may differ from host to host."""
    local = ("offload_dir", "output", "log_file", "no_log", "verbose", "path", "model")
    config = {name: value for name, value in asdict(plan.config).items() if name not in local}
    model = asdict(plan.model) | {"name": None}
    described = json.dumps([__version__, config, model, plan.is_dummy], default=str, sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()


@contextmanager
def _memory_errors() -> Iterator[None]:
    """Torch has no error of its own for a CPU without memory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text:
            raise RunError(f"out of memory: {text.partition(chr(10))[0]}") from error
        raise


# --- afterwards ---


class _Keeper:
    """Writes the record of a run on rank 0: once, whatever comes first."""

    def __init__(self, plan: DistPlan, launch: Launch, results: ResultsFile) -> None:
        self._results = results
        self._is_first = launch.rank == 0
        self._lock = threading.Lock()
        self._is_kept = False
        self._record = _describe(plan, launch) if self._is_first else {}

    def keep(self, measurement: Measurement) -> None:
        """Append the run's row and record."""
        with self._lock:
            self._is_kept = True
            self._results.append(
                measurement.row(),
                self._record | {"figures": measurement.figures()} | measurement.observations(),
            )

    def keep_failure(self, error: FlexbenchError) -> None:
        """Append the record of a run that failed."""
        with self._lock:
            if self._is_first and not self._is_kept:
                self._is_kept = True
                self._results.append_failure(self._record, error)

    @contextmanager
    def failures_kept(self) -> Iterator[None]:
        """Keep the record of a failure in this block; mistakes in options are no runs."""
        try:
            yield
        except FlexbenchError as error:
            if error.exit_code != ConfigError.exit_code:
                self.keep_failure(error)
            raise
        except Exception as error:
            self.keep_failure(RunError(f"{type(error).__name__}: {error}"))
            raise


def _describe(plan: DistPlan, launch: Launch) -> dict[str, Any]:
    config = plan.config
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
        "configuration": _configuration(plan),
        "placement": [
            {
                "rank": stage.stage.rank,
                "layers": [stage.stage.layers.start, stage.stage.layers.stop],
                **{name: asdict(getattr(stage, name)) for name in _PLANNED},
            }
            for stage in plan.stages
        ],
        "device": "cuda" if plan.has_gpu else "cpu",
        "backend": plan.backend,
        "launcher": launch.launcher,
        "num_threads": torch.get_num_threads(),
        **environment.describe_run(PACKAGES),
    }


def _configuration(plan: DistPlan) -> dict[str, Any]:
    """The options, as JSON has them."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(plan.config), default=str))
    return values | {"model": plan.model.name, "dtype": plan.model.dtype}


def _sizes(plan: DistPlan, measurement: Measurement) -> dict[str, int]:
    """The sizes that FlexGen's log has."""
    peak = max(stage.gpu_peak_bytes for stage in measurement.stages)
    return {**plan.sizes, "gpu_peak": peak}
