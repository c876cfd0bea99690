"""Python's cycle collector, kept from holding up streams where there are many models.

The problem: a full collection looks at every object there is. Ten thousand models are a million objects, and looking at
them takes a quarter of a second in which no token passes. Reading a configuration of that size makes so many objects
that the collector does so again and again, and takes half of the time.

So it does not run while much is made that stays, and what stays is then put out of its sight, before it runs again: in
the start, for what the daemon is made of are a hundred thousand objects with ten models as well (20 milliseconds at
each full collection), and after each reload of many models. Nothing is lost by that: what a reload replaces is freed
when the last reference to it goes, for it has no cycles (a model and its replicas do, and the core cuts those when it
forgets them).

Nor does it look at each 700 new objects, as it does from the start on: that is what ten requests are made of, and all
of them are still under way then, so that it frees nothing, and looks at them a second time before they end.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

MANY = 1000  # models; what fewer leave at a reload is left to the collector
YOUNG = 10_000  # objects with references that are made and not freed before it looks at them: a hundred requests'


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
    """Never look again at what is there now, and less often at what comes; once the daemon is up."""
    gc.freeze()
    gc.set_threshold(YOUNG, *gc.get_threshold()[1:])
