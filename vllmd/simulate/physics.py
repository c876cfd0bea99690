"""How long things take: the figures that a simulated engine obeys.

The transfers are the published fit for vLLM's sleep mode on one A100 (W:
gigabytes of weights): start 37 + 0.2 W, level 1 wake 0.25 + 0.045 W and sleep
0.05 + 0.0455 W, level 2 wake 0.55 + 0.245 W and sleep 0.4 s. Decoding is bound
by memory bandwidth: reading the weights once gives every request of the batch
one token. What the scheduler believes is its own affair: it starts from its
priors and learns from what happens here, noise included.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import field

from vllmd.core.types import ReplicaSpec
from vllmd.frozen import frozen

GB = 1e9


@frozen
class Physics:
    """The machine's nature. Times in seconds, ``noise`` the sigma of a log-normal factor on every transfer."""

    bandwidth: float = 1600 * GB  # bytes of weights read per second while decoding
    step: float = 0.006  # seconds of overhead per decoding step
    step_per_request: float = 0.0004  # and per request in the batch
    prefill: float = 150_000.0  # prompt tokens per second of a model of one GB
    batch: int = 64  # requests that an engine works on at a time; more wait inside it
    proof: float = 2.0  # seconds to prove that a frozen request survives
    noise: float = 0.1
    seed: int = 0
    measured: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # model -> kind -> seconds, instead

    def transfer(self, spec: ReplicaSpec, kind: str, count: int) -> float:
        """Seconds of the engine's ``count``-th start, stop, wake1, wake2, sleep1, sleep2 or proof.

        The noise depends on nothing else, so that all policies meet the same luck.
        """
        factor = 1.0
        if self.noise:
            factor = random.Random(f"{self.seed}/{spec.id}/{kind}/{count}").lognormvariate(0.0, self.noise)
        return self.mean(spec, kind) * factor

    def mean(self, spec: ReplicaSpec, kind: str) -> float:
        """The same without the noise."""
        known = self.measured.get(spec.id, {}).get(kind)
        if known is not None:
            return known
        w = gigabytes(spec)
        fits = {
            "start": 37 + 0.2 * w,
            "stop": 3.0,
            "wake1": 0.25 + 0.045 * w,
            "wake2": 0.55 + 0.245 * w,
            "sleep1": 0.05 + 0.0455 * w,
            "sleep2": 0.4,
            "proof": self.proof,
        }
        return fits[kind]

    def token(self, spec: ReplicaSpec, running: int) -> float:
        """Seconds until each of ``running`` requests has its next token."""
        return self.step + gigabytes(spec) * GB / self.bandwidth + self.step_per_request * running

    def prompt(self, spec: ReplicaSpec, tokens: int) -> float:
        """Seconds to read a prompt."""
        return gigabytes(spec) * tokens / self.prefill


A100 = Physics()


def gigabytes(spec: ReplicaSpec) -> float:
    """The weights on each of its devices."""
    return (spec.weights or spec.footprint.awake) / max(1, spec.device_count) / GB
