"""Running pip: its progress, and the cause of a failure in one sentence.

pip shows no progress where no terminal is. Its phase is read from its lines, whose form has not changed for years
(22 to 26 were looked at); the progress of a download is the size of the file that it grows, in a folder for temporary
files that no other process uses.
"""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from vllmd.frozen import frozen

TICK = 0.5  # seconds between looks at a download
KEPT = 400  # lines of output
UNITS = {"B": 1, "kB": 1000, "MB": 10**6, "GB": 10**9}


@frozen
class Progress:
    """The progress of an installation: phase and object; of a download its bytes; and the bytes of all before it."""

    phase: str
    what: str = ""
    done: int = 0
    total: int = 0
    fetched: int = 0


Say = Callable[[Progress], None]

_DOWNLOADING = re.compile(r"\s*Downloading (?:\S*/)?(\S+\.(?:whl|tar\.gz|zip))(?!\S)(?: \(([\d.]+) ?(B|kB|MB|GB)\))?")
_COLLECTING = re.compile(r"\s*Collecting (\S+)")
_PROCESSING = re.compile(r"\s*Processing (?:\S*/)?(\S+)")
_BUILDING = re.compile(r"\s*Building wheels? for (?:collected packages: )?(\S+)")
_INSTALLING = re.compile(r"Installing collected packages: (.*)")


def read(line: str, before: Progress) -> Progress:
    """The progress after a line of pip's output."""
    fetched = before.fetched + (before.total if before.phase == "downloading" else 0)
    if found := _DOWNLOADING.match(line):
        total = int(float(found[2]) * UNITS[found[3]]) if found[2] else 0
        return Progress("downloading", found[1], 0, total, fetched)
    for pattern, phase in ((_COLLECTING, "resolving"), (_PROCESSING, "unpacking"), (_BUILDING, "building")):
        if found := pattern.match(line):
            return Progress(phase, found[1], fetched=fetched)
    if found := _INSTALLING.match(line):
        count = len(found[1].split(","))
        return Progress("installing", f"{count} package{'s' * (count != 1)}", fetched=fetched)
    return before


def run(
    argv: Sequence[str], env: Mapping[str, str], say: Say, began: Progress, limit: float | None = None
) -> tuple[int, list[str]]:
    """Run a program to its end. Returns its exit status and its last lines.

    ``say`` gets the progress at least every half second; an exception that it raises ends the program with its
    children. ``env`` has TMPDIR. ``limit``: seconds after which the program is ended, with status 124.
    """
    process = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=dict(env),
        cwd=env["TMPDIR"],
        start_new_session=True,
    )
    lines, progress, rest = list[str](), began, b""
    end = time.monotonic() + limit if limit else None
    try:
        with selectors.DefaultSelector() as selector:
            assert process.stdout is not None
            selector.register(process.stdout, selectors.EVENT_READ)
            while True:
                if selector.select(TICK):
                    read_now = os.read(process.stdout.fileno(), 65536)
                    if not read_now:
                        break
                    *whole, rest = (rest + read_now).split(b"\n")
                    for line in (each.decode(errors="replace") for each in whole):
                        progress = read(line, progress)
                        lines = [*lines[1 - KEPT :], line]
                with contextlib.suppress(OSError):
                    if progress.phase == "downloading":
                        sizes = [path.stat().st_size for path in Path(env["TMPDIR"]).glob(f"*/{progress.what}")]
                        progress = replace(progress, done=max(sizes, default=0))
                say(progress)
                if end and time.monotonic() > end:
                    return 124, lines
        return process.wait(), [*lines, rest.decode(errors="replace")]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@frozen
class Cause:
    """A cause of pip's failures, by a pattern of its output; ``what``: the cause in words, and what would help."""

    pattern: re.Pattern[str]
    what: str


def _row(pattern: str, what: str) -> Cause:
    return Cause(re.compile(pattern, re.I), what)


# The first that matches any line counts: a full disk and a missing network make pip complain of other things, too.
CAUSES = (
    _row(
        r"No space left on device|Disk quota exceeded",
        "the disk is full: {free} free in {root}; free some, then try again",
    ),
    _row(
        r"CERTIFICATE_VERIFY_FAILED|SSLCertVerificationError|certificate verify failed",
        "the package index has a certificate that this machine does not trust: add its authority "
        "(update-ca-certificates, or PIP_CERT), or set the clock right",
    ),
    _row(
        r"ProxyError|Cannot connect to proxy|407 Proxy",
        "the proxy that HTTPS_PROXY or HTTP_PROXY names refuses or does not answer: set it right",
    ),
    _row(
        r"HTTP error (?:401|403)|(?:401|403) Client Error|\b401 Error|Credentials not correct",
        "the package index refuses: it wants a user and password in --index-url, or in pip.conf(5)",
    ),
    _row(
        r"Temporary failure in name resolution|Name or service not known|No address associated|NameResolutionError"
        r"|Network is unreachable|No route to host|NewConnectionError|ConnectTimeoutError|ReadTimeoutError"
        r"|Connection refused|Connection reset|Connection aborted|Read timed out|Remote end closed|IncompleteRead"
        r"|broken by 'ProtocolError",
        "the package index cannot be reached: without a network of its own a machine needs HTTPS_PROXY, the "
        "--index-url of a mirror, or a folder of wheels with --offline",
    ),
    _row(
        r"DO NOT MATCH THE HASHES",
        "what came is not what the package index says it is (its SHA-256 differs): try again",
    ),
    _row(
        r"requires a different python",
        "there is no {name} for this Python ({machine}): name another one with --python, such as /usr/bin/python3.12, "
        "or an older version of {kind}",
    ),
    _row(
        r"unable to execute '?\S*(?:gcc|g\+\+|cc|clang)|command '?\S*(?:gcc|g\+\+|cc)'? failed: No such file"
        r"|No such file or directory: '?\S*(?:gcc|g\+\+|cc|cmake|ninja)'?|No CMAKE_CXX?_COMPILER|Unknown compiler"
        r"|Failed to find .*compiler|Microsoft Visual|error: can't find Rust compiler|cargo.* not (?:found|installed)",
        "one of its packages has no wheel for this machine ({machine}) and there is no compiler to build it: "
        "apt install gcc g++ python3-dev, then try again",
    ),
    _row(r"fatal error: Python\.h", "Python's headers are missing: apt install python3-dev, then try again"),
    _row(r"ResolutionImpossible|conflicting dependencies", "its packages contradict each other: try another version"),
    _row(
        r"No matching distribution found for|Could not find a version that satisfies",
        "there is no {wanted} for this machine ({machine}) in {where}",
    ),
    _row(r"is not a supported wheel on this platform", "a wheel is for another machine than this one ({machine})"),
    _row(r"MemoryError|Cannot allocate memory", "there was not enough memory to install it"),
)
_VERSIONS = re.compile(r"Could not find a version that satisfies the requirement \S+ \(from versions: (.*)\)")
_IGNORED = re.compile(r"Ignored the following versions that require a different python version: (.*)", re.I)
OTHERS = 4  # versions that are named where the one that is wanted does not exist


def why(lines: Iterable[str], **words: str) -> str:
    """One sentence with the cause, and what would help. ``words`` fill the places in CAUSES."""
    output, version = [line.strip() for line in lines if line.strip()], words.get("version", "")
    ignored = next((match[1] for line in output if (match := _IGNORED.search(line))), "")
    offered = next((match[1] for line in output if (match := _VERSIONS.search(line))), "")
    # pip lists versions for other Pythons whatever it lacks: they are the cause only if the one wanted is among them.
    is_ignored = re.search(rf"(?:^|[ ;]){re.escape(version)}\b", ignored) if version else ignored and offered == "none"
    if is_ignored:
        output = ["requires a different Python", *output]
    newest = ", ".join(offered.split(", ")[-OTHERS:])
    instead = f"; there are {newest}" if offered not in ("none", "") else ""
    for cause in CAUSES:
        if any(cause.pattern.search(line) for line in output):
            return cause.what.format(**words) + instead
    errors = [line for line in output if re.match(r"(?:ERROR|error|fatal)\b", line)]
    return f"pip failed: {(errors or output or ['it said nothing'])[-1].removeprefix('ERROR: ')}"
