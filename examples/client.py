"""Talk to a running server (vllm serve MODEL): python examples/client.py [URL]. Uses the official OpenAI client."""

import sys

import openai

client = openai.OpenAI(base_url=sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8000/v1", api_key="none")
model = client.models.list().data[0].id
question = [{"role": "user", "content": "Reverse: stream"}]

print("streaming, d2Cache:", end=" ", flush=True)
for chunk in client.chat.completions.create(model=model, messages=question, max_tokens=32, stream=True):
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()

# Options of the plugin go into vllm_xargs, with the prefix d2cache_.
for xargs in ({"d2cache_policy": "full"}, {"d2cache_threshold": 0.9}, {"d2cache_window": 16, "d2cache_current_k": 8}):
    answer = client.chat.completions.create(
        model=model, messages=question, max_tokens=32, extra_body={"vllm_xargs": xargs}
    )
    print(xargs, "->", answer.choices[0].message.content)
