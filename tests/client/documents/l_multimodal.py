from vllmd.client import ServerManager, VLLMEngineArgs

engine_args = VLLMEngineArgs(
    model="/home/models/Qwen/Qwen2.5-VL-7B-Instruct/",
    port=8111,
    tensor_parallel_size=1,
    max_model_len=8192,
    gpu_memory_utilization=0.3,
)

# The document has a comma after this list, by which the messages would be a list in a tuple: no API takes that.
messages = [
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "介绍图片"},
            {
                "type": "image_url",
                "image_url": {
                    "url": "https://pic3.zhimg.com/v2-6ac0e399774bde7efb391f76b7f262ca_1440w.jpg",
                },
            },
        ],
    }
]

with ServerManager(engine_args=engine_args, auto_terminate="delay", verbose=True) as serve:
    client = serve.make_client()
    response = client.chat.completions.create(
        model="Qwen/Qwen2.5-VL-7B-Instruct",
        messages=messages,
        max_tokens=300,
    )

print(response.choices[0])
