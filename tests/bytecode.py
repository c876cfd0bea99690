"""Whatever PYTHONDONTWRITEBYTECODE says, here and in what tests start. Imported before all that is large.

Hundreds of daemons are started from this checkout, and without bytecode each compiles all of it: 0.8 s of processor
time. pytest rewrites the asserts of the tests and of Hypothesis, and keeps that as bytecode, too: 5 s for each worker.
"""

from __future__ import annotations

import os
import sys

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
