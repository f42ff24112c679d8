"""What a stage sends and receives: hidden states forward, tokens from the last to the first."""

from __future__ import annotations

import torch

from flexbench.dist.opt_config import OptConfig
from flexbench.dist.policy import Policy
from flexbench.dist.prompts import Blocks, Tokens
from flexbench.dist.schedule import Exchange, Unit
from flexbench.dist.task import Task
from flexbench.dist.transport import MessageSpec, PipelineLink


class Messages:
    """The messages of one call of `generate` on one stage.

    Where prompts can end early, one more element tells the next stage that all of a unit's have:
    it then computes nothing for the unit, and says so to the one after.
    """

    def __init__(
        self,
        link: PipelineLink | None,
        *,
        config: OptConfig,
        policy: Policy,
        task: Task,
        tokens: Tokens,
        blocks: Blocks,
        device: torch.device,
        is_first: bool,
        is_last: bool,
    ) -> None:
        self._link = link
        self._hidden_size = config.hidden_size
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        self._policy, self._task = policy, task
        self._tokens, self._blocks = tokens, blocks
        self._device = device
        self._is_first, self._is_last = is_first, is_last
        self._inbox: torch.Tensor | None = None
        self._outbox: torch.Tensor | None = None
        self._skipped: set[int] = set()

    def exchange(self, action: Exchange) -> None:
        """Send, receive, and begin to receive, as the schedule says."""
        if self._link is None:
            return
        message = self._outgoing(action.send) if action.send is not None else None
        spec = self._spec(action.receive) if action.receive is not None else None
        received = self._link.send_recv_hidden(message, spec)
        if action.receive is not None and received is not None:
            self._take(action.receive, received)
        if action.post is not None:
            self._link.post_receive(self._spec(action.post))

    def is_skipped(self, unit: Unit) -> bool:
        """Whether nothing is to be computed for `unit`, as far as this stage knows by now."""
        if self._task.stop is None:
            return False
        if self._is_first:
            return self._tokens.all_finished(self._blocks.of_unit(unit))
        return unit.number in self._skipped

    def input(self, batch: int) -> torch.Tensor:
        """What the stage before has computed for this batch: (B, S, h)."""
        assert self._inbox is not None
        return self._inbox[batch]

    def put_output(self, unit: Unit, batch: int, hidden: torch.Tensor) -> None:
        """Put (B, S, h) into the message to the next stage."""
        if self._outbox is None:
            self._outbox = torch.empty(
                self._spec_of_hidden(unit).shape, dtype=self._dtype, device=self._device
            )
        size = hidden.numel()
        self._outbox[batch * size : (batch + 1) * size] = hidden.flatten()

    def _spec(self, unit: Unit) -> MessageSpec:
        if self._is_first:
            return MessageSpec((self._policy.block_size,), torch.int64)
        return self._spec_of_hidden(unit)

    def _spec_of_hidden(self, unit: Unit) -> MessageSpec:
        positions = self._task.prompt_len if unit.token == 0 else 1
        size = self._policy.block_size * positions * self._hidden_size
        return MessageSpec((size + (self._task.stop is not None),), self._dtype)

    def _outgoing(self, unit: Unit) -> torch.Tensor:
        if self._is_last:
            return self._tokens.chosen(self._blocks.of_unit(unit), unit.token)
        message, self._outbox = self._outbox, None
        if message is None:  # the unit was skipped
            message = torch.zeros(
                self._spec_of_hidden(unit).shape, dtype=self._dtype, device=self._device
            )
        if self._task.stop is not None:
            message[-1] = float(self.is_skipped(unit))
        return message

    def _take(self, unit: Unit, message: torch.Tensor) -> None:
        if self._is_first:
            self._tokens.put(self._blocks.of_unit(unit), unit.token, message)
            return
        message = message.to(self._device)
        if self._task.stop is not None:
            if bool(message[-1]):
                self._skipped.add(unit.number)
            message = message[:-1]
        shape = (self._policy.num_gpu_batches, self._policy.gpu_batch_size, -1)
        self._inbox = message.view(*shape, self._hidden_size)
