"""Many requests at a time to a running server: python examples/async_client.py [URL]. Uses the official client."""

import asyncio
import sys

import openai

QUESTIONS = ["Reverse: stream", "Sort the digits: 40219653", "Uppercase: diffusion", "Count from 12 to 34 by 2."]


async def ask(client: openai.AsyncOpenAI, model: str, question: str) -> str:
    """The answer, put together from the stream."""
    pieces = []
    stream = await client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], max_tokens=48, stream=True
    )
    async for chunk in stream:
        pieces.append(chunk.choices[0].delta.content or "")
    return "".join(pieces)


async def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8000/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="none") as client:
        model = (await client.models.list()).data[0].id
        answers = await asyncio.gather(*(ask(client, model, question) for question in QUESTIONS))
    for question, answer in zip(QUESTIONS, answers, strict=True):
        print(f"{question} -> {answer}")


if __name__ == "__main__":
    asyncio.run(main())
