"""The environment of a real vLLM on the CPU, with which tests start it."""

from __future__ import annotations

from pathlib import Path

# One thread: vLLM takes one for each core, and while they wait for each other they spin. Beside other tests an answer
# of 16 tokens then costs 3 s of processor time instead of 0.3.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
ENV = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    **ONE_THREAD,
}
# An entry of PYTHONPATH for tests that claim nothing of how vLLM starts: 24 s of processor time instead of 42.
FORKING = Path(__file__).parent / "engines/forking"
ENV_FORKING = {**ENV, "PYTHONPATH": str(FORKING)}
