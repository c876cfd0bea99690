"""Values on the command line, read as the configuration reads them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllmd.config.value_types import Kind


def duration(text: str) -> float:
    """Seconds from 300, 5m or 1h30m."""
    from vllmd.config.value_types import PAUSE

    return float(parse(PAUSE, text))


def parse(kind: Kind, text: str) -> Any:
    """A value of a kind of the configuration; argparse reports what is wrong with it."""
    from vllmd.config.nodes import Where, from_text
    from vllmd.config.value_types import Wrong

    try:
        return kind.parse(from_text(text, Where("command line")))
    except Wrong as error:
        accepted = error.accepted or kind.accepts
        raise argparse.ArgumentTypeError(f"{error.reason}; accepted: {accepted}") from None
