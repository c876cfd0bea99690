"""Whether a process that has imported torch may be forked, each child with a CUDA of its own.

The question behind it: a process that has imported an engine's libraries and waits could fork an engine in a tenth of
the time that a start takes. That is safe only if nothing before the fork has touched CUDA.
"""

from __future__ import annotations

from tests.gpu.check.bench import Bench

# Runs ``prepare`` in the parent, asks the driver whether that has made the parent a user of the device, forks, and has
# two children in a row, then two at a time, use CUDA.
SCRIPT = """
import json, os, sys, time, warnings
warnings.simplefilter("ignore")
began = time.monotonic()
exec(sys.argv[1])
prepared = time.monotonic() - began
def nodes():
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.add(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            pass
    return sorted(each for each in found if each.startswith("/dev/nvidia"))
def child(report):
    try:
        began = time.monotonic()
        import torch
        torch.cuda.init()
        block = torch.full((1 << 20,), 3, dtype=torch.uint8, device="cuda:0")
        torch.cuda.synchronize()
        took = time.monotonic() - began
        total = int(block.sum().item()) if hasattr(block, "sum") else 3 << 20
        answer = "good" if total == 3 << 20 else f"wrong sum {total}"
        os.write(report, json.dumps([answer, took]).encode())
    except BaseException as error:
        os.write(report, json.dumps([f"{type(error).__name__}: {error}".splitlines()[0][:160], 0.0]).encode())
    finally:
        os._exit(0)
def fork():
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        child(writer)
    os.close(writer)
    return pid, reader
def result(pid, reader):
    data = b""
    while part := os.read(reader, 4096):
        data += part
    os.waitpid(pid, 0)
    return json.loads(data)
answers = [result(*fork()) for _ in range(2)]
pair = [fork(), fork()]
answers += [result(*each) for each in pair]
import torch
print(json.dumps({"answers": answers, "nodes": nodes(), "initialised": torch.cuda.is_initialized(),
                  "prepared": prepared, "threads": len(os.listdir("/proc/self/task"))}))
"""
CASES = (
    ("import torch", "import torch", True),
    ("import transformers too", "import torch, transformers, accelerate", True),
    ("device_count()", "import torch; torch.cuda.device_count()", True),
    ("is_available(), checked by NVML",
     "import os; os.environ['PYTORCH_NVML_BASED_CUDA_CHECK'] = '1'; import torch; torch.cuda.is_available()", True),
    ("is_available()", "import torch; torch.cuda.is_available()", None),
    ("a CUDA context (must fail)", "import torch; torch.cuda.init()", False),
)  # fmt: skip


def run(bench: Bench) -> None:
    """One row a case: what the parent did before the fork, and what became of four children."""
    cases = {
        what: (prepare, good) for what, prepare, good in CASES if bench.transformers or "transformers" not in prepare
    }
    env = {"CUDA_VISIBLE_DEVICES": bench.device.id}
    for what, told in bench.scripts(SCRIPT, {what: ((prepare,), env) for what, (prepare, _) in cases.items()}).items():
        good = cases[what][1]
        words = sorted({answer for answer, _ in told["answers"]})
        times = [took for answer, took in told["answers"] if answer == "good"]
        seen = f"children: {', '.join(words)}" + (f" in {max(times):.2f} s" if times else "")
        seen += f"; parent: {told['prepared']:.1f} s, {told['threads']} threads, "
        seen += ", ".join(told["nodes"]) or "no device open"
        wanted = {True: "children compute", False: "children fail", None: ""}[good]
        bench.table.add(f"fork after {what}", wanted, seen, None if good is None else (words == ["good"]) == good)
