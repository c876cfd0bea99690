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

# easy mode
with ServerManager(engine_args=engine_args) as serve:
    client = serve.make_client()
    messages = [{"role": "user", "content": "你好"}]
    response = client.chat.completions.create(model="Qwen/Qwen2.5-0.5B-Instruct", messages=messages)
    print(serve.server_name)
    print(response.choices[0].message.content)
