"""What a chat's stream costs on Ollama's route, beside the same on OpenAI's: CPU time of the daemon, same upstream.

    python -m tests.bench.ollama [--rounds 5] [--seconds 3]

64 streams at a time, in turn on either route. Once with an event each 5 milliseconds, as engines send them; once with
all 64 events in one write of the upstream. Told is the least CPU time per event of any round, since other programs
only ever add to it. The aim is a ratio of at most 1.5 where events come one by one. Needs wrk.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path

from tests.bench.proxy import AT_ONCE, LUA, PACED, chat, cpu_time
from tests.bench.proxy_servers import Runner, running
from tests.bench.proxy_upstream import EVENTS

OPENAI, OLLAMA = "/v1/chat/completions", "/api/chat"
REQUESTS = "requests in"


def cost(runner: Runner, path: str, words: str, seconds: int) -> float:
    """Microseconds of CPU per event in one round."""
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(LUA.format(body=chat(words, stream=True).decode()).replace(OPENAI, path))
        script.flush()
        argv = ["wrk", "-t1", "-c64", f"-d{seconds}s", "--timeout", "10s", "-s", script.name]
        before = cpu_time(runner)
        out = subprocess.run(
            [*argv, f"http://127.0.0.1:{runner.port}"], capture_output=True, text=True, check=True
        ).stdout
    if "Non-2xx" in out or "Socket errors" in out:
        raise SystemExit(out)
    number = int(next(line.split()[0] for line in out.splitlines() if REQUESTS in line))
    return (cpu_time(runner) - before) / number / EVENTS


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=3, help="of a round")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, words = Path(name), chat(stream=False)
        with running("upstream", 0, folder, words) as upstream:
            if upstream is None:
                raise SystemExit("the upstream does not answer")
            with running("vllmd", upstream.port, folder, words) as vllmd:
                if vllmd is None:
                    raise SystemExit("vllmd does not answer")
                for about, asked in (("one by one", PACED), ("at once", AT_ONCE)):
                    rounds = [[cost(vllmd, path, asked, options.seconds) for path in (OPENAI, OLLAMA)]
                              for _ in range(options.rounds)]  # fmt: skip
                    openai, ollama = (min(each) for each in zip(*rounds, strict=True))
                    print(
                        f"events {about}: {openai:.2f} us on {OPENAI}, {ollama:.2f} on {OLLAMA}: {ollama / openai:.2f}"
                    )


if __name__ == "__main__":
    main()
