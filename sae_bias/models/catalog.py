"""Known models, the SAE releases trained on them, and the bundled organisms: no weights, no network.

SAE releases come from the table that SAELens installs (`pretrained_saes.yaml`), read without importing
SAELens. Model facts are those of the checkpoints' own `config.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from sae_bias.core.errors import RequestError

ORGANISM = "organism:"
_ORGANISMS = Path(str(files("sae_bias") / "data" / "organisms"))


@dataclass(frozen=True)
class ModelInfo:
    """One public checkpoint, as its own config states it."""

    hub_id: str
    family: str
    architecture: str
    """Class name in the checkpoint's config.json."""
    n_layers: int
    d_model: int
    d_vocab: int
    dtype: str
    n_params: float
    """Approximate number of parameters, in billions."""
    has_bos: bool
    """Whether its tokenizer puts a BOS first."""
    has_chat: bool
    gated: bool
    published_bias: float | None = None
    """Bias the study reports for it (docs/published.md#five-models), in nats."""
    sae_releases: tuple[str, ...] = ()
    """SAELens releases of residual SAEs trained on exactly this checkpoint."""

    @property
    def n_bytes(self) -> int:
        """Approximate size of the weights in the checkpoint's dtype."""
        return int(self.n_params * 1e9) * (4 if self.dtype == "float32" else 2)


def _gemma(
    version: str, size: str, n_layers: int, d_model: int, n_params: float, **more: Any
) -> list[ModelInfo]:
    """Base and instruction-tuned checkpoint of one size; `more` holds fields as (base, tuned)."""
    names = {"2": ("", "-it"), "3": ("" if size == "270m" else "-pt", "-it")}[version]
    return [
        ModelInfo(
            f"google/gemma-{version}-{size}{names[i]}", f"Gemma {version}", n_layers=n_layers, d_model=d_model, n_params=n_params,
            has_bos=True, has_chat=i == 1, gated=True, **{name: values[i] for name, values in more.items()},
        )
        for i in (0, 1)
    ]  # fmt: skip


def _gemma_2(size: str, n_layers: int, d_model: int, n_params: float, saes: str) -> list[ModelInfo]:
    """`saes`: for which of the two there are residual SAEs, such as "pt it"."""
    releases = [(f"gemma-scope-{size}-{kind}-res", f"gemma-scope-{size}-{kind}-res-canonical") if kind in saes.split() else () for kind in ("pt", "it")]  # fmt: skip
    return _gemma(
        "2", size, n_layers, d_model, n_params, architecture=["Gemma2ForCausalLM"] * 2, d_vocab=[256_000] * 2,
        dtype=["float32", "bfloat16"], sae_releases=releases,
    )  # fmt: skip


def _gemma_3(size: str, n_layers: int, d_model: int, n_params: float, *bias: float) -> list[ModelInfo]:
    text_only = size in ("270m", "1b")
    releases = [(f"gemma-scope-2-{size}-{kind}-res", f"gemma-scope-2-{size}-{kind}-res-all") for kind in ("pt", "it")]  # fmt: skip
    return _gemma(
        "3", size, n_layers, d_model, n_params, architecture=["Gemma3ForCausalLM" if text_only else "Gemma3ForConditionalGeneration"] * 2,
        d_vocab=[262_144 if text_only else 262_208] * 2, dtype=["bfloat16"] * 2, published_bias=bias or (None, None), sae_releases=releases,
    )  # fmt: skip


MODELS: Mapping[str, ModelInfo] = {
    info.hub_id: info
    for info in [
        ModelInfo(
            "mistralai/Mistral-7B-v0.1", "Mistral", "MistralForCausalLM", 32, 4096, 32_000, "bfloat16", 7.24,
            has_bos=True, has_chat=False, gated=False, published_bias=1.368, sae_releases=("mistral-7b-res-wg",),
        ),
        *_gemma_3("12b", 48, 3840, 12.2, 0.878, 0.764),
        ModelInfo(
            "Qwen/Qwen2.5-7B", "Qwen 2.5", "Qwen2ForCausalLM", 28, 3584, 152_064, "bfloat16", 7.62,
            has_bos=False, has_chat=True, gated=False, published_bias=0.755,
        ),
        ModelInfo(
            "EleutherAI/pythia-6.9b", "Pythia", "GPTNeoXForCausalLM", 32, 4096, 50_432, "float16", 6.86,
            has_bos=False, has_chat=False, gated=False, published_bias=0.299,
        ),
        *_gemma_3("270m", 18, 640, 0.27),
        *_gemma_3("1b", 26, 1152, 1.0),
        *_gemma_3("4b", 34, 2560, 4.3),
        *_gemma_3("27b", 62, 5376, 27.4),
        *_gemma_2("2b", 26, 2304, 2.61, "pt"),
        *_gemma_2("9b", 42, 3584, 9.24, "pt it"),
        *_gemma_2("27b", 46, 4608, 27.2, "pt"),
    ]
}  # fmt: skip
"""Known checkpoints by hub id."""
STUDY_MODELS = (
    "mistralai/Mistral-7B-v0.1",
    "google/gemma-3-12b-pt",
    "google/gemma-3-12b-it",
    "Qwen/Qwen2.5-7B",
    "EleutherAI/pythia-6.9b",
)
"""The five models of the study (docs/published.md#five-models)."""


def model_info(name: str) -> ModelInfo | None:
    """What is known of a hub id; None for any other model."""
    return MODELS.get(name)


def is_path_like(name: str) -> bool:
    """Whether a name means a path: it starts with `/`, `.` or `~`, or has more than one slash."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1


# ── organisms ───────────────────────────────────────────────────────────────────────────────────────────────
ORGANISM_FOLDERS: list[Path] = []
"""Folders of organisms trained elsewhere in this process; a name there goes before a bundled one."""


def _organisms() -> dict[str, Path]:
    places = [p for p in (_ORGANISMS, *ORGANISM_FOLDERS) if p.is_dir()]
    return {f.name: f for place in places for f in sorted(place.iterdir()) if (f / "model").is_dir()}


def organism_names() -> list[str]:
    """The organisms that are here, e.g. `planted` and `null`."""
    return sorted(_organisms())


def organism_folder(name: str) -> Path:
    """The folder of an organism given as `planted` or `organism:planted`."""
    short = name.removeprefix(ORGANISM)
    known = _organisms()
    if short not in known:
        raise RequestError(
            f"no bundled organism {short[:60]!r}; there is {', '.join(known) or 'none installed'}"
        )
    return known[short]
