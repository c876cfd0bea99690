"""Measure a model: time to the first token, tokens per second, under so many clients; or (--cold) its start."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import NamedTuple

from vllmd.api.json_types import ForeignJson
from vllmd.cli import openai, show
from vllmd.cli.admin import Admin
from vllmd.cli.failures import EX_UNAVAILABLE, EX_USAGE, Failure

PROMPT = "Tell a long story about a machine that slept until it was needed."


class Measurement(NamedTuple):
    """One request: seconds to its first token and to its end, tokens of the answer."""

    first: float
    whole: float
    tokens: int


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="the model's name")
    parser.add_argument("-n", "--requests", type=int, default=16, metavar="N", help="requests in all (default: 16)")
    parser.add_argument("-c", "--clients", type=int, default=4, metavar="N", help="requests at a time (default: 4)")
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N", help="tokens per answer (default: 128)")
    parser.add_argument(
        "--cold", action="store_true", help="measure its start instead, beside that of the same command without vllmd; "
        "it is stopped and started, once without vllmd, for which it takes root or the engine's user")  # fmt: skip
    parser.add_argument("--prompt", default=PROMPT, metavar="TEXT", help="what is asked")


def run(arguments: argparse.Namespace) -> int:
    if arguments.cold:
        from vllmd.cli import cold  # it needs the kinds of engines, which no other measurement does

        with show.Working(f"loading {arguments.model}") as working:
            starts = cold.measure(Admin(arguments), arguments.model, working.say)
        data = {name: asdict(each) for name, each in starts.items()}
        print(show.as_json(data) if arguments.json else cold.table(starts))
        return 0
    if arguments.requests < 1 or arguments.clients < 1:
        raise Failure("--requests and --clients must be at least 1", EX_USAGE)
    http = openai.client(arguments)
    request = {
        "model": arguments.model,
        "max_tokens": arguments.max_tokens,
        "messages": [{"role": "user", "content": arguments.prompt}],
        "stream_options": {"include_usage": True},
    }
    with show.Working(f"loading {arguments.model}") as working:
        loading = measure_request(http, {**request, "max_tokens": 1}, working.say)  # which is not what is measured
    began = time.monotonic()
    with show.Working("measuring") as working, ThreadPoolExecutor(arguments.clients) as pool:
        shots = []
        for shot in pool.map(lambda _: measure_request(http, request), range(arguments.requests)):
            shots.append(shot)
            working.say(f"measuring: {len(shots)} of {arguments.requests} requests are done")
    figures = summary(shots, time.monotonic() - began, loading)
    print(
        show.as_json(figures)
        if arguments.json
        else show.pairs({name: f"{value:.{0 if value > 1000 else 3}f}" for name, value in figures.items()})
    )
    return 0


def measure_request(
    http: Admin, request: ForeignJson, on_comment: Callable[[str], None] = lambda comment: None
) -> Measurement:
    """Time one request. ``on_comment`` gets the comments by which vllmd reports the loading."""
    began, first, tokens, chunks = time.monotonic(), 0.0, 0, 0
    for chunk in openai.stream(http, request, on_comment):
        if any(openai.delta(chunk)):
            first, chunks = first or time.monotonic() - began, chunks + 1
        tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
    whole = time.monotonic() - began
    if not first and not tokens:
        raise Failure("the model answered without a single token", EX_UNAVAILABLE)
    return Measurement(first or whole, whole, tokens or chunks)


def summary(shots: list[Measurement], wall: float, loading: Measurement) -> dict[str, float]:
    """The figures, seconds and tokens per second."""
    firsts, wholes = sorted(s.first for s in shots), sorted(s.whole for s in shots)
    pace = sorted((s.tokens - 1) / (s.whole - s.first) for s in shots if s.whole > s.first and s.tokens > 1)
    return {
        "first request, loading included (s)": loading.first,
        "first token, median (s)": quantile(firsts, 0.5),
        "first token, 95th percentile (s)": quantile(firsts, 0.95),
        "whole answer, median (s)": quantile(wholes, 0.5),
        "tokens/s of a stream, median": quantile(pace, 0.5),
        "tokens/s in all": sum(s.tokens for s in shots) / wall,
        "requests/s": len(shots) / wall,
    }


def quantile(ordered: list[float], share: float) -> float:
    """The value below which ``share`` of them lie; 0 if there are none."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
