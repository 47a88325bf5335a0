"""The same questions under several settings: python examples/compare_policies.py [URL].

Prints how many answers equal those of full recompute, and the seconds. Each request runs alone, so that the seconds
compare. For steps and rows see docs/tracing.md.
"""

import sys
import time

import openai

QUESTIONS = ["Reverse: stream", "Sort the digits: 40219653", "Uppercase: diffusion", "Count from 12 to 34 by 2."]
SETTINGS = {
    "full": {"d2cache_policy": "full"},
    "d2cache": {"d2cache_policy": "d2cache"},
    "d2cache, current_k 8": {"d2cache_policy": "d2cache", "d2cache_current_k": 8},
    "d2cache, threshold 0.9": {"d2cache_policy": "d2cache", "d2cache_threshold": 0.9},
}


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8000/v1"
    client = openai.OpenAI(base_url=url, api_key="none")
    model = client.models.list().data[0].id

    def answers(options: dict[str, object]) -> list[str | None]:
        chats = ([{"role": "user", "content": question}] for question in QUESTIONS)
        extra = {"vllm_xargs": options}
        return [
            client.chat.completions.create(model=model, messages=chat, max_tokens=48, extra_body=extra)
            .choices[0]
            .message.content
            for chat in chats
        ]

    answers(SETTINGS["full"])  # the first requests of a server are slower
    full: list[str | None] = []
    for name, options in SETTINGS.items():
        begin = time.perf_counter()
        given = answers(options)
        seconds = time.perf_counter() - begin
        full = full or given
        same = sum(a == b for a, b in zip(given, full, strict=True))
        print(f"{name:24} {same} of {len(QUESTIONS)} as full, {seconds:.2f} s")


if __name__ == "__main__":
    main()
