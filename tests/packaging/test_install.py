"""``packaging/install``: vllmd on a systemd machine without a package, from a checkout."""

from __future__ import annotations

import pytest

from tests.machine import container
from tests.machine.container import REPOSITORY, CannotBoot

pytestmark = pytest.mark.machine

# There is no network in here: an environment is made whose pip `installs` the checkout by pointing at it.
PYTHON = r"""#!/bin/bash
[[ $1 == -m && $2 == venv ]] || exec /usr/bin/python3 "$@"
bin=${!#}/bin
mkdir -p "$bin"
cat >"$bin/pip" <<'END'
#!/bin/bash
bin=$(dirname "$0")
for pair in vllmd:vllmd vllmctl:vllmd.cli vllmd-launcher:vllmd.launcher; do
    printf '#!/bin/sh\nPYTHONPATH=/opt/vllmd exec /usr/bin/python3 -m %s "$@"\n' "${pair#*:}" >"$bin/${pair%:*}"
    chmod 755 "$bin/${pair%:*}"
done
END
chmod 755 "$bin/pip"
"""
ASK = (
    "curl -sSf --max-time 60 http://127.0.0.1:33258/v1/completions -H 'Content-Type: application/json' "
    """-d '{"model": "m", "prompt": "out of a checkout"}'"""
)


def test_it_serves_and_can_be_removed() -> None:
    """Its units start the commands that it installed: in /usr/local, where no package puts anything."""
    try:
        with container.booted(binds={REPOSITORY: "/opt/vllmd"}) as machine:
            machine.write("/root/python", PYTHON, mode="755")
            machine.write("/etc/vllmd/vllmd.yaml", "devices: []\nmodels: {m: {engine: sim}}\n")
            machine.run("PYTHON=/root/python /opt/vllmd/packaging/install", timeout=120)
            assert "out of a checkout" in machine.out(ASK)
            assert "path=/usr/local/bin/vllmd " in machine.show("vllmd.service", "ExecStart")
            assert "path=/usr/local/bin/vllmctl " in machine.show("vllmd.service", "ExecReload")
            assert "path=/usr/local/bin/vllmd-launcher " in machine.show("vllmd-launcher.service", "ExecStart")
            machine.run("systemctl reload vllmd.service")
            machine.run("/opt/vllmd/packaging/install --remove")
            assert machine.run("ls /usr/local/bin/vllm* /usr/local/lib/systemd/system/*", check=False).stdout == ""
            assert machine.cgroup_pids("vllmd.slice") == []
    except CannotBoot as reason:
        pytest.skip(f"no container: {reason}")
