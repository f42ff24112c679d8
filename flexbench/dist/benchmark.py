"""The benchmark on one rank: meet the others, load, warm up, measure; rank 0 keeps the results."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np
import torch

from flexbench.core import environment
from flexbench.core.errors import Interrupted
from flexbench.core.progress import Progress
from flexbench.dist.homes import ExecutionEnv
from flexbench.dist.measurement import Measurement, Projection, StageReport
from flexbench.dist.pipeline import DistOptLM
from flexbench.dist.plan import DistPlan
from flexbench.dist.record import RunKeeper
from flexbench.dist.roofline.comparison import compare
from flexbench.dist.roofline.together import CeilingsOfRun
from flexbench.dist.schedule import Workload
from flexbench.dist.stage import fingerprint, load_stage, meet, open_stage
from flexbench.dist.task import IntArray
from flexbench.ranks.backstop import Backstop
from flexbench.ranks.launch import Launch
from flexbench.ranks.watch import LONGEST_RUN_S, PeerWatch

# A signal may come a little before the news of the rank that was lost.
_CAUSE_S = 0.1
_FIRST_REAL_TOKEN = 4  # OPT's tokens 0 to 3 are special
_WARMUP_TOKENS = 2  # one of the prefill, one of decoding


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run gave, on rank 0: figures and tokens. Nothing is kept until `keep` is called."""

    measurement: Measurement
    output_ids: IntArray
    keep: Callable[[], None]
    """Append to the results and to the log. Raises FlexbenchError when they cannot be written."""


def run_benchmark(
    plan: DistPlan,
    launch: Launch,
    *,
    head_ip: str | None = None,
    port: int | None = None,
    progress: Progress,
) -> Outcome | None:
    """Measure the plan together with all other ranks; None on all but rank 0.

    Raises ConfigError and InputFileError before anything is allocated, RunError naming the rank
    when one is lost, Interrupted when told to stop; the record of such a run is kept.
    """
    num_threads = torch.get_num_threads()
    keeper = RunKeeper(plan, launch)
    try:
        with keeper.failures_kept(), Backstop(launch, keeper.keep_failure) as backstop:
            watch = PeerWatch(
                launch,
                purpose="dist",
                head_ip=head_ip,
                port=port,
                timeout_s=plan.config.comm_timeout_s,
                fingerprint=fingerprint(plan),
                on_lost=backstop.on_lost,
            )
            backstop.also(watch.report)
            try:
                return _meet_and_run(plan, launch, watch, keeper, progress)
            except BaseException as error:
                if backstop.lost is None:
                    raise
                raise backstop.error() from error
    finally:
        torch.set_num_threads(num_threads)


def _meet_and_run(
    plan: DistPlan, launch: Launch, watch: PeerWatch, keeper: RunKeeper, progress: Progress
) -> Outcome | None:
    with ExitStack() as stack:
        if launch.world_size > 1:
            with progress.phase(f"Waiting for {launch.world_size} ranks", total=1):
                stack.enter_context(watch)
        try:
            keeper.check(progress)
            with open_stage(plan, launch, watch) as env:
                return _run(plan, launch, watch, env, keeper, progress)
        except (Interrupted, KeyboardInterrupt):
            # A launcher stops all ranks when one has died: that is what people want to know.
            watch.wait_for_loss(_CAUSE_S)
            raise


def _run(
    plan: DistPlan,
    launch: Launch,
    watch: PeerWatch,
    env: ExecutionEnv,
    keeper: RunKeeper,
    progress: Progress,
) -> Outcome | None:
    ceilings = CeilingsOfRun(plan, launch, watch, env, progress)
    ceilings.measure("before")
    model = load_stage(plan, launch, env, progress)
    environment.reset_peak_resident_bytes()  # checkpoints are mapped while they are read
    try:
        output_ids = _warm_up_and_run(plan, launch, watch, model, progress)
        report = _report(plan, launch, env, model)
    finally:
        model.close()
    ceilings.measure("after")
    watch.publish("report", asdict(replace(report, ceilings=ceilings.best)))
    if launch.rank != 0:
        return None
    reports = watch.collect("report", LONGEST_RUN_S)
    stages = [StageReport.from_json(reports[rank]) for rank in sorted(reports)]
    measurement = _measurement(plan, stages, model, output_ids)
    return Outcome(
        measurement=measurement,
        output_ids=output_ids,
        keep=lambda: keeper.keep(measurement),
    )


def _warm_up_and_run(
    plan: DistPlan, launch: Launch, watch: PeerWatch, model: DistOptLM, progress: Progress
) -> IntArray:
    config = plan.config
    generate = partial(
        model.generate,
        _prompts(plan),
        do_sample=config.do_sample,
        temperature=config.temperature,
        debug_mode=config.debug_mode,
        seed=config.seed,
    )
    num_warmup = min(_WARMUP_TOKENS, config.gen_len)
    with progress.phase("Warm-up", total=num_warmup * plan.num_inner_iterations) as phase:
        model.on_unit = phase.advance
        generate(max_new_tokens=num_warmup)
    if model.env.has_gpu:
        torch.cuda.reset_peak_memory_stats(model.env.gpu.device)
    meet(watch, launch, "warm-up")
    with progress.phase("Run", total=config.num_tokens * plan.num_inner_iterations) as phase:
        model.on_unit = phase.advance
        return generate(
            max_new_tokens=config.gen_len, stop=config.stop, cut_gen_len=config.cut_gen_len
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
        num_threads=torch.get_num_threads(),
        layers=(layers.start, layers.stop),
        wall_s=times.wall_s,
        compute_s=times.compute_s,
        prefill_compute_s=times.prefill_compute_s,
        decode_compute_s=times.decode_compute_s,
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
        timeline=times.timeline.spans(times.started_at, times.started_at + times.wall_s),
        disk_access=env.disk.access if plan.stages[launch.rank].total.disk else None,
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
        roofline=compare(plan, stages),
    )


def _count_generated(new_ids: IntArray, stop: int | None) -> int:
    """Tokens up to the stop token of each prompt, that one included."""
    if stop is None:
        return int(new_ids.size)
    is_stop = new_ids == stop
    lengths = np.where(is_stop.any(axis=1), is_stop.argmax(axis=1) + 1, new_ids.shape[1])
    return int(lengths.sum())
