"""Names that are safe wherever systemd, a file system or a socket needs one."""

from __future__ import annotations

import hashlib
import re


def unit_name(model: str, salt: str = "") -> str:
    """A name of [a-z0-9.-], at most 49 characters, for model ``model``: readable, and different for different models.

    ``salt`` makes a further one for the same model, so that a scope's name is not used again too early.
    """
    plain = re.sub(r"[^a-z0-9.]+", "-", model.lower()).strip("-.")[:40] or "model"
    return f"{plain}-{hashlib.sha256(f'{model}/{salt}'.encode()).hexdigest()[:8]}"
