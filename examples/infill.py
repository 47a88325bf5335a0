"""Fill the holes of a text: python examples/infill.py [URL]. A running server and the official OpenAI client.

What diffusion models can do and others cannot: the answer is given in part, and what is written into its holes takes
the text on both sides into account.
"""

import sys

import httpx
import openai

url = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8000/v1"
client = openai.OpenAI(base_url=url, api_key="none")
model = client.models.list().data[0].id


def token_ids(text: str) -> list[int]:
    body = {"model": model, "prompt": text, "add_special_tokens": False}
    return httpx.post(f"{url.removesuffix('/v1')}/tokenize", json=body).raise_for_status().json()["tokens"]


def canvas_of(template: str) -> list[int]:
    """Token ids of the template, with -1, a hole, for each underscore."""
    first, *rest = template.split("_")
    return token_ids(first) + [t for piece in rest for t in [-1, *token_ids(piece)]]


def fill(question: str, template: str, **xargs: object) -> str:
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        # The canvas is as long as what is given: no max_tokens.
        extra_body={"vllm_xargs": {"d2cache_canvas": canvas_of(template), "d2cache_report": 1, **xargs}},
    )
    report = answer.kv_transfer_params["d2cache"]
    return f"{answer.choices[0].message.content}   ({report['steps']} steps, {report['rows_saved']} rows saved)"


if __name__ == "__main__":
    for question, template in [
        ("Reverse: stream", "m__r__"),
        ("Reverse: abcdefgh", "_g_e_c_a"),
        ("Uppercase: diffusion", "DI__U_I_N"),
    ]:
        print(f"{question:24} {template:12} -> {fill(question, template)}")
