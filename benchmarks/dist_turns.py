"""How the systems of benchmarks/dist_vs_peers.py take turns: what is timed, and when."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from benchmarks.dist_peers import (
    TRANSFORMERS,
    ModelFolder,
    System,
    SystemFailedError,
    Worker,
    cache_gib,
    resident_bytes,
)
from benchmarks.dist_workers.protocol import Settings
from flexbench.dist.opt_config import OptConfig

_FIRST_REAL_TOKEN = 4  # OPT's tokens 0 to 3 are special
_SEED = 0
# When the machine does something else by more than that, it is tried again, so often in all.
_DISTURBED = 0.05
_MAX_TRIES = 3
# A first token that takes so long needs no warm-up: what a first call has to do takes a second.
_LONG_S = 20.0


@dataclass(frozen=True, order=True)
class Point:
    """So many prompts, as one batch, of so many tokens, with so many new ones each."""

    batch_size: int
    prompt_len: int
    gen_len: int

    @classmethod
    def parse(cls, text: str) -> Point:
        """From BATCHxPROMPT+NEW, as 4x128+32. Raises ValueError."""
        found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)\+([1-9]\d*)", text)
        if found is None or int(found[3]) < 2:
            raise ValueError(f"{text!r} is not BATCHxPROMPT+NEW, with at least 2 new tokens")
        return cls(*map(int, found.groups()))

    def __str__(self) -> str:
        return f"{self.batch_size}x{self.prompt_len}+{self.gen_len}"

    @property
    def new_tokens(self) -> int:
        """Of all prompts."""
        return self.batch_size * self.gen_len

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """Random token ids, the same ones at every call: (batch_size, prompt_len)."""
        shape = (self.batch_size, self.prompt_len)
        rng = np.random.default_rng(_SEED)
        ids: list[list[int]] = rng.integers(_FIRST_REAL_TOKEN, vocab_size, shape).tolist()
        return ids


@dataclass(frozen=True, kw_only=True)
class Visit:
    """One turn of one system at one point. Times in seconds."""

    system: str
    model: str
    dtype: str
    """In which it computed."""
    point: Point
    repeat: int
    first_s: float
    """A call for one token of every prompt."""
    total_s: float
    """A call for all of them."""
    others: float
    """The share of the machine's CPU time that was spent outside of the system meanwhile."""
    began_at: float
    """Seconds since the epoch, as the next."""
    ended_at: float
    same_tokens: float | None = None
    """The share of tokens that are those of transformers."""

    @property
    def tokens_per_s(self) -> float:
        """All new tokens by the time of the whole call."""
        return self.point.new_tokens / self.total_s

    @property
    def step_s(self) -> float:
        """Of each token after the first."""
        return (self.total_s - self.first_s) / (self.point.gen_len - 1)


@dataclass(frozen=True, kw_only=True)
class Group:
    """One model in one precision, with the systems that run it, and where their Pythons are."""

    folder: ModelFolder
    config: OptConfig
    points: Sequence[Point]
    systems: Sequence[System]
    pythons: dict[str, Path]
    num_threads: int

    def start(self, system: System, logs: Path) -> Worker:
        """A worker that has loaded. Raises SystemFailedError."""
        dtype = system.dtype or self.folder.dtype
        converted = self.folder.path.with_name(f"{self.folder.name}-{system.environment}-{dtype}")
        settings = Settings(
            folder=str(self.folder.path),
            dtype=dtype,
            num_threads=self.num_threads,
            max_batch_size=max(point.batch_size for point in self.points),
            max_length=max(point.prompt_len + point.gen_len for point in self.points),
            converted_folder=str(converted),
        )
        log = logs / f"{system.name}.log"
        return Worker(system, self.pythons[system.name], settings, self.cache_gib, log)

    @property
    def cache_gib(self) -> int:
        """For systems that reserve it."""
        batches = [(point.batch_size, point.prompt_len + point.gen_len) for point in self.points]
        return cache_gib(self.folder, batches)

    @property
    def needed_bytes(self) -> int:
        """For all systems at once, and twice a largest cache for the one that computes."""
        held = sum(resident_bytes(each, self.folder, self.cache_gib) for each in self.systems)
        return held + 2 * self.cache_gib * 2**30


class Turns:
    """Lets the systems of a group take turns, and keeps what comes of it.

    `on_pause` is called before and after every visit, while none of them computes.
    """

    def __init__(self, group: Group, logs: Path, on_pause: Callable[[], None]) -> None:
        self._group = group
        self._logs = logs
        self._on_pause = on_pause
        self._failed: set[str] = set()
        self._references: dict[Point, list[list[int]]] = {}
        self.visits: list[Visit] = []
        self.versions: dict[str, dict[str, str]] = {}

    def take(self, num_repeats: int) -> None:
        """All of them; those that fail are named and left out from then on."""
        available = psutil.virtual_memory().available
        if self._group.needed_bytes < available:
            self._take_together(num_repeats)
            return
        needed = f"{self._group.needed_bytes / 2**30:.0f} GiB of {available / 2**30:.0f}"
        tell(f"{self._about}: one system at a time is loaded ({needed} for all)")
        for repeat in range(num_repeats):
            for system in self._order(repeat):
                with self._loaded(system) as worker:
                    if worker is None:
                        continue
                    self._on_pause()
                    for point in self._group.points:
                        self._visit(worker, point, repeat)

    def _take_together(self, num_repeats: int) -> None:
        with ExitStack() as stack:
            workers = {
                system.name: stack.enter_context(self._loaded(system))
                for system in self._group.systems
            }
            self._on_pause()
            for repeat in range(num_repeats):
                for point in self._group.points:
                    for system in self._order(repeat):
                        self._visit(workers[system.name], point, repeat)

    @property
    def _about(self) -> str:
        return f"{self._group.folder.name} {self._group.folder.dtype}"

    def _order(self, repeat: int) -> list[System]:
        """Transformers, whose tokens are the reference, begins the first repeat, if it is one."""
        systems = sorted(self._group.systems, key=lambda system: system.name != TRANSFORMERS)
        turn = repeat % len(systems)
        return systems[turn:] + systems[:turn]

    @contextmanager
    def _loaded(self, system: System) -> Iterator[Worker | None]:
        """A frozen worker; None: it could not be had."""
        worker = None
        if system.name not in self._failed:
            try:
                worker = self._group.start(system, self._logs)
            except SystemFailedError as error:
                self._leave_out(system, error)
        if worker is None:
            yield None
            return
        try:
            worker.freeze()
            self.versions[system.name] = worker.versions
            tell(f"{self._about} {system.name}: loaded in {worker.load_s:.1f} s")
            yield worker
        finally:
            worker.end()

    def _leave_out(self, system: System, error: SystemFailedError) -> None:
        self._failed.add(system.name)
        tell(f"{self._about} {system.name} is left out: {error}")

    def _visit(self, worker: Worker | None, point: Point, repeat: int) -> None:
        """Kept is the try in which the machine did least else, not the quickest one.

        The pause after it is the one before the next.
        """
        if worker is None or worker.system.name in self._failed:
            return
        worker.thaw()
        tries: list[Visit] = []
        try:
            while len(tries) < _MAX_TRIES and (not tries or tries[-1].others > _DISTURBED):
                tries.append(self._timed(worker, point, repeat))
        except SystemFailedError as error:
            self._leave_out(worker.system, error)
            return
        finally:
            worker.freeze()
        self._on_pause()
        visit = min(tries, key=lambda each: each.others)
        self.visits.append(visit)
        tell(
            f"{self._about} {visit.system} {point}: {visit.tokens_per_s:.1f} tokens/s, first "
            f"{visit.first_s:.3f} s, others {visit.others:.0%}, {len(tries)} tries"
        )

    def _timed(self, worker: Worker, point: Point, repeat: int) -> Visit:
        name, dtype = worker.system.name, worker.system.dtype or self._group.folder.dtype
        prompts = point.prompts(self._group.config.vocab_size)
        everyone_s, own_s, began_at = busy_s(), worker.cpu_s(), time.time()
        first_s = worker.generate(prompts, 1)["seconds"]
        if first_s < _LONG_S:
            worker.generate(prompts, point.gen_len)
            everyone_s, own_s, began_at = busy_s(), worker.cpu_s(), time.time()
            first_s = worker.generate(prompts, 1)["seconds"]
        whole = worker.generate(prompts, point.gen_len)
        tokens, total_s = whole["tokens"], whole["seconds"]
        others_s = busy_s() - everyone_s - (worker.cpu_s() - own_s)
        ended_at = time.time()
        shape = (point.batch_size, point.gen_len)
        if np.shape(tokens) != shape:
            raise SystemFailedError(f"{np.shape(tokens)} new tokens, not {shape}")
        if name == TRANSFORMERS:
            self._references.setdefault(point, tokens)
        reference = self._references.get(point)
        return Visit(
            system=name,
            model=self._group.folder.name,
            dtype=dtype,
            point=point,
            repeat=repeat,
            first_s=first_s,
            total_s=total_s,
            others=max(0.0, others_s / (ended_at - began_at) / psutil.cpu_count()),
            began_at=began_at,
            ended_at=ended_at,
            same_tokens=None if reference is None else share_of_same(tokens, reference),
        )


def busy_s() -> float:
    """CPU time of the whole machine since it started, that which a host took away included."""
    times = psutil.cpu_times()._asdict()
    parts = ("user", "nice", "system", "irq", "softirq", "steal")
    return sum(times.get(part, 0.0) for part in parts)


def tell(text: str) -> None:
    """Say how far it has come."""
    print(text, file=sys.stderr, flush=True)


def share_of_same(tokens: list[list[int]], reference: list[list[int]]) -> float:
    """The share of tokens that are the same at the same place: both (num_prompts, gen_len)."""
    return float(np.mean(np.array(tokens) == np.array(reference)))
