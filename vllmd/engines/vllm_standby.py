"""What a standby of vLLM imports, and what its imports read.

Facts about 0.32 that shape this file (its source read, and run on a CPU):

- Nearly all of a start is imports: 9 s of CPU in each of API server, engine core and worker. Forked from a process that
  has them, core and worker need none. The API server's command sets the method to spawn unless
  VLLM_WORKER_MULTIPROC_METHOD is there, and a fork is given up for spawn when CUDA has been opened.
- ``vllm.envs`` reads variables when they are used. LATE are those that differ between models and that no module
  asks for while it is imported; whatever else differs makes another standby.
- A device's abilities are read from NVML at import, of the first one: so all must be alike (``LaunchPlanner``).
- On a CPU its configuration sets the method to spawn whatever was said; there ``vllm_standby_fork.py`` has the last
  word. Its children are told to preload two libraries, and how many threads compiled code has: a process that is to be
  forked must have been born with both, or else what torch has compiled for a spawned worker does not fit a forked one.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator
from pathlib import Path

from vllmd.config.types import ModelConfig
from vllmd.engines import environments
from vllmd.engines.base import Launch
from vllmd.engines.standby import Standby, is_script_of
from vllmd.engines.vllm_cpu import has_nvidia

FORK = Path(__file__).with_name("vllm_standby_fork.py")
METHOD = "VLLM_WORKER_MULTIPROC_METHOD"
MAIN = "from vllm.entrypoints.cli.main import main"
SPAWNED = ("whisper", "torch_shm")  # what vLLM says of: its forks may hang, or are refused
LATE = frozenset(
    {
        *("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "HF_TOKEN", "VLLM_RPC_BASE_PATH", "VLLM_CPU_KVCACHE_SPACE"),
        *("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "VLLMD_INSTANCE"),
    }
)
IMPORTS = (
    "vllm.entrypoints.cli.main",
    "vllm.entrypoints.cli.benchmark.main",
    "vllm.entrypoints.cli.collect_env",
    "vllm.entrypoints.cli.download_kernels",
    "vllm.entrypoints.cli.launch",
    "vllm.entrypoints.cli.openai",
    "vllm.entrypoints.cli.preload",
    "vllm.entrypoints.cli.run_batch",
    "vllm.entrypoints.cli.serve",
    "vllm.entrypoints.cli.snapshot",
    "vllm.entrypoints.openai.api_server",
    "vllm.entrypoints.launchers.api_server.entry",
    "vllm.entrypoints.generate.api_router",
    "vllm.entrypoints.openai.chat_completion.api_router",
    "vllm.entrypoints.openai.completion.api_router",
    "vllm.entrypoints.openai.responses.api_router",
    "vllm.entrypoints.anthropic.api_router",
    "vllm.entrypoints.serve.dev.sleep.api_router",
    "vllm.entrypoints.serve.instrumentator.metrics",
    "vllm.entrypoints.serve.lora.api_router",
    "vllm.entrypoints.serve.tokenize.api_router",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.core.sched.scheduler",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.executor.uniproc_executor",
    "vllm.model_executor.model_loader",
    "vllm.renderers.hf",
    "prometheus_fastapi_instrumentator",
    "model_hosting_container_standards.sagemaker",
    "setproctitle",
    "uvicorn.protocols.http.httptools_impl",
    "uvicorn.lifespan.on",
)
WORKERS = {"cuda": ("vllm.v1.worker.gpu_worker",), "cpu": ("vllm.v1.worker.cpu_worker",)}


def standby(model: ModelConfig, launch: Launch, *, accelerator: bool) -> Standby | None:
    """What a standby has to be for that engine; None where none can be: another program, another platform."""
    if accelerator and not has_nvidia():
        return None  # ROCm reads its devices at import, and XPU does not fork
    if any(word in argument.lower() for argument in launch.argv for word in SPAWNED):
        return None
    program = environments.in_path(model, launch.argv[0])
    python = environments.interpreter_of(program)
    if not program or not python or not is_script_of(program, MAIN):
        return None
    env, ours, then = {**launch.env, **model.env}, dict[str, str](), ""
    if not accelerator:
        then = "" if METHOD in env else str(FORK)
        ours = {name: value for name, value in _of_cpu(Path(python)) if name not in env}
    imports = IMPORTS + WORKERS["cuda" if accelerator else "cpu"]
    return Standby(python, program, imports, LATE, ours=tuple(ours.items()), adds=((METHOD, "fork"),), then=then)


def _of_cpu(python: Path) -> Iterator[tuple[str, str]]:
    """The variables that vLLM sets for its children on a CPU, as far as a fork could not learn them later."""
    yield "TORCHINDUCTOR_CPP_DYNAMIC_THREADS", "1"
    packages = f"{python.parent.parent}/lib/python3*/site-packages"
    wanted = ("vllm/libs/libtcmalloc_minimal*.so*", "torch.libs/libgomp*.so*", "torch/lib/libgomp*.so*")
    files = [sorted(glob.glob(f"{packages}/{one}"))[:1] for one in wanted]
    libraries = [*files[0], *(files[1] or files[2])]
    if libraries:
        yield "LD_PRELOAD", ":".join(libraries)
