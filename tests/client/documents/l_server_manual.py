from vllmd.client import ServerManager, VLLMEngineArgs

engine_args = VLLMEngineArgs(
    model="/home/models/Qwen/Qwen2.5-0.5B-Instruct/",
    port=8102,
    tensor_parallel_size=1,
    max_model_len=8192,
    gpu_memory_utilization=0.2,
    enforce_eager=True,
    enable_auto_tool_choice=True,
    tool_call_parser="hermes",
)

# or manual mode
serve = ServerManager(engine_args=engine_args, verbose=True)

# 启动服务
running = serve.start()

# openai client
client = serve.make_client()

messages = [{"role": "user", "content": "你好"}]
response = client.chat.completions.create(model="Qwen/Qwen2.5-0.5B-Instruct", messages=messages)
print(client)

# 模型资源将在5s后自动释放
serve.reset_shutdown_timer(5)

# 停止服务
serve.stop()
