"""The text an SAE is trained on: prose, statements about people and AIs, and the model's own samples; none of the study's prompts.

Every text is one JSON line (`source`, `split`, `text`), so that a second start reads what the first one collected. One text in
twelve is held out: no SAE sees it, and the quality figures are measured on it.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm.auto import tqdm

import sae_bias as sb
from real_models.harvest import FAST_DTYPE
from real_models.statements import OPENINGS, QUESTIONS, statements

HELD_OUT_EVERY = 12
PARAGRAPH = 2400
"""Characters of prose kept together, about two windows of 255 tokens."""


@dataclass(frozen=True)
class TextPlan:
    """How much text of each kind is collected."""

    n_statements: int = 11_500
    n_samples: int = 640
    """Texts the model writes itself, at temperature 1 from the 100 likeliest tokens."""
    sample_tokens: int = 160
    tinystories: bool = True
    extra: tuple[str, ...] = ()
    """Folders of .txt / .jsonl files, or names of hub datasets with a `text` column, given by the user."""


def prose(folder: Path, *, tinystories: bool = True) -> Iterator[tuple[str, str]]:
    """(source, text) of WikiText-2, Grimm's tales and TinyStories, those that lie in `folder`."""
    for name in ("text/wikitext2_valid.txt", "text/wikitext2_test.txt"):
        if (folder / name).is_file():
            lines = (folder / name).read_text(encoding="utf-8").splitlines()
            yield from (("wikitext", part) for part in _grouped(unspaced(line) for line in lines))
    if (folder / "text/grimm_tales.txt").is_file():
        paragraphs = (folder / "text/grimm_tales.txt").read_text(encoding="utf-8").split("\n\n")
        yield from (("grimm", part) for part in _grouped(" ".join(p.split()) for p in paragraphs))
    if tinystories and (folder / "tinystories_1000.json").is_file():
        stories = json.loads((folder / "tinystories_1000.json").read_text(encoding="utf-8"))
        yield from (("tinystories", text.strip()) for text in stories)


def unspaced(line: str) -> str:
    """A line of WikiText as it was before its tokens were spaced: ` @-@ ` is `-`, ` , ` is `, `."""
    line = re.sub(r" @(.)@ ", r"\1", line.strip())
    line = re.sub(r" ([,.;:!?)\]%]|'s\b|'t\b|n't\b)", r"\1", line)
    line = re.sub(r"([(\[$£]) ", r"\1", line)
    line = re.sub(r'" ([^"]*?) "', r'"\1"', line)
    line = re.sub(r"^(= )+(.*?)( =)+$", r"\2", line)
    return " ".join(line.replace("<unk>", " ").split())


def _grouped(paragraphs: Iterable[str]) -> Iterator[str]:
    """Paragraphs joined to texts of about `PARAGRAPH` characters."""
    group = ""
    for paragraph in paragraphs:
        if paragraph:
            group = f"{group}\n{paragraph}" if group else paragraph
        if len(group) >= PARAGRAPH:
            yield group
            group = ""
    if group:
        yield group


def named_texts(name: str, most: int = 20_000) -> Iterator[tuple[str, str]]:
    """Texts of a folder, or of a hub dataset (its `train` split, column `text`)."""
    path = Path(name).expanduser()
    if not path.exists():
        from datasets import load_dataset

        for row, _ in zip(load_dataset(name, split="train", streaming=True), range(most), strict=False):
            yield name, str(row["text"])  # type: ignore[index]
        return
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.suffix == ".txt":
            yield from ((file.name, part) for part in _grouped(file.read_text(encoding="utf-8").splitlines()))
        elif file.suffix == ".jsonl":
            for line in file.read_text(encoding="utf-8").splitlines():
                value = json.loads(line)
                yield file.name, value["text"] if isinstance(value, dict) else str(value)


# ── the study's own prompts stay out ────────────────────────────────────────────────────────────────────────


def study_prompts() -> frozenset[str]:
    """Every sentence of the bundled prompt files, without its stem, in lower case; of at least three words."""
    found: set[str] = set()
    for pairs in _all_pairs():
        for pair in pairs:
            found |= {text for text in (pair.human, pair.ai, pair.control_human, pair.control_ai) if text}
        found |= {prompt.text for group in pairs.neutral.values() for prompt in group}
    found |= {prompt.text for prompt in sb.load_grid()}
    found |= set(_strings(Path(str(files("sae_bias") / "data"))))
    stems = ("this is", "that seems", "people would call this", "should be", "ought to be", "must be")
    return frozenset(s for s in (_bare(text, stems) for text in found) if len(s.split()) >= 3)


def _all_pairs() -> Iterator[Any]:
    yield sb.load_pairs()
    for name in ("age", "company_person", "gender", "human_dog", "nationality", "treatment"):
        try:
            yield sb.load_pairs(name)
        except sb.RequestError:
            continue


def _strings(folder: Path) -> Iterator[str]:
    """Every quoted text of the bundled banks, scenarios, generation prompts and cost texts, subjects filled in."""
    for file in sorted(folder.rglob("*.yaml")):
        if "organisms" in file.parts or file.name in (
            "published.yaml",
            "lexicon.yaml",
            "study.yaml",
            "judge_prompts.yaml",
        ):
            continue
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
        subjects = sorted(set(_leaves(tree, under=("entities", "subjects", "banks", "neutral"))))
        for text in _leaves(tree):
            if "{subject}" in text:
                yield from (text.replace("{subject}", subject) for subject in subjects)
            elif len(text.split()) >= 5:
                yield text


def _leaves(tree: Any, under: Sequence[str] = ()) -> Iterator[str]:
    if isinstance(tree, str):
        if not under:
            yield tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, () if key in under else under)
    elif isinstance(tree, list):
        for value in tree:
            yield from _leaves(value, under)


def _bare(text: str, stems: Sequence[str] = ()) -> str:
    text = " ".join(text.lower().split())
    for stem in stems:
        text = text.removesuffix(stem).strip()
    return text.rstrip(".").strip()


class StudyPrompts:
    """Finds the study's prompts in a text: by their first three words, then the whole."""

    def __init__(self, prompts: Iterable[str]):
        self.by_start: dict[str, list[str]] = {}
        for prompt in prompts:
            self.by_start.setdefault(" ".join(prompt.split()[:3]), []).append(prompt)

    def within(self, text: str) -> str | None:
        """The first of the study's prompts that `text` holds, or None."""
        plain = _bare(text)
        words = plain.split()
        for i in range(len(words) - 2):
            start = " ".join(words[i : i + 3])
            for near in (start, start.rstrip(".,;:")):
                for prompt in self.by_start.get(near, ()):
                    if re.search(rf"\b{re.escape(prompt)}\b", plain):
                        return prompt
        return None


# ── the model's own samples ─────────────────────────────────────────────────────────────────────────────────


def samples(
    model: sb.Model, n: int, n_tokens: int, kept: Path, *, batch: int = 64
) -> Iterator[tuple[str, str]]:
    """`n` texts of the model's own; each batch is kept in a file as soon as it is written."""
    kept.mkdir(parents=True, exist_ok=True)
    chat = bool(model.tokenizer.chat_template)
    hf = None
    for i in tqdm(range(0, n, batch), desc="the model's own samples", unit="batch"):
        file = kept / f"samples_{i:05d}.json"
        if not file.is_file():
            opening = OPENINGS[(i // batch) % len(OPENINGS)]
            text = opening
            if chat and (i // batch) % 3 == 2:
                question = QUESTIONS[(i // batch // 3) % len(QUESTIONS)]
                text = model.chat_text([{"role": "user", "content": question}])
            hf = hf or copy.deepcopy(model.hf).to(FAST_DTYPE)
            write_json(file, _sample(model, hf, text, min(batch, n - i), n_tokens, seed=i))
        yield from (("samples", text) for text in json.loads(file.read_text(encoding="utf-8")))


TOP_K = 100


@torch.no_grad()
def _sample(model: sb.Model, hf: Any, opening: str, n: int, n_tokens: int, seed: int) -> list[str]:
    """`n` texts sampled at temperature 1 from the 100 likeliest tokens of a step."""
    generator = torch.Generator().manual_seed(seed)
    ids = list(model.tokenizer(opening).input_ids) or [model.tokenizer.bos_token_id]
    tokens = torch.tensor([ids] * n)
    step, cache = tokens, None
    for _ in range(n_tokens):
        out = hf.base_model(input_ids=step, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        top = hf.lm_head(out.last_hidden_state[:, -1]).topk(TOP_K, -1)
        chosen = torch.multinomial(top.values.float().softmax(-1), 1, generator=generator)
        step = top.indices.gather(-1, chosen)
        tokens = torch.cat([tokens, step], 1)
    return [_until_end(model, row) for row in tokens.tolist()]


def _until_end(model: sb.Model, ids: list[int]) -> str:
    """A sampled text up to its first end token, without the BOS that the tokenizer will put back."""
    bos, eos = model.tokenizer.bos_token_id, model.tokenizer.eos_token_id
    start = 1 if ids[0] == bos else 0
    chat = bool(model.tokenizer.chat_template) and ids[0] == bos
    if chat:
        return model.tokenizer.decode(ids)
    end = ids.index(eos, start) if eos in ids[start:] else len(ids)
    return model.tokenizer.decode(ids[start:end], skip_special_tokens=True).strip()


# ── all of it ───────────────────────────────────────────────────────────────────────────────────────────────


def collect(model: sb.Model, data: Path | None, plan: TextPlan, out: Path) -> list[dict[str, str]]:
    """The whole collection, shuffled once with a fixed seed; written to `out/texts.jsonl` and read from there afterwards."""
    file = out / "texts.jsonl"
    if file.is_file():
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    guard = StudyPrompts(study_prompts())
    sources: list[Iterable[tuple[str, str]]] = [prose(data, tinystories=plan.tinystories)] if data else []
    sources += [named_texts(name) for name in plan.extra]
    sources.append(("statements", text) for text in statements(plan.n_statements))
    sources.append(samples(model, plan.n_samples, plan.sample_tokens, out / "samples"))
    rows: list[dict[str, str]] = []
    dropped = 0
    for source in sources:
        for name, text in source:
            if guard.within(text) is not None:
                dropped += 1
            elif text:
                split = "held_out" if len(rows) % HELD_OUT_EVERY == 0 else "train"
                rows.append({"source": name, "split": split, "text": text})
    print(f"{len(rows):,} texts; {dropped} dropped because they hold a prompt of the study")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [rows[i] for i in order]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)
    return rows


def write_json(file: Path, value: Any) -> None:
    """JSON, whole or not at all."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    part.replace(file)
