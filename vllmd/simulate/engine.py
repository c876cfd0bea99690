"""One simulated engine: a batch whose requests all advance at the same speed.

Time is kept as work done, in tokens per request: a request that enters when
the engine has done w tokens and needs n of them ends when it has done w + n,
however the batch grows and shrinks meanwhile. So each arrival costs one push
onto a heap, not a new schedule for everybody.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from vllmd.core.types import ReplicaSpec
from vllmd.simulate.physics import Physics


@dataclass(slots=True, eq=False)
class Job:
    """A request and what has become of it; times in seconds, -1 for not yet."""

    number: int
    id: str
    model: str
    prompt: int
    output: int
    arrived: float
    began: float = -1.0  # when an engine first worked on it: the end of its wait
    ended: float = -1.0
    error: str = ""  # why it was rejected or cut
    frozen: int = 0


@dataclass(slots=True)
class Engine:
    """The batch, and those who wait for a place in it."""

    spec: ReplicaSpec
    physics: Physics
    work: float = 0.0  # tokens done by each request since the engine was made
    at: float = 0.0  # when ``work`` was last brought up to date
    on: bool = False
    batch: list[tuple[float, int, Job]] = field(default_factory=list)  # a heap by the work at which each ends
    line: deque[Job] = field(default_factory=deque)

    def admit(self, job: Job, now: float) -> None:
        """Into the batch, or into the line before it."""
        self._catch_up(now)
        if len(self.batch) >= self.physics.batch:
            self.line.append(job)
        else:
            self._enter(job, now)

    def next_end(self) -> float:
        """When the first of the batch ends if nothing changes before; infinite: never."""
        if not self.on or not self.batch:
            return math.inf
        return self.at + max(0.0, self.batch[0][0] - self.work) * self._token()

    def end(self, now: float) -> Job:
        """The first of the batch is done; the first of the line takes its place."""
        self._catch_up(now)
        work, _, job = heappop(self.batch)
        self.work = max(self.work, work)
        if self.line:
            self._enter(self.line.popleft(), now)
        return job

    def freeze(self, now: float) -> None:
        """Stop working; what was computed of each request is lost but for its tokens."""
        self._catch_up(now)
        self.on = False
        for _, _, job in self.batch:
            job.frozen += 1

    def resume(self, now: float) -> None:
        """Work again; frozen requests first have their prompt and answer so far read anew."""
        self.at, self.on = now, True
        self.batch = [(end + self._again(end, job), number, job) for end, number, job in self.batch]
        heapify(self.batch)

    def drop(self, job: Job, now: float) -> None:
        """Take a job out of the engine, whether it waits or runs."""
        self._catch_up(now)
        if job in self.line:
            self.line.remove(job)
            return
        self.batch = [entry for entry in self.batch if entry[2] is not job]
        heapify(self.batch)
        if self.line:
            self._enter(self.line.popleft(), now)

    def _enter(self, job: Job, now: float) -> None:
        if job.began < 0:
            job.began = now
        reading = self.physics.prompt(self.spec, job.prompt) / self.physics.token(self.spec, 1)
        heappush(self.batch, (self.work + reading + max(1, job.output), job.number, job))

    def _again(self, end: float, job: Job) -> float:
        """The work of recomputing a frozen request's state; one that was being read is read from the start."""
        done = max(0.0, job.output - (end - self.work))
        tokens = job.prompt + int(done) if done else 0
        return self.physics.prompt(self.spec, tokens) / self.physics.token(self.spec, 1)

    def _catch_up(self, now: float) -> None:
        if self.on and self.batch:
            self.work += (now - self.at) / self._token()
        self.at = now

    def _token(self) -> float:
        return self.physics.token(self.spec, len(self.batch))
