"""What is done to the machine: shell lines, each of which leaves it able to recover by itself.

Those that kill do so as often as $TIMES says, with short pauses, and print "killed" each time.
Engines hang by the stand-in's failures on demand, which they read from FAILURES whenever these matter.
"""

from __future__ import annotations

FAILURES = "/run/failures"
DISKS = ("/var/cache/vllmd", "/var/log/vllmd", "/run/vllmd-engine")  # small ones of their own, see chaos.py


def _kill(*units: str) -> str:
    """Of units that have a main process just then; others cannot be killed. Not eight within five seconds, after
    which systemd gives a unit up, and closes its sockets."""
    return _often(f"systemctl kill -s KILL --kill-who=main {' '.join(units)} 2>/dev/null", "0.$((RANDOM % 30 + 70))")


def _often(once: str, pause: str) -> str:
    return f"for n in $(seq ${{TIMES:-1}}); do {once} && echo killed; sleep {pause}; done"


def _engines(failure: str, seconds: float) -> str:
    """Have every engine fail so for a while."""
    return f"echo {failure} >{FAILURES}; sleep {seconds}; : >{FAILURES}"


def _one_engine(signal: str) -> str:
    return f"kill -{signal} $(pgrep -u vllmd-engine | shuf -n 1) 2>/dev/null"


def _disks(before: str, after: str) -> str:
    each = " ".join(DISKS)
    return f"for d in {each}; do {before}; done; sleep 3; for d in {each}; do {after}; done"


PROCESSES: dict[str, str] = {
    "kill the daemon": _kill("vllmd.service"),
    "kill the launcher": _kill("vllmd-launcher.service"),
    "kill both": _kill("vllmd.service", "vllmd-launcher.service"),
    "kill an engine": _often(_one_engine("KILL"), "0.$((RANDOM % 5))"),
    "stop": "systemctl stop vllmd.service",
    "restart": "systemctl restart vllmd.service",
    "restart the sockets": "systemctl restart vllmd.socket",
    "restart the bus": "systemctl restart dbus.service",
    "re-execute systemd": "systemctl daemon-reexec",
    "restart journald": "systemctl restart systemd-journald.service",
    "stop the launcher for a moment": "p=$(systemctl show -P MainPID vllmd-launcher); [ $p != 0 ] && "
    "{ kill -STOP $p; sleep 0.7; kill -CONT $p; }",
}
SETTINGS: dict[str, str] = {
    "reload": "systemctl reload vllmd.service",
    "reload another model": "sed -i 's/tokens_per_second: 4[01]/tokens_per_second: 4'$((RANDOM % 2))'/' "
    "/etc/vllmd/vllmd.yaml; systemctl reload vllmd.service",
}
HANGS: dict[str, str] = {
    "starts hang": _engines("never-ready", 1.5),
    "starts fail": _engines("exit-at-start", 1.0),
    "sleeps hang": _engines("sleep-hang", 2.0),
    "sleeps keep memory": _engines("sleep-keeps-memory", 2.0),
    "wakes hang": _engines("wake-hang", 2.0),
    "wakes fail": _engines("wake-500", 2.0),
    "engines are deaf to SIGTERM": _engines("ignore-sigterm", 2.0),
    "engines do not answer a look": _engines("hang-health", 3.0),
    "engines are dead": _engines("dead", 2.0),
    "engines die in mid-stream": _engines("crash-mid-stream", 1.0),
    "an engine's socket goes": "rm -f $(ls -d /run/vllmd-engine/*/engine.sock | shuf -n 1)",
}
DISKS_OUT: dict[str, str] = {
    "disks are full": _disks("head -c 100M /dev/zero >$d/fill 2>/dev/null", "rm -f $d/fill"),
    "disks are read-only": _disks("mount -o remount,ro $d", "mount -o remount,rw $d"),
}
# It takes the daemon most of a minute to be sure of this one, so not in the short version.
SLOW: dict[str, str] = {"an engine is stopped by a signal": _one_engine("STOP")}
QUICK = {**PROCESSES, **SETTINGS, **HANGS, **DISKS_OUT}
ALL = {**QUICK, **SLOW}
