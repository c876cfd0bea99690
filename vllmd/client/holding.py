"""A lease on a model that a thread renews, so that a program that dies does not keep its model loaded."""

from __future__ import annotations

import contextlib
import getpass
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable

from vllmd.client.sync import Client
from vllmd.errors import UnknownModel, VllmdError

log = logging.getLogger("vllmd.client")

KEEP = 60.0  # seconds of a lease from its last renewal on
RENEW = 20.0  # seconds between renewals


class Holding:
    """One lease of one program on one model. Methods may be called from any thread."""

    def __init__(self, client: Client, model: str, introduce: Callable[[], None]) -> None:
        """``introduce`` makes the model known to a daemon that was started anew, and forgot it."""
        self._client, self._model, self._introduce = client, model, introduce
        try:
            user = getpass.getuser()
        except (KeyError, OSError):  # a uid without a name
            user = str(os.getuid())
        self.lease = f"{user}-{os.getpid()}-{secrets.token_hex(4)}"
        self._lock = threading.Lock()
        self._renewing: threading.Event | None = None  # set to end the present renewals
        self._deadline: float | None = None

    @property
    def remaining(self) -> float | None:
        """Seconds until the lease ends by itself; None while it is renewed, or has ended."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    @property
    def kept(self) -> bool:
        """Whether a thread renews the lease, so that it does not end."""
        return self._renewing is not None

    def keep(self) -> None:
        """Take the lease, and renew it until another method ends that; a countdown is cancelled."""
        with self._lock:
            self._client.lease_model(self._model, self.lease, KEEP)
            self._deadline = None
            if self._renewing is None:
                self._renewing = ended = threading.Event()

                def renew() -> None:
                    while not ended.wait(RENEW):
                        with self._lock:
                            if not ended.is_set():
                                self.renew_once()

                threading.Thread(target=renew, name="lease", daemon=True).start()

    def count_down(self, seconds: float) -> None:
        """Let the lease end in ``seconds``, even if this program has ended; the last lease to end stops the model."""
        with self._lock:
            self._end_renewals()
            self._client.lease_model(self._model, self.lease, seconds)
            self._deadline = time.monotonic() + seconds

    def give_back(self) -> None:
        """Give the lease back now; if it was the last one, the model stops."""
        with self._lock:
            self._end_renewals()
            self._deadline = None
            self._client.release_model(self._model, self.lease, stop=True)

    def forget(self) -> None:
        """Stop renewing; the daemon has ended, or will let the lease run out."""
        with self._lock:
            self._end_renewals()
            self._deadline = None

    def _end_renewals(self) -> None:
        if self._renewing:
            self._renewing.set()
            self._renewing = None

    def renew_once(self) -> None:
        """Renew the lease; a daemon that does not know the model gets it again. Errors wait for the next renewal."""
        try:
            self._client.lease_model(self._model, self.lease, KEEP)
        except UnknownModel:
            with contextlib.suppress(VllmdError):
                self._introduce()
                self._client.lease_model(self._model, self.lease, KEEP)
        except VllmdError as error:  # the daemon may be restarting
            log.info("%s: its lease was not renewed: %s", self._model, error.message)
