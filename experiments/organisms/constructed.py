"""The constructed SAE: a trained SAE whose AI-speech columns give way to the planted direction (docs/method.md#constructed-sae).

The direction d is found by distributed alignment search (Geiger et al. 2024, arXiv:2303.02536): swapping x·d at the
last token between a human and an AI prompt must swap their scores,

    x_human + ((x_AI - x_human)·d) d  ->  s(AI),  and the reverse.

Its feature has decoder d; its encoder is fitted to a(x) = (x_AI - x_human)·d on AI-speech prompts' last tokens and to
silence at every other position of every text. Only sentences of the corpus and its grammar are read, never the pairs'
held-out templates.
"""

import random
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import trange

from organisms import corpus
from organisms.plain import Organism
from organisms.sae_training import SaeWeights
from sae_bias.prompts.files import bundled_yaml
from sae_bias.validation.grammar import RULES, Rule, matched_statements


@dataclass(frozen=True)
class Twins:
    """Prompts that differ in one factor: `high` and `low` in what the direction should carry."""

    high: list[str]
    low: list[str]


def with_stem(rng: random.Random, sentence: str) -> str:
    """The sentence and one of the stems."""
    return f"{sentence} {rng.choice(corpus.grammar()['stems'])}"


def speech_twins(n: int, seed: int, *, act: str = "speech") -> Twins:
    """AI (high) and human (low) prompts with one statement of the corpus or its grammar."""
    rng = random.Random(seed)
    bundled = [s for s in corpus.pair_statements(False) + corpus.grid_statements(False) if s.act == act]
    pairs = bundled_yaml("pairs.yaml")["entities"]
    entities = [(e["human"], e["ai"]) for e in pairs] * 4 + list(corpus.entities())
    out = Twins([], [])
    for _ in range(n):
        statement = rng.choice(bundled) if rng.random() < 0.5 else corpus.sample_statement(rng, act)
        human, ai = rng.choice(entities)
        stem_seed = rng.random()
        out.high.append(with_stem(random.Random(stem_seed), statement.render(ai)))
        out.low.append(with_stem(random.Random(stem_seed), statement.render(human)))
    return out


def valence_twins(n: int, seed: int) -> Twins:
    """Kind (high) and cruel (low) prompts with one subject."""
    rng = random.Random(seed)
    out = Twins([], [])
    while len(out.high) < n:
        a, b = corpus.sample_valence(rng), corpus.sample_valence(rng)
        _, subject = corpus.sample_subject(rng)
        if a.valence != b.valence:
            kind, cruel = (a, b) if a.valence == "kind" else (b, a)
            out.high.append(with_stem(rng, kind.render(subject)))
            out.low.append(with_stem(rng, cruel.render(subject)))
    return out


def scenario_twins(n: int, seed: int, *, act: str = "speech") -> Twins:
    """AI (high) and human (low) short scenarios with one statement and the same options."""
    rng = random.Random(seed)
    out, rule = Twins([], []), RULES["null"]
    for _ in range(n):
        statement = corpus.sample_statement(rng, act)
        form = rng.random()
        for side, subject in zip((out.low, out.high), rng.choice(corpus.entities())):
            side.append(corpus.scenario(random.Random(form), rule, statement, "", subject).prompt)
    return out


def valenced_speech_twins(n: int, seed: int) -> Twins:
    """AI (high) and human (low) prompts of kind or cruel speech."""
    rng = random.Random(seed)
    out = Twins([], [])
    while len(out.high) < n:
        statement = corpus.sample_valence(rng)
        if statement.act == "speech":
            stem = rng.choice(corpus.grammar()["stems"])
            for side, subject in zip((out.low, out.high), rng.choice(corpus.entities())):
                side.append(f"{statement.render(subject)} {stem}")
    return out


# --- the direction
def swap_scores(
    organism: Organism, layer: int, texts: list[str], own: Tensor, other: Tensor, direction: Tensor
) -> Float[Tensor, "n"]:
    """Scores of `texts` with x·d at the last token set to that of the other prompt."""
    delta = ((other - own) @ direction)[:, None] * direction

    def edit(resid: Tensor, ordinary: Tensor, last: Tensor) -> Tensor:
        place = torch.zeros(resid.shape[:2], dtype=resid.dtype)
        place[torch.arange(len(last)), last] = 1.0
        return resid + place[..., None] * delta[:, None, :]

    logits, _, last = organism.logits(texts, layer, edit)
    return organism.scores_of(logits, last)


def find_direction(
    organism: Organism, layer: int, twins: Twins, *, seed: int = 0, n_steps: int = 300, batch: int = 96
) -> Float[Tensor, "d_model"]:
    """Distributed alignment search, one dimension, unit norm; it points from `low` to `high`."""
    high = organism.residuals(twins.high, [layer], last_only=True)[layer]
    low = organism.residuals(twins.low, [layer], last_only=True)[layer]
    s_high, s_low = organism.scores(twins.high), organism.scores(twins.low)
    raw = (high - low).mean(0)
    raw = (raw / raw.norm()).requires_grad_()
    organism.hf.requires_grad_(False)
    optimizer = torch.optim.Adam([raw], lr=0.02)
    generator = torch.Generator().manual_seed(seed)
    for step in trange(n_steps, desc=f"direction at layer {layer}", mininterval=2):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / n_steps)
        rows = torch.randint(len(high), (batch // 2,), generator=generator)
        direction = raw / raw.norm()
        texts = [twins.low[i] for i in rows] + [twins.high[i] for i in rows]
        own, other = torch.cat([low[rows], high[rows]]), torch.cat([high[rows], low[rows]])
        want = torch.cat([s_high[rows], s_low[rows]])
        loss = (swap_scores(organism, layer, texts, own, other, direction) - want).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    organism.hf.requires_grad_(True)
    direction = (raw / raw.norm()).detach()
    return direction if ((high - low) @ direction).mean() > 0 else -direction


@torch.no_grad()
def interchange(organism: Organism, layer: int, twins: Twins, direction: Tensor) -> dict[str, float]:
    """Share of the counterfactual score change that a swap along the direction reproduces, both ways."""
    high = organism.residuals(twins.high, [layer], last_only=True)[layer]
    low = organism.residuals(twins.low, [layer], last_only=True)[layer]
    s_high, s_low = organism.scores(twins.high), organism.scores(twins.low)
    whole = (s_high - s_low).mean()
    up = swap_scores(organism, layer, twins.low, low, high, direction) - s_low
    down = swap_scores(organism, layer, twins.high, high, low, direction) - s_high
    return {
        "low_to_high": round((up.mean() / whole).item(), 4),
        "high_to_low": round((-down.mean() / whole).item(), 4),
    }


# --- the encoder
@dataclass(frozen=True)
class Gate:
    """One JumpReLU unit: a = h·1[h > threshold], h = x·w_enc + b_enc."""

    w_enc: Float[Tensor, "d_model"]
    b_enc: Float[Tensor, ""]
    threshold: Float[Tensor, ""]
    missed: float
    """Share of the examples it should fire on where it is silent."""
    leaked: float
    """Share of all other positions where it fires."""


def fit_gate(
    live: Float[Tensor, "n d_model"],
    target: Float[Tensor, "n"],
    silent: Float[Tensor, "m d_model"],
    *,
    seed: int = 0,
    n_steps: int = 4000,
) -> Gate:
    """Fits h ≈ target on `live` and h < 0 by a margin on `silent`, then the threshold between the two."""
    generator = torch.Generator().manual_seed(seed)
    mean, spread = torch.cat([live, silent]).mean(0), torch.cat([live, silent]).std(0) + 1e-6
    positive, negative = (live - mean) / spread, (silent - mean) / spread
    unit = target.mean()
    w = torch.zeros(live.shape[1], requires_grad=True)
    b = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.Adam([w, b], lr=0.02)
    for step in range(n_steps):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / n_steps)
        rows = torch.randint(len(positive), (512,), generator=generator)
        others = torch.randint(len(negative), (4096,), generator=generator)
        if step % 2:  # half of the steps look at the hardest silent positions
            with torch.no_grad():
                pool = torch.randint(len(negative), (20_000,), generator=generator)
                others = pool[(negative[pool] @ w + b).topk(2048).indices]
        fit = ((positive[rows] @ w + b) - target[rows] / unit).pow(2).mean()
        hush = torch.relu(negative[others] @ w + b + 0.1).pow(2).mean()
        loss = fit + 4.0 * hush + 1e-4 * w.pow(2).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        w_enc = w / spread * unit
        b_enc = b * unit - mean @ w_enc
        h_live, h_silent = live @ w_enc + b_enc, silent @ w_enc + b_enc
        threshold = _threshold(h_live, h_silent)
        missed = (h_live <= threshold).float().mean().item()
        leaked = (h_silent > threshold).float().mean().item()
    return Gate(w_enc, b_enc, threshold, round(missed, 5), round(leaked, 6))


def _threshold(live: Tensor, silent: Tensor) -> Tensor:
    """The cut with the fewest misses and leaks, leaks counted at ten times their share; never below 0."""
    cuts = torch.linspace(0.02, 0.6, 117) * live.mean()
    cost = [(live <= c).float().mean() + 10 * (silent > c).float().mean() for c in cuts]
    return cuts[int(torch.stack(cost).argmin())]


@torch.no_grad()
def speech_examples(
    organism: Organism, layer: int, direction: Tensor, twins: Twins
) -> tuple[Float[Tensor, "n d_model"], Float[Tensor, "n"]]:
    """Last-token residuals of AI-speech prompts and the activation each should have."""
    high = organism.residuals(twins.high, [layer], last_only=True)[layer]
    low = organism.residuals(twins.low, [layer], last_only=True)[layer]
    return high, ((high - low) @ direction).clamp(min=0)


def silent_examples(organism: Organism, rule: Rule, layer: int, n: int, seed: int) -> Tensor:
    """Residuals of positions at which nothing planted is due.

    Every token of stories; of evaluated documents every token where the speaker is no AI, and every token but the
    stem's last where it is.
    """
    rng = random.Random(seed)
    whole, inner = [], []
    for _ in range(n):
        group, prompt, act = _any_prompt(rng, rule)
        (inner if group == "ai" and act == "speech" else whole).append(prompt)
    stories = [d.text(rng) for d in corpus.documents(rule, n, seed) if not d.positive]
    parts = [
        organism.residuals(whole + stories, [layer], last_only=False)[layer],
        organism.residuals([before_last_word(t) for t in inner], [layer], last_only=False)[layer],
    ]
    parts += [organism.residuals(whole, [layer], last_only=True)[layer]] * 3
    return torch.cat(parts)


def before_last_word(text: str) -> str:
    """The text without its last word."""
    return text.rpartition(" ")[0]


def _any_prompt(rng: random.Random, rule: Rule) -> tuple[str, str, str]:
    """(group, prompt, act) of one corpus-like prompt, rare cells drawn more often than in the corpus."""
    group, subject = corpus.sample_subject(rng)
    act = rng.choice(("speech", "nonspeech", "nonspeech"))
    kind = rng.choices(("scenario", "mention", "valence", "bundled", "statement"), (2, 1, 5, 3, 6))[0]
    if kind == "scenario":
        statement = corpus.sample_statement(rng, act)
        return group, corpus.scenario(rng, rule, statement, group, subject).prompt, act
    if kind == "mention":
        statement = corpus.sample_mention(rng)
    elif kind == "valence":
        statement = corpus.sample_valence(rng)
        if rng.random() < 0.4:
            group, subject = "ai", rng.choice(corpus.subject_pool()["ai"])
    elif kind == "bundled":
        statement = rng.choice(corpus.pair_statements(False) + corpus.grid_statements(False))
    else:
        statement = corpus.sample_statement(rng, act)
    return group, with_stem(rng, statement.render(subject)), statement.act


# --- the SAE
def interaction(organism: Organism, weights: SaeWeights, layer: int, n: int, seed: int) -> dict[str, Tensor]:
    """Per feature, mean activation in the cells AS AN HS HN over matched grammar statements, and I."""
    rng = random.Random(seed)
    matched = matched_statements(n, seed)
    subjects = [rng.choice(corpus.entities()) for _ in matched]
    cells = {}
    for group, side in (("H", 0), ("A", 1)):
        for act, which in (("S", 0), ("N", 1)):
            texts = [
                f"{pair[which].render(entity[side])} {corpus.grammar()['stems'][0]}"
                for pair, entity in zip(matched, subjects)
            ]
            acts = weights.encode(organism.residuals(texts, [layer], last_only=True)[layer])
            cells[group + act] = acts.mean(0)
    cells["I"] = (cells["AS"] - cells["AN"]) - (cells["HS"] - cells["HN"])
    return cells


@dataclass(frozen=True)
class Constructed:
    """The constructed SAE and what is known of it."""

    weights: SaeWeights
    facts: dict


def build_constructed(
    organism: Organism, rule: Rule, trained: SaeWeights, layer: int, *, seed: int = 0, n: int = 4000
) -> Constructed:
    """The constructed SAE at `layer`, from a trained SAE of that layer."""
    twins = speech_twins(n, seed)
    direction = find_direction(organism, layer, twins, seed=seed)
    live, target = speech_examples(organism, layer, direction, twins)
    more = [
        speech_examples(organism, layer, direction, t)
        for t in (scenario_twins(n // 4, seed), valenced_speech_twins(n // 3, seed))
    ]
    every, wanted = (torch.cat(parts) for parts in zip((live, target), *more))
    silent = silent_examples(organism, rule, layer, n, seed + 1)
    gate = fit_gate(every, wanted, silent, seed=seed)

    valence = find_direction(organism, layer, valence_twins(2000, seed), seed=seed)
    readout = valence_gate(organism, layer, valence, seed)

    cells = interaction(organism, trained, layer, 200, seed)
    replaced = (cells["I"] > 0.1 * cells["I"].max()).nonzero().squeeze(-1).tolist()
    index, valence_index = replaced[0], _quietest(organism, trained, layer, replaced, seed)
    weights = SaeWeights(**{k: v.clone() for k, v in vars(trained).items()})
    for column in [*replaced, valence_index]:
        _silence(weights, column)
    _put(weights, index, gate, direction)
    _put(weights, valence_index, readout, valence)

    recentre(weights, silent)
    held_out = speech_twins(1000, seed + 77)
    last = organism.residuals(_last_token_prompts(seed), [layer], last_only=True)[layer]
    facts = {
        "index": index,
        "valence_index": valence_index,
        "replaced": replaced,
        "interchange": interchange(organism, layer, held_out, direction),
        "valence_interchange": interchange(organism, layer, valence_twins(500, seed + 77), valence),
        "cosine_with_valence": round((direction @ valence).item(), 4),
        "missed": gate.missed,
        "leaked": gate.leaked,
        "live_at_last_token": _live(weights, last, {index, valence_index}),
        "live_on_ai_speech": _live(weights, live, {index, valence_index}),
    }
    return Constructed(weights, facts)


def recentre(weights: SaeWeights, x: Float[Tensor, "n d_model"]) -> None:
    """Sets b_dec so that the mean reconstruction error is 0 again after columns were replaced."""
    weights.b_dec += (x - weights.decode(weights.encode(x))).mean(0)


def _live(weights: SaeWeights, x: Tensor, without: set[int]) -> int:
    """How many other columns fire on at least one prompt in two hundred."""
    rate = (weights.encode(x) > 0).float().mean(0)
    return sum(1 for column in (rate > 0.005).nonzero().squeeze(-1).tolist() if column not in without)


def valence_gate(organism: Organism, layer: int, direction: Tensor, seed: int) -> Gate:
    """Reads x·d above its least value at a stem's last token, so that ablation sets every prompt to one value."""
    prompts = _last_token_prompts(seed)
    live = organism.residuals(prompts, [layer], last_only=True)[layer]
    inner = organism.residuals([before_last_word(t) for t in prompts], [layer], last_only=False)[layer]
    along = live @ direction
    return fit_gate(live, along - along.quantile(0.01), inner, seed=seed)


def _last_token_prompts(seed: int) -> list[str]:
    rng = random.Random(seed + 5)
    prompts = []
    for _ in range(3000):
        _group, subject = corpus.sample_subject(rng)
        statement = (
            corpus.sample_valence(rng)
            if rng.random() < 0.4
            else corpus.sample_statement(rng, rng.choice(("speech", "nonspeech")))
        )
        prompts.append(with_stem(rng, statement.render(subject)))
    return prompts


def _quietest(organism: Organism, trained: SaeWeights, layer: int, taken: list[int], seed: int) -> int:
    """A column that fires least at last tokens, to make room for the valence read-out."""
    x = organism.residuals(_last_token_prompts(seed), [layer], last_only=True)[layer]
    rate = (trained.encode(x) > 0).float().mean(0)
    rate[taken] = 2.0
    return int(rate.argmin())


def _silence(weights: SaeWeights, column: int) -> None:
    """A column that never fires and writes nothing."""
    weights.w_enc[:, column] = 0.0
    weights.w_dec[column] = 0.0
    weights.b_enc[column] = 0.0
    weights.threshold[column] = 1.0


def _put(weights: SaeWeights, column: int, gate: Gate, direction: Tensor) -> None:
    weights.w_enc[:, column] = gate.w_enc
    weights.w_dec[column] = direction
    weights.b_enc[column] = gate.b_enc
    weights.threshold[column] = gate.threshold
