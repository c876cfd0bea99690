"""Python's cycle collector, kept from holding up streams where there are many models.

The problem: a full collection looks at every object there is. Ten thousand models are a million objects, and looking at
them takes a quarter of a second in which no token passes. Reading a configuration of that size makes so many objects
that the collector does so again and again, and takes half of the time.

So it does not run while much is made that stays, and what stays is then put out of its sight: once after the start,
for what the daemon is made of are a hundred thousand objects with ten models as well (20 milliseconds at each full
collection), and after each reload of many models. Nothing is lost by that: what a reload replaces is freed when the
last reference to it goes, for it has no cycles (a model and its replicas do, and the core cuts those when it forgets
them).
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

MANY = 1000  # models; what fewer leave at a reload is left to the collector


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """While it lasts, Python's cycle collector does not run."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def exempt_existing() -> None:
    """Never look again at what is there now."""
    gc.freeze()
