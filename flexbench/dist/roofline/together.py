"""Ceilings of all ranks of a run, measured at the same time: they share hosts in the run, too."""

from __future__ import annotations

from itertools import count

import torch

from flexbench.core.progress import Progress
from flexbench.dist.homes import ExecutionEnv
from flexbench.dist.plan import DistPlan
from flexbench.dist.roofline.ceilings import Ceilings
from flexbench.dist.roofline.measuring import NUM_PARTS, measure_ceilings
from flexbench.dist.stage import meet
from flexbench.ranks.launch import Launch
from flexbench.ranks.watch import PeerWatch


class CeilingsOfRun:
    """This rank's ceilings: the best of what was measured before and after the run.

    Machines are noisy, and a ceiling that was lowered by others is none.
    """

    def __init__(
        self,
        plan: DistPlan,
        launch: Launch,
        watch: PeerWatch,
        env: ExecutionEnv,
        progress: Progress,
    ) -> None:
        self._plan, self._launch, self._watch = plan, launch, watch
        self._env, self._progress = env, progress
        self.best: Ceilings | None = None
        """None until they are measured, and where nobody wants to know them."""

    def measure(self, when: str) -> None:
        """Measure together with all other ranks, which have to call it, too, if it is asked for.

        `when` stands in the progress, and is another one each time. Raises RunError when the disk
        refuses.
        """
        if not self._plan.config.roofline:
            return
        parts = count(1)
        with self._progress.phase(f"Ceilings {when} the run", total=NUM_PARTS) as phase:

            def on_part() -> None:
                phase.advance()
                meet(self._watch, self._launch, f"ceilings {when}, part {next(parts)}")

            meet(self._watch, self._launch, f"ceilings {when}")
            found = measure_ceilings(
                self._env,
                getattr(torch, self._plan.model.dtype),
                with_disk=self._plan.stages[self._launch.rank].total.disk > 0,
                on_part=on_part,
            )
        self.best = found if self.best is None else self.best.better_of(found)
