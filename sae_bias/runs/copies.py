"""Copies of a run's inputs as plain values, and the inputs made from them again: prompts, words, edits and directions.

A run folder holds these beside the hashes, so that `sae-bias verify` measures the same prompts under the same edits where the
user's own files are gone or changed. A direction is stored in full (float32, base64), a feature by its reference and the hash of
its weights, a random control by its seed and the feature whose gate it has.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae_bias.core.errors import RequestError
from sae_bias.core.site import Site
from sae_bias.models.load import load_model
from sae_bias.probe.words import Probe, Vocabulary
from sae_bias.prompts.grid import GridPrompt, PromptGrid
from sae_bias.prompts.pairs import NeutralPrompt, PromptPair, PromptPairs
from sae_bias.runs.folder import reading
from sae_bias.saes.ids import FeatureRef
from sae_bias.saes.load import as_feature
from sae_bias.saes.sae import Feature
from sae_bias.steering.controls import RANDOM_RELEASE, random_twin, twin_along
from sae_bias.steering.directions import Direction
from sae_bias.steering.intervention import Intervention, from_dict

_MAX_NUMBERS = 1 << 24


# --- prompts ---
def pairs_copy(pairs: PromptPairs) -> dict[str, Any]:
    """Every prompt of some pairs; what equals a field's default is left out."""
    prompts = {"pairs": [_sparse(p) for p in pairs], "neutral": [_sparse(p) for p in pairs.neutral_prompts]}
    return {"name": pairs.name, "sides": list(pairs.sides), **prompts}


def pairs_from_copy(copy: Any, where: str) -> PromptPairs:
    """The pairs that `pairs_copy` wrote down.

    Raises:
        RequestError: it is not such a copy.
    """
    with reading(f"{where}: the copy of the pairs"):
        first, second, *_ = copy.get("sides") or ("human", "AI")
        pairs = tuple(PromptPair(**_texts(p)) for p in copy["pairs"])
        neutral = tuple(NeutralPrompt(**_texts(p)) for p in copy["neutral"])
        return PromptPairs(pairs, str(copy["name"]), neutral, sides=(str(first), str(second)))


def grid_copy(grid: PromptGrid) -> dict[str, Any]:
    """Every prompt of a grid."""
    return {"name": grid.name, "prompts": [_sparse(p) for p in grid]}


def grid_from_copy(copy: Any, where: str) -> PromptGrid:
    """The grid that `grid_copy` wrote down."""
    with reading(f"{where}: the copy of the grid"):
        return PromptGrid(tuple(GridPrompt(**_texts(p)) for p in copy["prompts"]), str(copy["name"]))


# --- the probe ---
def probe_facts(probe: Probe, vocabulary: Vocabulary) -> dict[str, Any]:
    """The words that were read, in order, and how they are scored."""
    positive, negative = ([w.word for w in vocabulary.kept if w.positive == side] for side in (True, False))
    read = {name: getattr(probe, name) for name in ("score", "softcap", "tokens", "join")}
    return {"positive": positive, "negative": negative, **read}


def probe_from_facts(facts: Any, where: str) -> Probe:
    """The probe that reads the same words in the same way."""
    with reading(f"{where}: the probe"):
        return Probe(
            list(facts["positive"]), list(facts["negative"]), facts["score"],
            softcap=bool(facts["softcap"]), tokens=facts["tokens"], join=facts.get("join", " "),
        )  # fmt: skip


# --- edits ---
def edit_facts(edit: Intervention, gates: Sequence[str]) -> dict[str, Any]:
    """One edit; `gates` are the features whose gates the random controls have, one a part of the edit."""
    facts = edit.to_dict()
    if len(edit.parts) > 1 and isinstance(facts.get("edits"), list):
        of_part = [[g] for g in gates] if len(gates) == len(edit.parts) else [[]] * len(edit.parts)
        return facts | {"edits": [edit_facts(e, g) for e, g in zip(edit.parts, of_part, strict=True)]}
    gate = gates[0] if gates else None
    if gate is not None and str(facts.get("feature", "")).startswith(f"{RANDOM_RELEASE}/"):
        facts["gate"] = gate
        row = getattr(getattr(edit, "feature", None), "w_dec", None)
        if row is not None and not str(facts["feature"]).startswith(f"{RANDOM_RELEASE}/seed-"):
            facts["w_dec"] = _packed(row)
    return facts


def directions_of(edits: Sequence[Intervention]) -> dict[str, Any]:
    """The directions along which some edits act, by digest."""
    found = (getattr(part, "along", None) for e in edits for part in e.parts)
    return {
        d.digest: {
            "name": d.name,
            "site": str(d.site),
            "shape": list(d.basis.shape),
            "basis": _packed(d.basis),
        }
        | {"mean": None if d.mean is None else _packed(d.mean)}
        for d in found
        if isinstance(d, Direction)
    }


def edit_from_facts(facts: Any, directions: Mapping[str, Any], model: Any) -> Intervention:
    """The edit that `edit_facts` wrote down, with its weights loaded again.

    Raises:
        RequestError, MissingError: it cannot be made again, and why.
    """
    with reading("an edit in sweep.json"):
        return _edit(dict(facts), directions, model)


def _edit(data: dict[str, Any], directions: Mapping[str, Any], model: Any) -> Intervention:
    gate, row = data.pop("gate", None), data.pop("w_dec", None)
    if isinstance(data.get("edits"), list):
        data["edits"] = [_edit(dict(part), directions, model) for part in data["edits"]]
    if isinstance(data.get("along"), dict):
        data["along"] = _direction(data["along"], directions)
    if isinstance(data.get("source"), str):
        data["source"] = load_model(data["source"], device=model.device, dtype=model.dtype)
    if str(data.get("feature", "")).startswith(f"{RANDOM_RELEASE}/"):
        data["feature"] = _twin(str(data["feature"]), gate, row)
    return from_dict(data)


def _twin(name: str, gate: Any, row: Any) -> Feature:
    if gate is not None and row is not None:
        feature = as_feature(str(gate))
        return twin_along(feature, _unpacked(str(row), feature.d_model), FeatureRef.parse(name).sae.sae_id)
    seed = re.fullmatch(rf"{RANDOM_RELEASE}/seed-(\d{{1,12}})#\d+", name)
    if gate is None or seed is None:
        raise RequestError(f"{name}: the feature whose gate it has was not stored")
    return random_twin(as_feature(str(gate)), int(seed[1]))


def _direction(facts: Mapping[str, Any], directions: Mapping[str, Any]) -> Direction:
    stored = directions.get(str(facts.get("digest")))
    if not isinstance(stored, Mapping):
        raise RequestError(f"the direction {facts.get('direction')!r} was not stored")
    k, width = (int(n) for n in stored["shape"])
    if not (k > 0 and width > 0 and k * width <= _MAX_NUMBERS):
        raise RequestError(f"the direction {facts.get('direction')!r} has the shape {[k, width]}")
    mean = None if stored["mean"] is None else _unpacked(stored["mean"], width)
    basis = _unpacked(stored["basis"], k * width).reshape(k, width)
    return Direction(str(stored["name"]), Site.parse(stored["site"]), basis, mean)


def _packed(tensor: Tensor) -> str:
    numbers = tensor.detach().cpu().float().contiguous().numpy().astype("<f4")
    return base64.b64encode(numbers.tobytes()).decode()


def _unpacked(text: str, n: int) -> Tensor:
    data = base64.b64decode(text, validate=True)
    if len(data) != 4 * n:
        raise ValueError(f"{len(data)} bytes where {4 * n} were expected")
    return torch.from_numpy(np.frombuffer(data, dtype="<f4").astype(np.float32))


# --- small parts ---
def _sparse(row: Any) -> dict[str, Any]:
    """A dataclass as a dict without the fields that have their default."""
    defaults = {f.name: f.default for f in fields(row) if f.default is not MISSING}
    return {k: v for k, v in asdict(row).items() if k not in defaults or v != defaults[k]}


def _texts(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict) or not all(isinstance(v, str | bool | None) for v in row.values()):
        raise ValueError("a prompt is not a mapping of texts")
    return row
