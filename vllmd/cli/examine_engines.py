"""What may be wrong with the engines' programs: ``vllmctl doctor``'s questions about them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from vllmd.config.replicas import engines_of
from vllmd.config.types import Config
from vllmd.engines import vllm_cpu
from vllmd.engines.programs import system_daemon_is_meant, troubles

if TYPE_CHECKING:
    from vllmd.cli.examine import Finding, Host


def programs(host: Host, config: Config) -> Iterator[Finding]:
    """Each engine's program is there and starts, for the user that will run it."""
    system = not host.user and system_daemon_is_meant()
    for each in troubles(engines_of(config.models).values(), system=system):
        yield "bad", f"{', '.join(each.models)}: {each.what}", each.advice


def vllm_on_cpu(host: Host, config: Config) -> Iterator[Finding]:
    """What vLLM needs where there is no GPU."""
    if not any(model.engine == "vllm" for model in engines_of(config.models).values()) or vllm_cpu.has_accelerator():
        return
    for package, what in vllm_cpu.lacks():
        verdict = "bad" if package == "libnuma1" else "warning"
        yield verdict, f"vLLM runs on the CPU here: {what}", f"apt install {package}"
