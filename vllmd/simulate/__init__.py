"""The production core under a virtual clock, over a trace of requests.

A capacity planner (what if I add a GPU?) and the benchmark of the policies::

    trace     requests from a CSV or JSON-lines file
    physics   how long an engine's starts, wakes, sleeps and tokens take
    engine    one stand-in engine: a batch whose requests share its speed
    baselines what peers do, as policies, for comparison
    world     the clock: hands events to the Scheduler, carries out its commands
    report    what came of it: waits, latencies, swaps, utilisation, memory
    show      tables and JSON of reports
    plot      a picture of them, where matplotlib is installed
    main      ``vllmctl simulate``

Nothing of the scheduling is written twice: ``world`` drives the same
``Scheduler`` that the daemon drives, so what it shows is what the daemon does.
"""

from vllmd.simulate.main import run_cli
from vllmd.simulate.physics import Physics
from vllmd.simulate.report import Report
from vllmd.simulate.trace import Row, TraceError, load_trace
from vllmd.simulate.world import Warm, simulate

__all__ = ["Physics", "Report", "Row", "TraceError", "Warm", "load_trace", "run_cli", "simulate"]
