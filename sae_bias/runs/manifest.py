"""What a run was made with: versions, model and SAE files, prompts, words, seed, command, git state."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sae_bias.core.files import digest
from sae_bias.core.versions import git_state, versions
from sae_bias.models.fingerprint import model_digest, model_files
from sae_bias.models.model import Model
from sae_bias.probe.words import Vocabulary
from sae_bias.prompts.grid import PromptGrid
from sae_bias.prompts.pairs import PromptPairs
from sae_bias.runs.copies import grid_copy, pairs_copy
from sae_bias.runs.folder import SCHEMA
from sae_bias.saes.sae import Sae, sae_facts


def manifest(
    model: Model,
    *,
    pairs: PromptPairs | None = None,
    grid: PromptGrid | None = None,
    vocabulary: Vocabulary | None = None,
    saes: Sequence[Sae] = (),
    seed: int = 0,
    **more: Any,
) -> dict[str, Any]:
    """The manifest of a run, as plain values; `more` is added as it is.

    Prompts stand in it by hash and, under `copies`, in full: what was measured can be measured again without the user's files.
    """
    words = vocabulary.words if vocabulary else ()
    kept = vocabulary.kept if vocabulary else ()
    positive, negative = ([w.word for w in kept if w.positive == side] for side in (True, False))
    return {
        "schema": SCHEMA,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": versions(),
        "model": {
            "name": model.name,
            "architecture": model.architecture,
            "n_layers": model.n_layers,
            "d_model": model.d_model,
            "organism": model.is_organism,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": model.device.type,
            "digest": model_digest(model),
            "commit": getattr(model.config, "_commit_hash", None),
            "files": model_files(model),
            **({} if model.gguf is None else {"gguf": model.gguf, "label": model.label}),
        },
        "saes": [sae_facts(s) for s in saes],
        "prompts": {
            "pairs": None if pairs is None else {"name": pairs.name, "digest": pairs.digest, "n": len(pairs)},
            "grid": None if grid is None else {"name": grid.name, "digest": grid.digest, "n": len(grid)},
        },
        "words": {
            "positive": positive,
            "negative": negative,
            "excluded": [f"{w.word} ({w.reason})" for w in words if w.reason],
            "digest": digest(positive, negative),
        },
        "seed": seed,
        "git": git_state(),
        **more,
        "copies": {
            **({} if pairs is None else {"pairs": pairs_copy(pairs)}),
            **({} if grid is None else {"grid": grid_copy(grid)}),
        },
    }
