from vllmd.client import VLLMProxyClient

client = VLLMProxyClient(base_url="http://localhost:8080")

# 聊天补全
response = client.chat_completion(model="llama2-7b-chat", messages=[{"role": "user", "content": "Hello!"}])
print(response["choices"][0]["message"]["content"])

# 流式输出
for text in client.chat_completion_stream(model="llama2-7b-chat", messages=[{"role": "user", "content": "讲个笑话"}]):
    print(text, end="")
