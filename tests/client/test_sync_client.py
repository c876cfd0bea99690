"""The client for programs that wait is made of the one for asyncio."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def test_the_synchronous_client_is_current() -> None:
    """Whoever changes a method of ``asynchronous.py`` runs packaging/dev/sync-client: nothing is written twice."""
    script = [sys.executable, str(REPOSITORY / "packaging/dev/sync-client"), "--print"]
    made = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    assert (REPOSITORY / "vllmd/client/sync.py").read_text() == made
