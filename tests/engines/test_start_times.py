"""What is believed of a first start before one was measured."""

from __future__ import annotations

import pytest

from vllmd.config.types import ModelConfig
from vllmd.engines.start_times import start_time


@pytest.mark.parametrize(
    ("options", "seconds"),
    [({}, 0.5), ({"load_time": "0s"}, 0.5), ({"load_time": "250ms"}, 0.75), ({"load_time": 2}, 2.5)]
    + [({"load_time": wrong}, 0.5) for wrong in ("soon", True, None, [1])],
)
def test_a_stand_in_says_how_long_it_loads(options: dict[str, object], seconds: float) -> None:
    """Nothing, or something that is no time, is told at its own start: it must not keep the daemon from opening."""
    assert start_time(ModelConfig("m", engine="sim", options=options), "sim", 0) == seconds
