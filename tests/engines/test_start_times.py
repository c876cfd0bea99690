"""What is believed of a first start before one was measured."""

from __future__ import annotations

import pytest

from vllmd.config.types import ModelConfig
from vllmd.engines.start_times import share_begun, start_time
from vllmd.engines.vllm_log import PHASES


@pytest.mark.parametrize(
    ("options", "seconds"),
    [({}, 0.5), ({"load_time": "0s"}, 0.5), ({"load_time": "250ms"}, 0.75), ({"load_time": 2}, 2.5)]
    + [({"load_time": wrong}, 0.5) for wrong in ("soon", True, None, [1])],
)
def test_a_stand_in_says_how_long_it_loads(options: dict[str, object], seconds: float) -> None:
    """Nothing, or something that is no time, is told at its own start: it must not keep the daemon from opening."""
    assert start_time(ModelConfig("m", engine="sim", options=options), "sim", 0) == seconds


def test_the_phases_of_a_start_come_in_the_order_of_their_shares() -> None:
    """Each phase that a kind's log shows has one, downloads count for nothing, and none is the whole start."""
    order = ("configuring", "workers", "weights", "profiling", "compile", "graphs", "warm-up", "serving")
    shares = [share_begun("vllm", phase) or 0.0 for phase in order]
    assert shares == sorted(shares) and shares[0] > 0.0 and shares[-1] < 1.0
    assert {phase for phase, _ in PHASES} == {*order, "nodes", "download", "imports"}  # which come back
    assert share_begun("vllm", "download") == share_begun("llama.cpp", "download") == 0.0
    assert share_begun("vllm", "dancing") is share_begun("no such kind", "weights") is None
