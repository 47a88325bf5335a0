"""Load a model, ask it something, print the answer: python examples/offline.py [MODEL]."""

import sys
from pathlib import Path

from vllm import LLM, SamplingParams

TINY = Path(__file__).resolve().parents[1] / "models" / "tiny-llada"


def main() -> None:
    llm = LLM(sys.argv[1] if len(sys.argv) > 1 else str(TINY))
    questions = ["Reverse: stream", "Sort the digits: 40219653", "Uppercase: diffusion"]
    chats = [[{"role": "user", "content": q}] for q in questions]
    # max_tokens is the length of the canvas; options of the plugin go into extra_args.
    params = SamplingParams(temperature=0, max_tokens=32, extra_args={"d2cache_policy": "d2cache"})
    for question, output in zip(questions, llm.chat(chats, params), strict=True):
        print(f"{question} -> {output.outputs[0].text}")


# vLLM starts its engine in a process of its own, which imports this file again.
if __name__ == "__main__":
    main()
