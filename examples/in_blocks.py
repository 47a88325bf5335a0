"""Talk to a server whose texts grow block by block (vllm serve MODEL; SDAR, LLaDA2, Fast-dLLM v2, ...).

python examples/in_blocks.py [URL]. Uses the official OpenAI client.
"""

import sys

import openai

client = openai.OpenAI(base_url=sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8000/v1", api_key="none")
model = client.models.list().data[0].id
# Long enough that it is found again: the prefix cache keeps whole pages, of 128 positions on a CPU.
question = [{"role": "user", "content": "Count the words of this text. " + "All of it was read before. " * 20}]

# max_tokens says when to stop; it reserves no memory and shapes nothing. Tokens are sent as they are committed.
print("streaming:", end=" ", flush=True)
for chunk in client.chat.completions.create(model=model, messages=question, max_tokens=32, stream=True):
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()

# The prompt is stored by now: what is left to compute is the block that it ends in, and the answer.
wishes: list[dict[str, object]] = [
    {},  # the family's own threshold
    {"d2cache_threshold": 0, "d2cache_steps": 4},  # so many steps for each block
    {"d2cache_decoder": "sequential"},
    {"d2cache_policy": "d2cache", "d2cache_current_k": 8},  # a part of the open block; blocks are stored whole
]
for xargs in wishes:
    answer = client.chat.completions.create(
        model=model, messages=question, max_tokens=32, extra_body={"vllm_xargs": {**xargs, "d2cache_report": True}}
    )
    report = answer.model_dump()["kv_transfer_params"]["d2cache"]
    print(xargs, "->", report["steps"], "steps,", report["rows_refreshed"], "rows:", answer.choices[0].message.content)
