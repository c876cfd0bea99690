"""What pip's own lines come to: how far it is, and one sentence about what went wrong. Lines of pip 23.0 and 25.1."""

from __future__ import annotations

import pytest

from vllmd.installer.pip import Progress, read, why

WORDS = {
    "kind": "llama.cpp",
    "name": "xllamacpp",
    "wanted": "xllamacpp==9",
    "version": "9",
    "machine": "x86_64, glibc 2.36, Python 3.11.2",
    "where": "the package index",
    "root": "/var/lib/vllmd/engines/llama.cpp",
    "free": "12 MB",
}
RETRYING = (
    "WARNING: Retrying (Retry(total=0, connect=None, read=None, redirect=None, status=None)) after connection broken "
    "by 'NewConnectionError('<pip._vendor.urllib3.connection.HTTPSConnection object at 0x7f>: Failed to establish a "
    "new connection: [Errno -3] Temporary failure in name resolution')': /simple/xllamacpp/"
)
NO_SUCH = "ERROR: Could not find a version that satisfies the requirement xllamacpp==9 (from versions: %s)"
NO_MATCH = "ERROR: No matching distribution found for xllamacpp==9"
OTHER_PYTHON = (
    "ERROR: Ignored the following versions that require a different python version: %s Requires-Python >=3.12"
)


def test_progress_of_a_download_and_what_came_before() -> None:
    """A name, its bytes and those of the files before it; whatever is no news changes nothing."""
    progress = Progress("resolving", "vllm")
    for line in (
        "Collecting torch==2.13.0",
        "  Downloading torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl (200.5 MB)",
        "Looking in indexes: https://x",
        "Collecting numpy",
        "  Downloading numpy-2.3.0-cp311-cp311-manylinux_2_17_x86_64.whl.metadata (62 kB)",
    ):
        progress = read(line, progress)
    assert progress == Progress("resolving", "numpy", fetched=200_500_000)
    progress = read("  Downloading numpy-2.3.0-cp311-cp311-manylinux_2_17_x86_64.whl (16.6 MB)", progress)
    assert (progress.phase, progress.total, progress.fetched) == ("downloading", 16_600_000, 200_500_000)
    progress = read("Installing collected packages: numpy, torch", progress)
    assert progress == Progress("installing", "2 packages", fetched=217_100_000)
    assert read("Processing /srv/wheels/xllamacpp-1.whl", progress).what == "xllamacpp-1.whl"


CAUSES = [
    ([RETRYING, NO_SUCH % "none", NO_MATCH], "the package index cannot be reached"),
    (["ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"], "the disk is full"),
    ([NO_SUCH % "none", NO_MATCH], "there is no xllamacpp==9 for this machine (x86_64, glibc 2.36, Python 3.11.2)"),
    ([NO_SUCH % "6, 7, 8", NO_MATCH], "in the package index; there are 6, 7, 8"),
    ([OTHER_PYTHON % "9", NO_SUCH % "7, 8", NO_MATCH], "there is no xllamacpp for this Python"),
    ([OTHER_PYTHON % "0.1", NO_SUCH % "7, 8", NO_MATCH], "there is no xllamacpp==9 for this machine"),
    (["ERROR: Package 'xllamacpp' requires a different Python: 3.11.2 not in '>=3.12'"], "--python"),
    (["  error: command 'gcc' failed: No such file or directory"], "there is no compiler to build it: apt install gcc"),
    (["  CMake Error: CMAKE_CXX_COMPILER not set", "  No CMAKE_CXX_COMPILER could be found."], "apt install gcc"),
    (["  src/x.c:1:10: fatal error: Python.h: No such file or directory"], "apt install python3-dev"),
    (["ProxyError('Cannot connect to proxy.', OSError('Tunnel connection failed: 403'))", NO_MATCH], "HTTPS_PROXY"),
    (["SSLError(SSLCertVerificationError(1, 'certificate verify failed'))", NO_MATCH], "certificate"),
    (["ERROR: HTTP error 403 while getting https://mirror.example/x.whl"], "wants a user and password"),
    (["ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE."], "SHA-256 differs"),
    (["ERROR: ResolutionImpossible: for help visit https://pip.pypa.io"], "try another version"),
    (["Collecting x", "ERROR: something new"], "pip failed: something new"),
    ([], "pip failed: it said nothing"),
]


@pytest.mark.parametrize(("lines", "told"), CAUSES, ids=[told[:30] for _, told in CAUSES])
def test_one_sentence_says_why_and_what_would_help(lines: list[str], told: str) -> None:
    """Whoever reads it need not know pip; where pip complains of two things, the first cause is told."""
    said = why(lines, **WORDS)
    assert told in said
    assert "\n" not in said
