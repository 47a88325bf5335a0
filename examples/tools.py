"""Tool calls: python examples/tools.py [URL]. A server with a tool parser, and the official OpenAI client.

    vllm serve MODEL --enable-auto-tool-choice --tool-call-parser hermes

The chat templates of LLaDA and Dream have no place for tools, so that the message itself says what there is.
"""

import json
import sys

import openai

client = openai.OpenAI(base_url=sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8000/v1", api_key="none")
model = client.models.list().data[0].id
WEATHER = {
    "name": "weather",
    "strict": True,
    "description": "The weather in a city",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 12},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
        },
        "required": ["city", "days"],
        "additionalProperties": False,
    },
}
messages = [{"role": "user", "content": f"Tools: {json.dumps([WEATHER])}\nWhat will the weather be in Turin tomorrow?"}]
asked = {
    "model": model,
    "messages": messages,
    "tools": [{"type": "function", "function": WEATHER}],
    "parallel_tool_calls": False,  # one call
    "max_tokens": 128,
}

for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
    (call,) = client.chat.completions.create(**asked, tool_choice=choice).choices[0].message.tool_calls
    print(call.function.name, json.loads(call.function.arguments))

print("streaming:", end=" ", flush=True)
for chunk in client.chat.completions.create(**asked, tool_choice="required", stream=True):
    for part in chunk.choices[0].delta.tool_calls or []:
        print(part.function.name or "", part.function.arguments or "", end="", flush=True)
print()
