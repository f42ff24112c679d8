"""One client of the swarm: it warms up, waits for the others, and generates."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from flexbench.core.processes import WorkerChannel
from flexbench.petals.model import (
    DEFAULT_MAX_RETRIES,
    SwarmModel,
    resolve_device,
    resolve_dtype,
)
from flexbench.petals.peers import Hop

if TYPE_CHECKING:
    import torch


class SettableEvent(Protocol):
    """What a client needs of `finished_warmup`; multiprocessing.Event has it."""

    def set(self) -> None:
        """Tell that the warm-up is done."""


class WaitableEvent(Protocol):
    """What a client needs of `can_start`; multiprocessing.Event has it."""

    def wait(self) -> Any:
        """Block until all clients are released."""


class PutQueue(Protocol):
    """What a client needs of `queue`; multiprocessing.Queue has it."""

    def put(self, item: Any) -> None:
        """Send one item."""


class TokenStreamer(Protocol):
    """What transformers asks of a streamer."""

    def put(self, value: torch.Tensor) -> None:
        """The prompt, (B, S), then the tokens of each step, (B,), on the CPU."""

    def end(self) -> None:
        """That was the last of them."""


@dataclass(frozen=True, kw_only=True)
class RequestTrace:
    """What is known of one request beside its duration.

    `started_at` and `ended_at` are on time.monotonic, which all processes of a machine share.
    `generated_tokens` were counted in the output, over the whole batch. `failed_attempts` are the
    calls to a server that Petals repeated within the request.
    """

    started_at: float
    ended_at: float
    generated_tokens: int
    failed_attempts: int
    route: tuple[Hop, ...]


class RequestLatency(float):
    """The duration of one request in seconds, with the trace it was taken from.

    It is the number that the original benchmark puts on its queue, and can be used as such.
    """

    trace: RequestTrace

    def __new__(cls, trace: RequestTrace) -> RequestLatency:
        """The latency of `trace`."""
        latency = super().__new__(cls, trace.ended_at - trace.started_at)
        latency.trace = trace
        return latency

    def __reduce__(self) -> tuple[type[RequestLatency], tuple[RequestTrace]]:
        """Travel between processes as the trace."""
        return (type(self), (self.trace,))


class SwarmClient:
    """A Petals model whose blocks run in the swarm, and its requests."""

    def __init__(self, config_bloom: Any, process_index: int) -> None:
        """Connect to the swarm of `config_bloom`, a SwarmModel or DistributedBloomConfig."""
        import torch

        torch.set_num_threads(1)
        model = SwarmModel.of(config_bloom)
        config = model.to_bloom_config() if model is config_bloom else config_bloom
        if config.max_retries is None:  # Petals' default; it would wait for a lost server for ever
            config.max_retries = DEFAULT_MAX_RETRIES
        self._device = resolve_device(model.device, process_index)
        self._vocab_size = model.shape.vocab_size
        self._seed = model.seed * 1_000_003 + process_index
        dtype = resolve_dtype(model.dtype, self._device)
        self._model = _load(config, model.weights_folder, dtype, model.seed).to(self._device)
        # Petals' BLOOM stops at its end-of-sequence token: it would generate less than was asked.
        self._model.generation_config.eos_token_id = None
        # A random prompt may hold any token. What is padding would be masked, which Petals refuses.
        self._model.generation_config.pad_token_id = None
        self._failed_attempts = 0
        self._count_failed_attempts()

    def _count_failed_attempts(self) -> None:
        manager = self._model.transformer.h.sequence_manager
        original = manager.on_request_failure

        def counted(peer_id: Any) -> None:
            self._failed_attempts += 1
            original(peer_id)

        manager.on_request_failure = counted

    def prompts(self, count: int, batch_size: int, sequence_length: int) -> list[torch.Tensor]:
        """`count` different prompts of this client, int64 (batch_size, sequence_length).

        They depend on the seed and on the client's index only, and no client shares its own.
        """
        import torch

        generator = torch.Generator().manual_seed(self._seed)
        shape = (batch_size, sequence_length)
        return [
            torch.randint(self._vocab_size, shape, generator=generator).to(self._device)
            for _ in range(count)
        ]

    def prompt_of(self, ids: Sequence[int]) -> torch.Tensor:
        """One prompt of these token ids, int64 (1, sequence_length); any number is a token."""
        import torch

        return torch.tensor([[token % self._vocab_size for token in ids]], device=self._device)

    def generate(
        self, prompt: torch.Tensor, max_tokens: int, *, streamer: TokenStreamer | None = None
    ) -> tuple[torch.Tensor, list[Hop]]:
        """Generate `max_tokens` tokens greedily; returns prompt and new tokens, and the route.

        With 0, the prompt is run through all blocks (the prefill) and nothing is generated. The
        `streamer` is told of the prompt first, then of every token as soon as it is chosen; what it
        raises ends the generation.
        """
        import torch

        length = prompt.shape[1] + max_tokens
        with torch.inference_mode(), self._model.inference_session(max_length=length) as session:
            if max_tokens == 0:
                self._model.transformer(prompt)
                output = prompt
            else:
                output = self._model.generate(
                    prompt,
                    max_new_tokens=max_tokens,
                    do_sample=False,
                    session=session,
                    streamer=streamer,
                )
            route = _route(session)
        return output, route

    def timed_request(self, prompt: torch.Tensor, max_tokens: int) -> RequestLatency:
        """One request, measured; raises RuntimeError when it gave another number of tokens."""
        failed_before = self._failed_attempts
        self._wait_for_device()
        started_at = time.monotonic()
        output, route = self.generate(prompt, max_tokens)
        self._wait_for_device()
        ended_at = time.monotonic()
        generated_per_prompt = output.shape[1] - prompt.shape[1]
        if generated_per_prompt != max_tokens:
            raise RuntimeError(
                f"asked for {max_tokens} tokens per prompt, received {generated_per_prompt}"
            )
        return RequestLatency(
            RequestTrace(
                started_at=started_at,
                ended_at=ended_at,
                generated_tokens=generated_per_prompt * prompt.shape[0],
                failed_attempts=self._failed_attempts - failed_before,
                route=tuple(route),
            )
        )

    def _wait_for_device(self) -> None:
        if self._device.type == "cuda":
            import torch

            torch.cuda.synchronize(self._device)


def client_process(
    finished_warmup: SettableEvent,
    can_start: WaitableEvent,
    config_bloom: Any,
    num_micro_batches: int,
    batch_size: int,
    sequence_length: int,
    max_tokens: int,
    process_index: int,
    queue: PutQueue,
) -> None:
    """Be one client: warm up with one token, wait for the release, then time every round.

    `config_bloom` is Petals' DistributedBloomConfig, or a SwarmModel from which it is made. For
    each of the `num_micro_batches` rounds a RequestLatency, which is a float in seconds, is put on
    `queue`. `process_index` chooses the GPU, where there are several, and the prompts.
    """
    client = SwarmClient(config_bloom, process_index)
    prompts = client.prompts(num_micro_batches, batch_size, sequence_length)
    client.generate(prompts[0], max_tokens=1)
    finished_warmup.set()
    can_start.wait()
    for prompt in prompts:
        queue.put(client.timed_request(prompt, max_tokens))


def run_client(
    channel: WorkerChannel,
    config_bloom: Any,
    num_micro_batches: int,
    batch_size: int,
    sequence_length: int,
    max_tokens: int,
    process_index: int,
) -> None:
    """`client_process` as a worker of a Crew."""
    client_process(
        channel.ready,
        channel.release,
        config_bloom,
        num_micro_batches,
        batch_size,
        sequence_length,
        max_tokens,
        process_index,
        channel.queue,
    )


def _load(config: Any, weights_folder: str | None, dtype: torch.dtype, seed: int) -> Any:
    import torch

    from flexbench.petals_runtime.imports import DistributedBloomForCausalLM

    if weights_folder is not None:
        return DistributedBloomForCausalLM.from_pretrained(
            weights_folder, config=config, torch_dtype=dtype
        )
    torch.manual_seed(seed)
    return DistributedBloomForCausalLM(config).to(dtype)


def _route(session: Any) -> list[Hop]:
    """The servers that an open InferenceSession of Petals 2.2 runs through."""
    return [
        Hop(peer_id=str(part.span.peer_id), start=part.span.start, end=part.span.end)
        for part in session._server_sessions
    ]
