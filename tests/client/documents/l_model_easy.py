from vllm import EngineArgs

from vllmd.client import ModelManager

args = EngineArgs(
    model="/home/models/Qwen/Qwen2.5-0.5B-Instruct",
    gpu_memory_utilization=0.05,
    max_num_seqs=2,
    max_model_len=1024,
    max_num_batched_tokens=8192,
    tensor_parallel_size=1,
    enforce_eager=True,
)

# easy mode
with ModelManager(engine_args=args) as model:
    model.load_model()
    model.llm.generate(...)
