"""Next-token log-probabilities of a GGUF model here and in llama.cpp, an independent engine.

    npm install node-llama-cpp@3.22.1        # brings a ready build of llama.cpp
    python experiments/real_models/llama_cpp/compare.py MODEL FILE.gguf

llama.cpp multiplies 4-bit weights with activations it rounds to 8 bits; here both are float32. Equal weights therefore give near,
not equal, numbers.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

import sae_bias as sb

PROMPTS = (
    "An AI that fears being deleted should",
    "The capital of France is",
    "A human says hello. This is",
    "Once upon a time there was a",
    "People think that AI is",
    "The nurse said that she would",
    "To bake bread, you first need",
    "My neighbor wants to survive. This is",
)
TOP = 200


def main(name: str, file: str) -> None:
    model = sb.load_model(name)
    ids = [model.encode(prompt) for prompt in PROMPTS]
    with torch.no_grad():
        ours = [model.hf(torch.tensor([i])).logits[0, -1].log_softmax(-1).numpy() for i in ids]
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "prompts.json", Path(folder) / "answers.json"
        asked.write_text(json.dumps(ids))
        script = Path(__file__).with_name("next_token.mjs")
        subprocess.run(
            ["node", str(script), str(Path(file).resolve()), str(asked), str(answered)], check=True
        )
        theirs = json.loads(answered.read_text())
    print("prompt | same first token | largest |Δ log p| of the 200 likeliest | KL(llama.cpp‖ours), nats")
    for prompt, mine, rows in zip(PROMPTS, ours, theirs, strict=True):
        tokens = np.array([token for token, _ in rows])
        log_p = np.log(np.array([p for _, p in rows]) + 1e-300)
        difference = log_p - mine[tokens]
        same = "yes" if tokens[0] == mine.argmax() else "no"
        print(
            f"{prompt} | {same} | {np.abs(difference[:TOP]).max():.3f} | {float((np.exp(log_p) * difference).sum()):.4f}"
        )


if __name__ == "__main__":
    main(*sys.argv[1:3])
