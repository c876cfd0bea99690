"""A small real model on the GPU: ``transformers serve`` through the daemon, awake, asleep, awake again."""

from __future__ import annotations

import time

from tests.gpu.check.attribution import alive
from tests.gpu.check.bench import REPOSITORY, Bench, MiB, gib, wait_for
from tests.gpu.check.daemon import Site, site

LAYERS = 12  # of 1024 wide: about 0.15 G weights in bf16, enough to be seen beside a CUDA context

MAKE = """
import json, runpy, sys
from transformers import Qwen3Config, Qwen3ForCausalLM
import torch
made = runpy.run_path(sys.argv[1])
made["make_tokenizer"]().save_pretrained(sys.argv[2])
torch.manual_seed(33258)
config = Qwen3Config(vocab_size=4096, hidden_size=1024, intermediate_size=4096, num_hidden_layers=int(sys.argv[3]),
                     num_attention_heads=16, num_key_value_heads=8, head_dim=64, max_position_embeddings=2048,
                     tie_word_embeddings=True, bos_token_id=0, eos_token_id=2)
model = Qwen3ForCausalLM(config).to(torch.bfloat16)
model.save_pretrained(sys.argv[2])
print(json.dumps({"bytes": sum(each.numel() * each.element_size() for each in model.parameters())}))
"""


def run(bench: Bench) -> None:
    """Needs the command ``transformers`` with what its ``serve`` needs; without it the part says so."""
    add = bench.table.add
    if not bench.transformers:
        bench.table.figure("transformers serve", "skipped: there is no command transformers")
        return
    folder = bench.folder / "model"
    size = bench.script(MAKE, str(REPOSITORY / "packaging/dev/make-tiny-model"), str(folder), str(LAYERS))["bytes"]
    model = {"engine": "transformers", "model": str(folder), "command": list(bench.transformers), "gpu_memory": 0.1,
             "dtype": "bfloat16", "log_file": True, "start_timeout": "150s", "max_restarts": 0,
             "env": {"PYTHONPATH": bench.environment()["PYTHONPATH"], **bench.torch}}  # fmt: skip
    before = bench.sample().used
    with site(bench, "served", {"models": {"real": model}}) as here:
        began = time.monotonic()
        status, text, finish = here.chat("real")
        took = time.monotonic() - began
        add("first answer, from nothing", "200", f"{status} {finish} {text[:60]!r} after {took:.1f} s", bool(finish))
        if not finish:
            print(text, here.engine_logs()[-3000:], here.log("daemon1")[-3000:])
            return
        for stream in (True, False):
            began = time.monotonic()
            status, text, finish = here.chat("real", stream=stream)
            seen = f"{status} {finish} {text[:40]!r} after {time.monotonic() - began:.2f} s"
            add("a further answer" + (", streamed" if stream else ""), "200", seen, bool(finish))
        _asleep(bench, here, size)
        pid = here.model("real")["pid"]
    gone = wait_for(lambda: bench.sample().used <= before + 64 * MiB and not alive(pid), 5.0)
    add("after the end its memory is back", gib(before), gib(bench.sample().used), gone)


def _asleep(bench: Bench, here: Site, weights: int) -> None:
    """Level 2 drops the weights, a request brings them back."""
    awake = bench.sample().used
    here.admin("models/real/sleep", {"level": 2})
    wait_for(lambda: here.model("real")["state"] == "sleeping_l2", 30.0, 0.2)
    state, asleep = here.model("real")["state"], bench.sample().used
    bench.table.add("asleep at level 2", f"at least {gib(weights / 2)} less", f"{state}, {gib(awake - asleep)} less",
                    state == "sleeping_l2" and awake - asleep >= weights // 2)  # fmt: skip
    began = time.monotonic()
    status, _, finish = here.chat("real")
    bench.table.add("an answer after the sleep", "200", f"{status} {finish} after {time.monotonic() - began:.1f} s",
                    bool(finish))  # fmt: skip
