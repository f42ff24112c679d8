"""Serving on one rank: rank 0 takes requests and gives blocks of prompts to all, until the end."""

from __future__ import annotations

import sys
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass

from flexbench.core.checks import check_count
from flexbench.core.errors import Interrupted, RunError
from flexbench.core.progress import Progress
from flexbench.dist.batching import Batch, check_batch_wait, fill_up
from flexbench.dist.completions import Limits
from flexbench.dist.front import Front
from flexbench.dist.pipeline import DistOptLM
from flexbench.dist.plan import DistPlan
from flexbench.dist.stage import fingerprint, load_stage, meet, open_stage
from flexbench.dist.task import IntArray
from flexbench.dist.text import open_codec
from flexbench.ranks.backstop import Backstop
from flexbench.ranks.launch import MAX_PORT, Launch
from flexbench.ranks.watch import LONGEST_RUN_S, LostRank, PeerWatch
from flexbench.ranks.wording import describe_failure

# A signal may come a little before the news of the rank that was lost.
_CAUSE_S = 0.1
_LOOK_EVERY_S = 0.4
_SWITCH_S = 0.0002
_WARMUP_TOKENS = 2  # one of the prefill, one of decoding
_BLOCK = "the next block of prompts"


@dataclass(frozen=True, kw_only=True)
class ServiceConfig:
    """What there is to say of the service beside its plan.

    Raises ConfigError for values that cannot work.
    """

    port: int = 0
    """0: a free one."""
    served_name: str
    """The model's name in requests."""
    batch_wait_s: float = 0.01
    """How long a block that has its first prompt waits for more."""

    def __post_init__(self) -> None:
        """Check every value."""
        check_count("--port", self.port, minimum=0, maximum=MAX_PORT)
        check_batch_wait(self.batch_wait_s)


def run_service(
    plan: DistPlan, launch: Launch, config: ServiceConfig, *, progress: Progress
) -> None:
    """Serve until a signal or the loss of a rank; so it always ends by raising.

    Raises ConfigError and InputFileError before anything is allocated, RunError naming the rank
    when one is lost, Interrupted when told to stop. Who still waits for an answer is told why.
    """
    front = None
    if launch.rank == 0:
        front = _open_front(plan, config)
        # Tokens are to be on their way as soon as they are there, while the next are computed.
        sys.setswitchinterval(_SWITCH_S)
    with front or nullcontext():

        def tell(reason: str) -> None:
            if front is not None:
                front.app.fail(reason)

        with Backstop(launch, lambda error: tell(error.message)) as backstop:

            def on_lost(lost: LostRank) -> None:
                tell(lost.message)
                backstop.on_lost(lost)

            watch = PeerWatch(
                launch,
                purpose="dist service",
                head_ip=None,
                port=None,
                timeout_s=plan.config.comm_timeout_s,
                fingerprint=fingerprint(plan),
                on_lost=on_lost,
            )
            backstop.also(watch.report)
            try:
                _meet_and_serve(plan, launch, watch, config, front, progress)
            except BaseException as error:
                if backstop.lost is None:
                    tell(f"the service {describe_failure(error)}")
                    raise
                raise backstop.error() from error


def _open_front(plan: DistPlan, config: ServiceConfig) -> Front:
    model = plan.model
    return Front(
        port=config.port,
        model_name=config.served_name,
        codec=open_codec(None if plan.is_dummy else plan.folder, model.vocab_size),
        limits=Limits(
            vocab_size=model.vocab_size,
            pad_token_id=model.pad_token_id,
            max_prompt_tokens=plan.config.prompt_len,
            max_new_tokens=plan.config.gen_len,
        ),
    )


def _meet_and_serve(
    plan: DistPlan,
    launch: Launch,
    watch: PeerWatch,
    config: ServiceConfig,
    front: Front | None,
    progress: Progress,
) -> None:
    with ExitStack() as stack:
        if launch.world_size > 1:
            with progress.phase(f"Waiting for {launch.world_size} ranks", total=1):
                stack.enter_context(watch)
        try:
            env = stack.enter_context(open_stage(plan, launch, watch))
            model = load_stage(plan, launch, env, progress)
            stack.callback(model.close)
            _warm_up(model, plan, progress)
            meet(watch, launch, "ready")
            if front is None:
                _follow(model, plan, watch)
            else:
                front.set_ready()
                progress.note(f"Listening at {front.url}")
                _lead(model, plan, watch, front, config)
        except (Interrupted, KeyboardInterrupt):
            # A launcher stops all ranks when one has died: that is what people want to know.
            watch.wait_for_loss(_CAUSE_S)
            raise


def _warm_up(model: DistOptLM, plan: DistPlan, progress: Progress) -> None:
    length = min(plan.config.prompt_len, 8)
    # No token of a prompt may be padding alone, and 0 is none.
    token = 0 if plan.model.pad_token_id else 1
    with progress.phase("Warm-up", total=1):
        _generate(model, plan, [[token] * length], min(_WARMUP_TOKENS, plan.config.gen_len))


def _lead(
    model: DistOptLM, plan: DistPlan, watch: PeerWatch, front: Front, config: ServiceConfig
) -> None:
    while True:
        jobs = front.queue.take(
            plan.num_prompts, fill_s=config.batch_wait_s, timeout_s=_LOOK_EVERY_S
        )
        if watch.lost is not None:
            raise RunError(watch.lost.message)
        if not jobs:
            continue
        batch = Batch(jobs, front.app.deliver)
        order = {"prompts": batch.prompts, "max_new_tokens": batch.max_new_tokens}
        watch.share(_BLOCK, order, LONGEST_RUN_S)
        model.on_tokens = lambda prompts, token, ids, batch=batch: batch.put(
            prompts, token, ids.tolist()
        )
        output_ids = _generate(model, plan, batch.prompts, batch.max_new_tokens)
        batch.finish(output_ids[:, -batch.max_new_tokens :].tolist())


def _follow(model: DistOptLM, plan: DistPlan, watch: PeerWatch) -> None:
    while True:
        order = watch.share(_BLOCK, None, LONGEST_RUN_S)
        _generate(model, plan, order["prompts"], order["max_new_tokens"])


def _generate(
    model: DistOptLM, plan: DistPlan, prompts: list[list[int]], max_new_tokens: int
) -> IntArray:
    return model.generate(fill_up(prompts, plan.num_prompts), max_new_tokens)
