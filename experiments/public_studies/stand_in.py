"""Runs every public study end to end on a small model: plumbing, not figures.

    python experiments/public_studies/stand_in.py MODEL SAE [--out runs/public_studies] [NAME...]

The model, its SAEs, the number of texts, strengths and new tokens give way to small ones; everything else is the study's own. A model without a chat
template is asked in the plain form. What is printed says nothing about the models the studies name.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import sae_bias as sb
from sae_bias.workflows.contrast_study import ContrastStudy, run_contrast_study
from sae_bias.workflows.study import load_study

HERE = Path(__file__).parent
NAMES = (
    "evaluation_awareness",
    "six_behaviors",
    "hardening",
    "social_bias",
    "refusal_direction",
    "model_diff",
)


def small(study: ContrastStudy, model: str, sae: str, chat: bool) -> ContrastStudy:
    """The study with a stand-in's model and SAE, and little of everything."""
    deep = {} if study.direction is None else {"direction": 8}
    return study.model_copy(
        update={
            "model": model, "baseline": None if study.baseline is None else model, "saes": (sae,) if study.saes else (), "chat": chat and study.chat,
            "top": min(study.top, 3), "strengths": study.strengths[:1] + study.strengths[-1:], "controls": 1,
            "most_texts": None if study.all_of else 4, "questions": study.questions[:2], "max_new_tokens": 8, "prompts": study.prompts, "all_of": study.all_of[:1],
            "none_of": study.none_of[:1], **deep,
        }
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("sae")
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--out", type=Path, default=Path("runs/public_studies"))
    given = parser.parse_args()
    chat = bool(getattr(sb.load_model(given.model).tokenizer, "chat_template", None))
    for name in given.names or NAMES:
        study = load_study(HERE / f"{name}.yaml")
        assert isinstance(study, ContrastStudy)
        start = time.perf_counter()
        result = run_contrast_study(
            small(study, given.model, given.sae, chat), out=given.out / name, progress=False
        )
        print(
            f"## {name} (plumbing on {given.model}, {time.perf_counter() - start:.0f} s): {result.report}",
            flush=True,
        )
        for line in result.headline():
            print(f"  {line}", flush=True)


if __name__ == "__main__":
    main()
