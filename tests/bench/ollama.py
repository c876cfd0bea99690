"""What a chat's stream costs on Ollama's route, beside the same on OpenAI's: CPU time of the daemon, same upstream.

    python -m tests.bench.ollama [--rounds 30] [--events "at once"]

A stream of 64 events at a time on a kept connection, in lock step, some of them on one route and then on the other.
Once with an event each millisecond, as engines send them; once with all events in one write of the upstream. Told is
the least CPU time per event of any round, since other programs only ever add to it. The aim is a ratio of at most 1.5
where events come one by one.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from tests.bench.proxy import chat, cpu_time, raw
from tests.bench.proxy_servers import Runner, running
from tests.bench.proxy_upstream import EVENTS
from tests.bench.request_path import answer, connected

OPENAI, OLLAMA = b"/v1/chat/completions", b"/api/chat"
KINDS = {"one by one": (f"pace {EVENTS} 1", 3), "at once": ("at once", 40)}  # what is asked, and so often in a round


def costs(runner: Runner, words: str, number: int, rounds: int) -> list[float]:
    """The least microseconds of CPU per event on either route."""
    request = raw(chat(words, stream=True))
    sock, least = connected(runner.port), [float("inf")] * 2
    for _ in range(rounds):
        for place, path in enumerate((OPENAI, OLLAMA)):
            asked = request.replace(OPENAI, path)
            before = cpu_time(runner)
            for _ in range(number):
                answer(sock, asked)
            least[place] = min(least[place], (cpu_time(runner) - before) / number / EVENTS)
    return least


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--events", choices=KINDS, help="how they come; without it one way after the other")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, words = Path(name), chat(stream=False)
        with running("upstream", 0, folder, words) as upstream:
            if upstream is None:
                raise SystemExit("the upstream does not answer")
            with running("vllmd", upstream.port, folder, words) as vllmd:
                if vllmd is None:
                    raise SystemExit("vllmd does not answer")
                for about in [options.events] if options.events else KINDS:
                    openai, ollama = costs(vllmd, *KINDS[about], options.rounds)
                    print(f"events {about}: {openai:.2f} us on {OPENAI.decode()}, {ollama:.2f} on {OLLAMA.decode()}: "
                          f"{ollama / openai:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
