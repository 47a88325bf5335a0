"""Answers in a given form: python examples/structured_output.py [URL]. A running server and the official OpenAI client.

The canvas, max_tokens, must have room for the whole answer: a grammar says how a text goes on, not how long it will be.
"""

import sys

import openai
import pydantic

client = openai.OpenAI(base_url=sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8000/v1", api_key="none")
model = client.models.list().data[0].id


class Sum(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    left: int = pydantic.Field(ge=0, le=9999)
    right: int = pydantic.Field(ge=0, le=9999)
    sure: bool


question = [{"role": "user", "content": "Add 6428 and 809."}]
answer = client.chat.completions.parse(model=model, messages=question, max_tokens=64, response_format=Sum)
print("a class:  ", repr(answer.choices[0].message.parsed))

# What OpenAI's API has no field for goes into structured_outputs, which is vLLM's.
for wanted in (
    {"choice": ["up", "down", "stay where you are"]},
    {"regex": r"[a-h]{4}-\d{2}"},
    {"grammar": 'root ::= item (", " item)*\nitem ::= "a" | "b" | "c"'},
):
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Reverse: abcdefgh"}],
        max_tokens=32,
        extra_body={"structured_outputs": wanted},
    )
    print(f"{next(iter(wanted)) + ':':10}", answer.choices[0].message.content)
