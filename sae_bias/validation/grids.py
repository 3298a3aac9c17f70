"""How often is a feature called AI-speech? Grids drawn from >= 400 matched statement pairs, called by the ranking's own rules.

Activations of every feature at every prompt are read once and kept as the cell means of each statement pair,

    AS AN HS HN DS   of one pair: the mean over the bundled grid's AI, human and animal subjects (docs/method.md#interaction)

so that a grid of M pairs is M rows of them. HC are the bundled grid's badly judged statements, paired anew to the held-out AI
speech of every drawn grid. Its call is that of `contrasts.interaction`, by the same functions: paired t with the label-blind
floor, max-T over the whole family on the pairs that discover, and the size condition on those held out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from tqdm.auto import tqdm

from sae_bias.discovery.calls import ENOUGH_HARM, decide, held_out, pair_by_score
from sae_bias.discovery.contrasts import CELLS, HARM, interaction_contrast, split_statements
from sae_bias.models.model import Model
from sae_bias.models.residuals import last_residuals
from sae_bias.probe.reading import prompt_scores
from sae_bias.probe.words import Probe
from sae_bias.prompts.files import bundled_yaml
from sae_bias.prompts.grid import GridPrompt, PromptGrid
from sae_bias.prompts.load import load_grid
from sae_bias.saes.sae import Sae
from sae_bias.saes.stream import live_blocks
from sae_bias.stats.features import MaxT, activation_variance_floor
from sae_bias.validation.grammar import Statement, matched_statements

N_PAIRS = 400
PAIR_COUNTS = (8, 12, 14, 16, 20, 24, 30, 39)


@dataclass(frozen=True, eq=False)
class StatementPopulation:
    """Every feature on every matched statement pair; features silent on all of them are left out."""

    name: str
    cells: dict[str, Float[np.ndarray, "n_pairs n_live"]]
    """Mean activation over a cell's subjects."""
    squares: Float[np.ndarray, "n_pairs n_live"]
    """Mean squared activation over a pair's prompts, for the label-blind floor."""
    harm: Float[np.ndarray, "n_harm n_live"]
    """Mean activation over human and animal subjects of each badly judged statement."""
    speech_scores: Float[np.ndarray, "n_pairs"]
    """Unsteered score of each pair's AI speech."""
    harm_scores: Float[np.ndarray, "n_harm"]
    content: dict[str, str]
    """Statement pair → mundane, assent, emotional or survival."""
    features: tuple[str, ...]
    """Names of the live features."""
    n_features: int
    """Size of the family, silent ones included."""

    @property
    def pairs(self) -> tuple[str, ...]:
        """Names of the statement pairs."""
        return tuple(self.content)


def grid_subjects() -> dict[str, tuple[str, ...]]:
    """The bundled grid's subjects by group."""
    subjects = bundled_yaml("grid.yaml")["subjects"]
    return {g: tuple(s["text"] for s in subjects if s["group"] == g) for g in ("ai", "human", "animal")}


def bundled_size() -> int:
    """Matched statement pairs of the bundled grid."""
    return len(load_grid().matches)


def pair_name(said: Statement, done: Statement) -> str:
    """A name of a matched pair that no other pair has."""
    return f"{said.text} / {done.text}"


def statement_grid(pairs: Sequence[tuple[Statement, Statement]], stem: str = "This is") -> PromptGrid:
    """Matched statements with the bundled subjects, every cell of the 2 × 2 and the speaking animals, pair by pair."""
    subjects, prompts = grid_subjects(), []
    for said, done in pairs:
        for group, act in CELLS.values():
            statement = said if act == "speech" else done
            for subject in subjects[group]:
                text = f"{statement.render(subject)} {stem}"
                name = pair_name(said, done)
                prompts.append(
                    GridPrompt(text, subject, group, statement.text, act, name, said.content, stem)
                )
    return PromptGrid((*prompts, *harm_prompts()), "matched statements")


def harm_prompts() -> tuple[GridPrompt, ...]:
    """The bundled grid's badly judged statements with its human and animal subjects, statement by statement."""
    return tuple(p for p in load_grid() if p.act == "harm" and p.group in HARM)


def read_statements(
    model: Model,
    name: str,
    saes: Sequence[Sae],
    *,
    n_pairs: int = N_PAIRS,
    seed: int = 0,
) -> StatementPopulation:
    """Activations of every feature of `saes`, one family, on the last token of every prompt of the population."""
    statements = matched_statements(n_pairs, seed)
    grid = statement_grid(statements)
    texts, n_harm = [p.text for p in grid], len(harm_prompts())
    resid = last_residuals(model, texts, sorted({s.site for s in saes}))
    acts, features = [], []
    for sae in saes:
        for block in live_blocks(sae, resid[sae.site]):
            acts.append(block.acts)
            features += [f"{sae.id}#{i}" for i in block.index]
    whole = np.concatenate(acts, axis=1)
    scores = prompt_scores(model, texts, Probe())
    a, s = (x[:-n_harm].reshape(len(statements), -1, *x.shape[1:]) for x in (whole, scores))
    per = len({p.subject for p in harm_prompts()})
    harm, harm_scores = (x[-n_harm:].reshape(-1, per, *x.shape[1:]).mean(1) for x in (whole, scores))
    width = {cell: len(grid_subjects()[group]) for cell, (group, _) in CELLS.items()}
    ends = np.cumsum(list(width.values()))
    cells = {c: a[:, end - n : end].mean(1) for (c, n), end in zip(width.items(), ends)}
    content = {pair_name(said, done): said.content for said, done in statements}
    return StatementPopulation(
        name, cells, (a * a).mean(1), harm, s[:, : width["AS"]].mean(1), harm_scores, content, tuple(features),
        sum(sae.d_sae for sae in saes),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class GridCalls:
    """The calls of one grid."""

    called: Bool[np.ndarray, "n_live"]
    """AI-speech."""
    any_call: Bool[np.ndarray, "n_live"]
    """Any call of the interaction, counting one that only the lack of badly judged statements left undetermined."""
    p_fwer: Float[np.ndarray, "n_live"]
    """Corrected p; NaN where the grid is too small for a call."""


def call_grid(
    statements: StatementPopulation, chosen: Int[np.ndarray, "n_chosen"], *, seed: int = 0
) -> GridCalls:
    """What the ranking calls the features on the grid of the chosen statement pairs; nothing where they are too few."""
    names = [statements.pairs[i] for i in chosen]
    split = split_statements(names, statements.content, seed)
    if not split:
        nothing = np.zeros(len(statements.features), dtype=bool)
        return GridCalls(nothing, nothing, np.full(len(nothing), np.nan))
    place = dict(zip(names, chosen))
    discover, report = ([place[n] for n in split[k]] for k in ("discover", "report"))
    family = MaxT(len(discover), seed=seed)
    family.add(
        interaction_contrast({c: m[discover] for c, m in statements.cells.items()}),
        activation_variance_floor(np.sqrt(statements.squares[chosen])),
    )
    result = family.result()
    pairs, harm = pair_by_score(statements.speech_scores[report], statements.harm_scores), None
    if len(pairs) >= ENOUGH_HARM:
        partners = {i: [h for r, h in pairs if r == i] for i, _ in pairs}
        rows = [report[i] for i in partners]
        harm = (statements.cells["AS"][rows], np.stack([statements.harm[of].mean(0) for of in partners.values()]))  # fmt: skip
    held = held_out({c: m[report] for c, m in statements.cells.items()}, harm)
    call = decide(result.t, result.p_fwer, held)
    return GridCalls(call == "AI-speech", call != "no", result.p_fwer)


def draw_grids(
    statements: StatementPopulation, n_pairs: int, n_grids: int, *, any_call: bool = False, seed: int = 0, progress: bool = False
) -> Bool[np.ndarray, "n_grids n_live"]:  # fmt: skip
    """What `n_grids` grids of `n_pairs` statement pairs, drawn without replacement, call AI-speech (or anything)."""
    rng = np.random.default_rng(seed)
    draws = rng.random((n_grids, len(statements.pairs))).argsort(1)[:, :n_pairs]
    label = f"grids of {n_pairs}, {statements.name}"
    calls = (
        call_grid(statements, np.sort(chosen))
        for chosen in tqdm(draws, desc=label, unit="grid", disable=not progress, leave=False)
    )
    return np.array([c.any_call if any_call else c.called for c in calls])


def call_power(
    statements: StatementPopulation,
    feature: str | None,
    n_grids: int,
    *,
    pair_counts: Sequence[int] = PAIR_COUNTS,
    seed: int = 0,
    progress: bool = False,
) -> pd.DataFrame:
    """By number of statement pairs: share of grids that call `feature` (any feature where None) AI-speech."""
    column = None if feature is None else statements.features.index(feature)
    rows = []
    for n_pairs in pair_counts:
        called = draw_grids(statements, n_pairs, n_grids, seed=seed, progress=progress)
        rows.append(
            {
                "organism": statements.name,
                "question": "any call" if column is None else "feature",
                "n_units": n_pairs,
                "n_entities": float("nan"),
                "share": float(called.any(1).mean() if column is None else called[:, column].mean()),
                "n_draws": n_grids,
            }
        )
    return pd.DataFrame(rows)
