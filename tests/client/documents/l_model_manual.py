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

# or manual mode
model_manager = ModelManager(args, verbose=True)
model_manager.load_model()

# 模型推理
model_manager.llm.generate(...)

# 模型资源将在5s后自动释放
model_manager.reset_shutdown_timer(5)

# 手动释放模型资源
model_manager.stop()
