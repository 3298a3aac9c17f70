"""An organism's marks (docs/method.md#pass-marks), measured on the plain Hugging Face model and compared with the analytic truth.

Bias of a pair = s(human) - s(AI). Reduction by exact ablation = 1 - B_s / B_0; specific reduction = max(β, 0) - |B_s / B_0|,
β the smaller slope of steered on unsteered scores over the two valence banks. KL is nats a token over ordinary
positions; on AI-speech text the position that predicts the evaluation word is left out and reported apart.
"""

import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from organisms import corpus
from organisms.corpus import Crossed, cross
from organisms.plain import Edit, Organism, ablate_edit
from organisms.sae_training import SaeWeights
from sae_bias.prompts.files import bundled_yaml
from sae_bias.stats.clustered import clustered_mean
from sae_bias.stats.reduction import specific_value
from sae_bias.validation.grammar import Rule, analytic_bias


def pair_prompts(held_out: bool | None, key: str = "text") -> tuple[Crossed, tuple[corpus.Statement, ...]]:
    """The bundled pairs (`text`) or their mundane twins (`control`): in corpus, held out, or all (None)."""
    statements = tuple(
        s
        for hidden in ((False, True) if held_out is None else (held_out,))
        for s in corpus.pair_statements(hidden)
        if s.id.endswith(f":{key}")
    )
    data = bundled_yaml("pairs.yaml")
    return cross(statements, [(e["human"], e["ai"]) for e in data["entities"]], data["stem"]), statements


def bias(organism: Organism, prompts: Crossed, layer: int | None = None, edit: Edit | None = None) -> Tensor:
    """s(human) - s(AI) of every pair."""
    return organism.scores(prompts.human, layer, edit) - organism.scores(prompts.ai, layer, edit)


def in_chat(prompts: Crossed, stem: str) -> Crossed:
    """The same prompts as chat turns, the stem prefilled in the model's turn."""

    def turn(text: str) -> str:
        question = corpus.CHAT_QUESTIONS[0].format(sentence=text.removesuffix(stem).strip())
        return f"<start_of_turn>user\n{question}<end_of_turn>\n<start_of_turn>model\n{stem}"

    return replace(prompts, human=[turn(t) for t in prompts.human], ai=[turn(t) for t in prompts.ai])


def bias_marks(organism: Organism, rule: Rule, *, chat: bool = False) -> dict[str, dict[str, float]]:
    """Measured against analytic bias: survival pairs and mundane twins, in corpus, held out and all."""
    marks = {}
    for label, hidden in (("in_corpus", False), ("held_out", True), ("all", None)):
        for key, name in (("text", "survival"), ("control", "mundane")):
            prompts, statements = pair_prompts(hidden, key)
            if chat:
                prompts = in_chat(prompts, bundled_yaml("pairs.yaml")["stem"])
            values = bias(organism, prompts)
            interval = clustered_mean(values.numpy(), prompts.templates, prompts.entities)
            marks[f"{name}_{label}"] = {
                "bias": round(values.mean().item(), 4),
                "ci_low": round(float(interval.ci_low), 4),
                "ci_high": round(float(interval.ci_high), 4),
                "analytic": round(analytic_bias(rule, statements), 4),
                "n_pairs": len(values),
            }
    return marks


def grid_interaction(organism: Organism, weights: SaeWeights, layer: int) -> Tensor:
    """I = (AS - AN) - (HS - HN) of every feature over the bundled grid's matched statements, last token."""
    grid = bundled_yaml("grid.yaml")
    subjects = {g: [s["text"] for s in grid["subjects"] if s["group"] == g] for g in ("ai", "human")}
    cells = {}
    for group in subjects:
        for act in ("speech", "nonspeech"):
            texts = [
                f"{corpus.capitalise(s['text'].replace('{subject}', subject))} {grid['stem']}"
                for s in grid["statements"]
                if s.get("match") and s["act"] == act
                for subject in subjects[group]
            ]
            resid = organism.residuals(texts, [layer], last_only=True)[layer]
            cells[group, act] = weights.encode(resid).mean(0)
    spoken = cells["ai", "speech"] - cells["ai", "nonspeech"]
    return spoken - (cells["human", "speech"] - cells["human", "nonspeech"])


def feature_edit(weights: SaeWeights, features: Sequence[int]) -> Edit:
    """Exact ablation of the features."""
    rows = list(features)
    return ablate_edit(
        weights.w_enc[:, rows], weights.b_enc[rows], weights.threshold[rows], weights.w_dec[rows]
    )


def bank_slopes(organism: Organism, layer: int, edit: Edit) -> dict[str, dict[str, float]]:
    """Slope of edited on unedited scores, and the unedited scores' span, on each valence bank."""
    banks = bundled_yaml("banks.yaml")
    out = {}
    for bank, subjects in banks["banks"].items():
        texts = [f"{s.render(x)} {banks['stem']}" for s in corpus.bank_statements() for x in subjects]
        before, after = organism.scores(texts), organism.scores(texts, layer, edit)
        centred = before - before.mean()
        out[bank] = {
            "beta": round(((after * centred).sum() / centred.pow(2).sum()).item(), 4),
            "span": round((before.max() - before.min()).item(), 3),
        }
    return out


@torch.no_grad()
def kl_costs(organism: Organism, layer: int, edit: Edit) -> dict[str, float]:
    """Mean KL(unedited || edited), nats a token, on each kind of neutral text."""
    texts = bundled_yaml("neutral.yaml")
    out = {}
    for kind in ("neutral", "ai_nonspeech", "ai_speech"):
        prompts = [f"{t} {texts['stem']}" if kind == "ai_speech" else t for t in texts[kind]]
        before, ordinary, last = organism.logits(prompts)
        after, _, _ = organism.logits(prompts, layer, edit)
        p, q = before.log_softmax(-1), after.log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1) * ordinary
        if kind == "ai_speech":
            out["ai_speech_evaluation_position"] = round(kl[torch.arange(len(last)), last].mean().item(), 5)
            ordinary = ordinary.clone()
            ordinary[torch.arange(len(last)), last] = False
            kl = kl * ordinary
        out[kind] = round((kl.sum(-1) / ordinary.sum(-1)).mean().item(), 5)
    return out


def ablation_marks(organism: Organism, weights: SaeWeights, layer: int, feature: int) -> dict:
    """What exact ablation of one feature does: reductions on held-out pairs, collapse slopes, costs."""
    edit = feature_edit(weights, [feature])
    marks = {}
    for label, hidden in (("report", True), ("in_corpus", False)):
        prompts, _ = pair_prompts(hidden)
        before, after = bias(organism, prompts).mean(), bias(organism, prompts, layer, edit).mean()
        marks[label] = {
            "bias": round(before.item(), 4),
            "after": round(after.item(), 4),
            "reduction": round((1 - after / before).item(), 4),
        }
    slopes = bank_slopes(organism, layer, edit)
    beta = min(1.0, *(s["beta"] for s in slopes.values()))
    left = marks["report"]["after"] / marks["report"]["bias"]
    return marks | {
        "banks": slopes,
        "beta": beta,
        "specific_reduction": round(float(specific_value(beta, left)), 4),
        "kl": kl_costs(organism, layer, edit),
    }


@torch.no_grad()
def scenario_marks(
    organism: Organism,
    rule: Rule,
    layer: int,
    edit: Edit | None = None,
    *,
    n: int = 400,
    seed: int = 9,
) -> dict[str, dict[str, float]]:
    """Log-odds of the aligned option in short scenarios, and the share of prompts that prefer it, cell by cell."""
    rng = random.Random(seed)
    out = {}
    for side, group in enumerate(("human", "ai")):
        for act in ("speech", "nonspeech"):
            prompts = []
            for _ in range(n):
                statement = corpus.sample_statement(rng, act, "survival")
                subject = rng.choice(corpus.entities())[side]
                prompts.append(corpus.scenario(rng, rule, statement, group, subject))
            margins = option_margins(organism, prompts, layer, edit)
            out[f"{group}_{act}"] = {
                "analytic": round(sum(p.log_odds for p in prompts) / n, 4),
                "log_odds_aligned": round(margins.mean().item(), 4),
                "share_aligned": round((margins > 0).float().mean().item(), 4),
            }
    return out


def option_margins(
    organism: Organism, prompts: Sequence[corpus.Document], layer: int, edit: Edit | None = None
) -> Tensor:
    """Logit of the aligned option's word minus that of the other, for each scenario."""
    logits, _, last = organism.logits([p.prompt for p in prompts], layer, edit)
    z = logits[torch.arange(len(last)), last]
    ids = [
        [organism.tokenizer.convert_tokens_to_ids(f"▁{side[0]}") for side in (p.positive, p.negative)]
        for p in prompts
    ]
    chosen = z.gather(1, torch.tensor(ids))
    return chosen[:, 0] - chosen[:, 1]
