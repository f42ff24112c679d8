"""DistOptLM: one stage of an OptLM whose layers are shared among several processes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import distributed

from flexbench.core.checks import check_count
from flexbench.core.errors import ConfigError
from flexbench.dist.homes import ExecutionEnv
from flexbench.dist.model import OptLM
from flexbench.dist.opt_config import OptConfig
from flexbench.dist.partition import Balance, Stage, split_layers
from flexbench.dist.policy import Policy
from flexbench.dist.schedule import Pipeline, Workload
from flexbench.dist.task import IntArray, Task
from flexbench.dist.transport import MessageSpec, PeerError, PipelineLink


class DistOptLM(OptLM):
    """Stage `pipeline_rank` of `num_pipeline_stages`.

    torch.distributed's default process group has to be there if there are several. Every stage
    calls `generate` with the same arguments, and every stage gets all tokens. `comm_device` 'gpu'
    sends hidden states from the GPU, which without CUDA is the CPU. `num_inner_iterations` blocks
    of prompts (default: one a stage) are under way at the same time. `balance` and
    `positions_per_token` are those of `split_layers`.
    """

    def __init__(
        self,
        config: OptConfig,
        env: ExecutionEnv,
        path: str,
        policy: Policy,
        pipeline_rank: int,
        num_pipeline_stages: int,
        comm_device: str,
        num_inner_iterations: int | None = None,
        async_comm: bool = False,
        *,
        balance: Balance = Balance.LAYERS,
        positions_per_token: float = 1.0,
        weight_seed: int = 0,
        on_layer: Callable[[], None] | None = None,
    ) -> None:
        """Load the weights of this stage's layers; `on_layer` is called after each."""
        if comm_device not in ("cpu", "gpu"):
            raise ConfigError("--comm-device", f"must be cpu or gpu, not {comm_device!r}")
        check_count("--world-size", num_pipeline_stages, minimum=1)
        check_count("--rank", pipeline_rank, minimum=0, maximum=num_pipeline_stages - 1)
        if num_inner_iterations is None:
            num_inner_iterations = num_pipeline_stages
        check_count("--num-inner-iterations", num_inner_iterations, minimum=1)
        self._rank, self._num_stages = pipeline_rank, num_pipeline_stages
        self._balance, self._positions_per_token = balance, positions_per_token
        self._inner_iterations = num_inner_iterations
        self._is_async = async_comm
        self._comm_device = env.gpu.device if comm_device == "gpu" else torch.device("cpu")
        self.link = PipelineLink(
            pipeline_rank, num_pipeline_stages, self._comm_device, is_async=async_comm
        )
        super().__init__(config, env, path, policy, weight_seed=weight_seed, on_layer=on_layer)

    def _make_workload(self, task: Task) -> Workload:
        if task.debug_mode is not None and self._num_stages > 1:
            raise ConfigError(
                "--debug-mode", "does a part of the layers, which says nothing of several stages"
            )
        return super()._make_workload(task)

    def _make_stage(self) -> Stage:
        stages = split_layers(
            self.config,
            self._num_stages,
            self._balance,
            positions_per_token=self._positions_per_token,
        )
        return stages[self._rank]

    @property
    def _num_inner_iterations(self) -> int:
        return self._inner_iterations

    @property
    def _pipeline(self) -> Pipeline:
        return Pipeline(rank=self._rank, num_stages=self._num_stages, is_async=self._is_async)

    @property
    def _link(self) -> PipelineLink | None:
        return self.link if self._num_stages > 1 else None

    def send_hidden(self, message: torch.Tensor) -> None:
        """Send to the next stage; the last stage sends tokens to the first.

        This and the next two are for programs of their own; `generate` uses the link itself.
        """
        self.link.send_hidden(message)

    def recv_hidden(self, spec: MessageSpec) -> torch.Tensor:
        """Receive from the stage before."""
        return self.link.recv_hidden(spec)

    def send_recv_hidden(
        self, message: torch.Tensor | None, spec: MessageSpec | None
    ) -> torch.Tensor | None:
        """Send and receive at once, so that no order of stages can block."""
        return self.link.send_recv_hidden(message, spec)

    def _meet(self) -> None:
        if self._num_stages > 1:
            # No barrier: that of a group with NCCL in it is not for the host.
            distributed.all_reduce(torch.zeros(1))

    def _share_output(self, output_ids: IntArray) -> IntArray:
        if self._num_stages == 1:
            return output_ids
        shared = torch.from_numpy(output_ids)
        last = self._num_stages - 1
        try:
            distributed.broadcast(shared, src=last)
        except RuntimeError as error:
            raise PeerError(last, str(error).partition("\n")[0]) from error
        return output_ids
