"""Watch an answer appear all over its canvas: python examples/watch_canvas.py [URL] [QUESTION]. A running server, the
official OpenAI client, and rich.

Provisional text: a request that asks for d2cache_snapshots gets, between the chunks of its stream, the whole canvas as
it is now. To the official client they are chunks without choices.
"""

import sys

import openai
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

url = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8000/v1"
question = sys.argv[2] if len(sys.argv) > 2 else "Count from 12 to 34 by 2."


def canvas_line(snapshot: dict) -> Text:
    """Text as it is, masks as dim blocks."""
    line = Text()
    for piece in snapshot["pieces"]:
        if "masks" in piece:
            line.append("░" * piece["masks"], "dim")
        else:
            line.append(piece["text"])
    return line


if __name__ == "__main__":
    client = openai.OpenAI(base_url=url, api_key="none")
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": question}],
        max_tokens=48,
        stream=True,
        extra_body={"vllm_xargs": {"d2cache_snapshots": 1}},  # 4 = every fourth step
    )
    console = Console()
    answer, canvas, step = "", Text(), 0
    with Live(console=console, auto_refresh=False) as live:
        for chunk in stream:
            if chunk.choices:
                answer += chunk.choices[0].delta.content or ""
            else:
                snapshot = chunk.d2cache_snapshot
                canvas, step = canvas_line(snapshot), snapshot["step"]
            live.update(Group(Text(f"step {step}"), canvas, Text(f"certain so far: {answer}", "green")), refresh=True)
