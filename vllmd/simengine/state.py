"""Slots, pauses, sleep and wake: vLLM's scheduler and executor in small, traps included.

What vLLM 0.32 does and this does too (``v1/engine/core.py``, ``v1/executor/abstract.py``):
a sleep pauses the scheduler first, and only then touches memory; requests that
arrive meanwhile are queued without a word; a second sleep, deeper or not, does
nothing but is answered as if it had, and the metric believes it; a wake of an
unknown tag does nothing; the scheduler resumes once no tag sleeps, whether or
not the weights are worth anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Protocol

from vllmd.simengine.device import OutOfDeviceMemory
from vllmd.simengine.failures import Failures
from vllmd.simengine.logs import gib, log
from vllmd.simengine.options import Options

GARBAGE = "!"  # what a model with discarded weights says, again and again
_TAGS = frozenset({"weights", "kv_cache"})
_TOKENS_BEFORE_FAILURE = 3


class CallFailed(Exception):
    """An internal call failed; the answer is 500 with this message."""


class Memory(Protocol):
    """Where memory is held: a pretended GPU, or a real one."""

    def hold(self, size: int) -> None: ...


@dataclass(eq=False, slots=True)
class Job:
    """One request on its way through the engine."""

    prompt_tokens: int
    answer: Sequence[str] = ()
    finish: str = "stop"
    aborted: bool = False
    sent: int = 0
    turn: asyncio.Future[None] | None = field(default=None, repr=False)  # what it waits for now

    @property
    def cut(self) -> bool:
        """Whether the token just sent is the last and ends the answer, as one at the limit of length does.

        An answer that ends by itself has one step more, without text.
        """
        return self.finish == "length" and self.sent + 1 >= len(self.answer)

    def nudge(self) -> None:
        """Let it look at the state again."""
        if self.turn is not None and not self.turn.done():
            self.turn.set_result(None)


class EngineState:
    """What is running, what waits, what sleeps. One event loop owns it."""

    def __init__(self, options: Options, memory: Sequence[Memory] = ()) -> None:
        self.options = options
        self.failures: Failures = options.failures
        self._memory = memory
        self.waiting: deque[Job] = deque()
        self.running: set[Job] = set()
        self.pause = ""  # "", "new" (queue what arrives) or "all" (freeze what runs too)
        self.tags: set[str] = set()  # what sleeps
        self.level = 0  # what the metric believes
        self._discarded = False  # the weights are mapped but worthless
        self._executor = asyncio.Lock()  # vLLM's executor takes one call at a time
        self._idle: list[asyncio.Future[None]] = []
        self.finished = 0
        self.generated = 0
        self.prompted = 0

    # Requests

    async def run(self, job: Job) -> AsyncGenerator[str, None]:
        """The job's tokens as they come; ``job.finish`` is then true. Closing it early frees the slot."""
        await self._admission(job)
        try:
            async with aclosing(self._tokens(job)) as tokens:
                async for token in tokens:
                    yield token
        finally:
            self._leave(job)

    async def pool(self, prompt_tokens: int) -> Job:
        """A request without generation: it takes a slot and the prompt's time."""
        job = Job(prompt_tokens)
        async for _ in self.run(job):
            pass
        return job

    async def _admission(self, job: Job) -> None:
        self.waiting.append(job)
        self._admit()
        try:
            while job in self.waiting:
                await self._turn(job, None)
        except BaseException:
            self._leave(job)
            raise

    def _admit(self) -> None:
        while self.waiting and not self.pause and len(self.running) < self.options.max_num_seqs:
            job = self.waiting.popleft()
            self.running.add(job)
            job.nudge()

    def _leave(self, job: Job) -> None:
        with contextlib.suppress(ValueError):
            self.waiting.remove(job)
        self.running.discard(job)
        self.finished += 1
        self._admit()
        self._tell_idle()

    async def _tokens(self, job: Job) -> AsyncGenerator[str, None]:
        clock = asyncio.get_running_loop().time
        self.prompted += job.prompt_tokens
        rate, pace = self.options.prompt_tokens_per_second, self.options.tokens_per_second
        interval = 1 / pace if pace else 0.0
        due = clock() + self.options.prompt_overhead + (job.prompt_tokens / rate if rate else 0.0)
        for token in job.answer:
            await self._until(job, due)
            if job.aborted:
                break
            await self._fail_between(job)
            yield GARBAGE if self._discarded or "weights" in self.tags else token
            job.sent += 1
            self.generated += 1
            due = max(due, clock() - 1) + interval
        else:
            await self._until(job, due if not job.answer else 0)
        if job.aborted:
            job.finish = "abort"

    async def _until(self, job: Job, due: float) -> None:
        """Wait for the time, and on while frozen; an abort ends it."""
        clock = asyncio.get_running_loop().time
        if clock() >= due:
            await asyncio.sleep(0)
        while not job.aborted and (clock() < due or self.pause == "all"):
            await self._turn(job, None if self.pause == "all" else due)

    async def _turn(self, job: Job, due: float | None) -> None:
        loop = asyncio.get_running_loop()
        job.turn = loop.create_future()
        timer = loop.call_at(due, job.nudge) if due is not None else None
        try:
            await job.turn
        finally:
            job.turn = None
            if timer is not None:
                timer.cancel()

    async def _fail_between(self, job: Job) -> None:
        if job.sent != _TOKENS_BEFORE_FAILURE:
            return
        if (status := self.failures.get("crash-mid-stream")) is not None:
            die(int(status), "CUDA error: an illegal memory access was encountered")
        if "stall-mid-stream" in self.failures:
            await asyncio.Event().wait()
        if "error-mid-stream" in self.failures:
            raise CallFailed("Internal server error")

    def abort_all(self) -> int:
        """Finish every request with the reason "abort", the queued ones too; how many."""
        jobs = [*self.waiting, *self.running]
        self.waiting.clear()
        for job in jobs:
            job.aborted = True
            job.nudge()
        return len(jobs)

    # Pause and resume

    async def pause_scheduler(self, mode: str) -> None:
        """Returns once nothing runs any more (``abort``, ``wait``), or at once (``keep``)."""
        if mode == "abort":
            self.abort_all()
        self.pause = "all" if mode == "keep" else "new"
        if mode != "keep" and self.running:
            idle = asyncio.get_running_loop().create_future()
            self._idle.append(idle)
            await idle

    def resume_scheduler(self) -> None:
        """Admit what was queued, thaw what was frozen."""
        self.pause = ""
        for job in self.running:
            job.nudge()
        self._admit()

    def _tell_idle(self) -> None:
        if not self.running:
            for idle in self._idle:
                if not idle.done():
                    idle.set_result(None)
            self._idle.clear()

    # Sleep and wake

    @property
    def is_sleeping(self) -> bool:
        """Also true when merely paused, as in vLLM."""
        return bool(self.pause or self.tags)

    async def sleep(self, level: int, mode: str) -> None:
        """Pause, then (level 1 and 2) put the memory to sleep. Raises CallFailed."""
        if "sleep-hang" in self.failures:
            await asyncio.Event().wait()
        await self.pause_scheduler(mode)
        if level:
            async with self._executor:
                await self._sleep_memory(level)
        self.level = level

    async def _sleep_memory(self, level: int) -> None:
        if "weights" in self.tags:
            log("Executor is already sleeping.", level="WARNING", process="EngineCore", source="abstract.py:384")
            return
        began = time.perf_counter()
        await asyncio.sleep(self.options.sleep_time[level - 1])
        freed = 0
        if self.options.enable_sleep_mode and "sleep-keeps-memory" not in self.failures:
            asleep = min(self.options.memory_asleep, self.options.memory)
            self.hold(asleep)
            freed = self.options.memory - asleep
        # Without sleep mode the pool is empty, and nothing comes free.
        if "sleep-500" in self.failures:
            self._discarded = True  # unmapped, but nothing remembers it
            raise CallFailed("Call to sleep method failed: Memory usage increased after sleeping.")
        self.tags |= _TAGS
        self._discarded = self._discarded or (level == 2 and self.options.enable_sleep_mode)
        left = gib(self.options.memory - freed)
        message = f"Sleep mode freed {gib(freed)} GiB memory, {left} GiB memory is still in use."
        self._log_core(message, "gpu_worker.py:326")
        self._log_core(f"It took {time.perf_counter() - began:.6f} seconds to fall asleep.", "abstract.py:390")

    async def wake_up(self, tags: list[str] | None) -> bool:
        """Wake these tags (None: all); true once all memory is back and requests run again. Raises CallFailed."""
        if "wake-hang" in self.failures:
            await asyncio.Event().wait()
        wanted = None if tags is None else [tag for tag in tags if tag != "scheduling"]
        if wanted is None or wanted:
            async with self._executor:
                await self._wake_memory(wanted)
        if not self.tags:
            self.level = 0
            self.resume_scheduler()
        return not self.tags

    async def _wake_memory(self, tags: list[str] | None) -> None:
        if not self.tags:
            return self._warn_core("Executor is not sleeping.", "abstract.py:396")
        for tag in tags or ():
            if tag not in self.tags:
                return self._warn_core(f"Tag {tag} is not in sleeping tags {self.tags}", "abstract.py:401")
        if "wake-500" in self.failures:
            raise CallFailed(_wake_failure("out of memory"))
        await self._map(set(tags) if tags else set(self.tags))
        return None

    async def _map(self, tags: set[str]) -> None:
        began = time.perf_counter()
        if "weights" in tags and not self._discarded:
            await asyncio.sleep(self.options.wake_time[0])
        try:
            for tag in sorted(tags, reverse=True):  # the weights come first
                self.hold(self._memory_without(self.tags - tags if tag == "kv_cache" else self.tags - {"weights"}))
        except OutOfDeviceMemory:
            raise CallFailed(_wake_failure("out of memory")) from None
        self.tags -= tags
        self._log_core(f"It took {time.perf_counter() - began:.6f} seconds to wake up tags {tags}.", "abstract.py:405")

    def _memory_without(self, asleep: set[str]) -> int:
        """Bytes per device held while these tags sleep."""
        awake = self.options.memory
        low = min(self.options.memory_asleep, awake)
        if not asleep or not self.options.enable_sleep_mode:
            return awake
        weights = max(low, min(awake, awake // 2 if self.options.weights is None else self.options.weights))
        return {frozenset(_TAGS): low, frozenset({"kv_cache"}): weights}.get(frozenset(asleep), awake - weights + low)

    async def reload_weights(self) -> None:
        """Bring the weights back from disk. Raises CallFailed while their memory is not mapped."""
        if "weights" in self.tags:
            raise CallFailed(
                "Call to collective_rpc method failed: CUDA error: an illegal memory access was encountered"
            )
        async with self._executor:
            await asyncio.sleep(self.options.wake_time[1])
        self._discarded = False
        self._log_core("Reloading weights took some time", "gpu_model_runner.py:5161")

    def hold(self, size: int) -> None:
        """Hold so many bytes on every device. Raises OutOfDeviceMemory."""
        for device in self._memory:
            device.hold(size)

    def _warn_core(self, message: str, source: str) -> None:
        log(message, level="WARNING", process="EngineCore", source=source)

    def _log_core(self, message: str, source: str) -> None:
        log(message, process="EngineCore", source=source)


_DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."


def die(status: int, reason: str) -> None:
    """End at once, in the middle of whatever goes on, as when vLLM's core dies under it."""
    for line in ("EngineCore encountered a fatal error.", f"torch.AcceleratorError: {reason}"):
        log(line, level="ERROR", process="EngineCore", source="core.py:1301")
    for line in ("AsyncLLM output_handler failed.", f"vllm.v1.engine.exceptions.EngineDeadError: {_DEAD}"):
        log(line, level="ERROR", source="async_llm.py:782")
    os._exit(status)


def _wake_failure(reason: str) -> str:
    return f"Call to wake_up method failed: CUDA Error: {reason} at /workspace/csrc/cumem_allocator.cpp:163"
