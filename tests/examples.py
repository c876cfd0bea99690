"""How Hypothesis looks for examples: how long one takes says how busy the machine is, and nothing of what is tested."""

from __future__ import annotations

import hypothesis

hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")
