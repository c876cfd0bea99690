"""vLLM over several machines: its ranks are actors of a Ray cluster, of which this machine is a node.

``ray_head`` has the engine bring a cluster of its own: its head is started in the
engine's scope, with the devices that the ledger gave it and no others, and dies
with it. Other machines' nodes wait for it to appear. ``ray_address`` joins a
cluster that somebody else runs, and which devices it takes here is then Ray's choice.

Facts about vLLM 0.32 and Ray 2.60 that shape this:

- vLLM waits half an hour for devices that the cluster does not have, and Ray's
  client for ever for a cluster that does not answer: ``ray_start`` looks first.
- When a node is lost, vLLM ends by itself, 4 s after Ray's death there and about a
  minute after a machine has fallen silent (Ray's own health check): there is nothing to probe.
- On SIGTERM vLLM frees its actors everywhere before it ends. After SIGKILL they go
  with the driver if the head lives, else when their node misses the head
  (RAY_gcs_rpc_server_reconnect_timeout_s there, 60 by default).
- Sleep and wake reach all ranks, as with any other executor.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from vllmd.config.types import ModelConfig
from vllmd.engines.options import text, whole, wrong, wrong_setting
from vllmd.frozen import frozen

OPTIONS: Mapping[str, str] = {
    "ray_head": "address and port such as 10.0.0.1:6379 at which it starts a Ray head of its own, for several machines",
    "ray_address": "address and port of the head of a Ray cluster that it joins instead",
    "ray_wait": "seconds that it waits for as many free devices as it needs (default 120)",
}
INSTALL = "install it where vLLM is, on every machine in the same version: pip install ray"
WAIT = 120
_START = str(Path(__file__).with_name("ray_start.py"))
_MISS_HEAD = "RAY_gcs_rpc_server_reconnect_timeout_s"  # seconds after which nodes give up a head
_BACKEND = "--distributed-executor-backend"


@frozen
class Cluster:
    """Whose ranks where: ``needed`` devices in all, ``here`` of them this machine's. ``wait`` in seconds."""

    host: str
    port: int
    is_ours: bool
    here: int
    needed: int
    wait: int

    def start(self, argv: Sequence[str]) -> tuple[str, ...]:
        """The command that sees to the cluster and then becomes ``argv``."""
        settings = {
            "host": self.host, "port": self.port, "head": self.is_ours, "here": self.here, "needed": self.needed,
            "wait": self.wait,
        }  # fmt: skip
        backend = () if _BACKEND in argv else (_BACKEND, "ray")
        return (sys.executable, "-P", _START, json.dumps(settings), *argv, *backend)

    def env(self) -> dict[str, str]:
        """What Ray and vLLM have to know, in the head as in vLLM."""
        env = {"RAY_USAGE_STATS_ENABLED": "0"}
        return env | {"VLLM_HOST_IP": self.host, _MISS_HEAD: "5"} if self.is_ours else env


def cluster_of(model: ModelConfig) -> Cluster | None:
    """The cluster that the options ask for. Raises ConfigError for options that cannot work."""
    head, address = text(model, "ray_head"), text(model, "ray_address")
    if not head and not address:
        return None
    if head and address:
        raise wrong(model, "ray_address", "either ray_head, for a cluster of its own, or this, for one that is there")
    if model.local_devices is None:
        what = f"say how many of its {model.all_devices} devices are this machine's: the others are Ray's"
        raise wrong_setting(model, "local_devices", what)
    name = "ray_head" if head else "ray_address"
    host, port = _address(model, name, head or address)
    wait = whole(model, "ray_wait")
    return Cluster(host, port, bool(head), model.local_devices, model.all_devices, WAIT if wait is None else wait)


def _address(model: ModelConfig, name: str, value: str) -> tuple[str, int]:
    host, _, port = value.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise wrong(model, name, "it must be an address with a port such as 10.0.0.1:6379")
    if name == "ray_head" and not _is_reachable(host):
        raise wrong(model, name, "its address must be an IP address of this machine at which other machines reach it")
    return host, int(port)


def _is_reachable(host: str) -> bool:
    """Names of machines often stand for 127.0.1.1 at home."""
    import ipaddress  # 7 ms that few models need

    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return not address.is_loopback and not address.is_unspecified
