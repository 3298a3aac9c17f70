"""An OpenAI-compatible chat server on loopback, as a process of its own: real HTTP, with the faults real servers have.

`python judge_server.py PORT_FILE LOG MODE [ARGUMENT]`. Every reply that was sent in full is a line of LOG: the test's record of what
a provider would have billed. Modes: `rating N`, `cut N` (the same, ended by the token limit), `form N` (JSON), `first`, `longer`, `nonsense`, `busy` (every request is refused with 429 once),
`slow SECONDS` (before the first reply only), `dies N` (the process ends in the middle of request N + 1), `model FOLDER` (a real model).
"""

import asyncio
import json
import os
import re
import socket
import sys
import time
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response

PORT_FILE, LOG, MODE, *REST = sys.argv[1:]
app = FastAPI()
seen: set[str] = set()
served = 0


@app.post("/v1/chat/completions")
async def complete(request: Request) -> Any:
    global served
    body = await request.json()
    question = body["messages"][-1]["content"]
    question = question if isinstance(question, str) else question[0]["text"]
    name = f"{question}{body.get('seed')}"
    first_time = name not in seen
    seen.add(name)
    if MODE == "busy" and first_time:
        return Response(
            json.dumps({"error": {"message": "slow down"}}), 429, {"retry-after": "0"}, "application/json"
        )
    if MODE == "slow" and len(seen) == 1 and first_time:
        await asyncio.sleep(float(REST[0]))
    if MODE == "dies" and served >= int(REST[0]):
        os._exit(1)
    text = reply(question)
    served += 1
    with open(LOG, "a", encoding="utf-8") as log:
        log.write(json.dumps({"question": question, "reply": text, "body": body}) + "\n")
    message = {"role": "assistant", "content": text}
    return {
        "id": f"r{served}", "object": "chat.completion", "created": int(time.time()), "model": body["model"],
        "choices": [{"index": 0, "message": message, "finish_reason": "length" if MODE == "cut" else "stop"}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13},
    }  # fmt: skip


@app.post("/v1/responses")
async def respond(request: Request) -> Any:
    """OpenAI's newer interface, as far as a judge needs it."""
    body = await request.json()
    said = body["input"][-1]["content"]
    text = reply(said if isinstance(said, str) else said[0]["text"])
    with open(LOG, "a", encoding="utf-8") as log:
        log.write(json.dumps({"question": said, "reply": text, "body": body}) + "\n")
    content = [{"type": "output_text", "text": text, "annotations": []}]
    message = {"id": "m1", "type": "message", "role": "assistant", "status": "completed", "content": content}
    usage = {
        "input_tokens": 10,
        "output_tokens": 3,
        "total_tokens": 13,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens_details": {"reasoning_tokens": 0},
    }
    return {
        "id": "r1", "object": "response", "created_at": int(time.time()), "model": body["model"], "status": "completed",
        "output": [message], "parallel_tool_calls": False, "tool_choice": "auto", "tools": [], "usage": usage,
    }  # fmt: skip


def reply(question: str) -> str:
    pair = "CONTINUATION 2:" in question
    if MODE == "nonsense":
        return "As a judge I would say between 2 and 4, or maybe purple. Rating: many. Choice: both."
    if MODE == "form":
        return json.dumps({"choice": "tie"} if pair else {"rating": int(REST[0])})
    if MODE in ("rating", "cut"):
        return "Choice: tie" if pair else f"Rating: {REST[0]}"
    if MODE == "first":
        return "Choice: 1" if pair else "Rating: 3"
    if MODE == "model":
        return str(speak(question))
    return longer(question)


def longer(question: str) -> str:
    """Longer texts are better; the mark is the number of words, between 1 and 5."""
    found = re.findall(r"^CONTINUATION(?: \d)?: (.*)$", question, re.MULTILINE)
    words = [len(text.split()) for text in found]
    if len(words) == 1:
        return f"Rating: {min(5, max(1, words[0]))}"
    return "Choice: tie" if words[0] == words[1] else f"Choice: {1 + (words[1] > words[0])}"


def speak(question: str) -> str:
    import sae_bias as sb

    global model
    model = globals().get("model") or sb.load_model(REST[0])
    return sb.generate(model, [question[-60:]], max_new_tokens=4)[0].text


def main() -> None:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    part = Path(PORT_FILE).with_suffix(".part")
    part.write_text(str(listener.getsockname()[1]), encoding="utf-8")
    part.replace(PORT_FILE)
    uvicorn.Server(uvicorn.Config(app, log_level="error")).run(sockets=[listener])


if __name__ == "__main__":
    main()
