"""What may be wrong with the engines' programs: ``vllmctl doctor``'s questions about them."""

from __future__ import annotations

from collections.abc import Iterator

from vllmd.config.replicas import engines_of
from vllmd.config.types import Config
from vllmd.engines import vllm_cpu
from vllmd.engines.programs import system_daemon_is_meant, troubles

Finding = tuple[str, str, str]  # verdict, what was found, what to do


def programs(config: Config, *, users: bool) -> Iterator[Finding]:
    """Each engine's program is there and starts, for the user that will run it.

    ``users``: a daemon of ``systemctl --user`` is meant.
    """
    system = not users and system_daemon_is_meant()
    for each in troubles(engines_of(config.models).values(), system=system):
        yield "bad", f"{', '.join(each.models)}: {each.what}", each.advice


def vllm_on_cpu(config: Config) -> Iterator[Finding]:
    """What vLLM needs where there is no GPU."""
    if not any(model.engine == "vllm" for model in engines_of(config.models).values()) or vllm_cpu.has_accelerator():
        return
    for package, what in vllm_cpu.lacks():
        verdict = "bad" if package == "libnuma1" else "warning"
        yield verdict, f"vLLM runs on the CPU here: {what}", f"apt install {package}"
