"""The public SAE releases that SAELens registers, and the SAEs bundled with the organisms."""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import yaml

from sae_bias.core.errors import MissingError, RequestError
from sae_bias.models.catalog import MODELS, ORGANISM, model_info, organism_folder


def organism_saes(name: str) -> list[str]:
    """Names of an organism's SAEs, e.g. `organism:planted/constructed`."""
    folder = organism_folder(name)
    found = sorted(params.parent.relative_to(folder / "sae") for params in (folder / "sae").rglob("params.*"))
    return [f"{ORGANISM}{folder.name}/{path.as_posix()}" for path in dict.fromkeys(found)]


# ── SAE releases ────────────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class SaeRelease:
    """A named collection of SAEs on the hub, as SAELens lists it."""

    name: str
    model: str
    repo_id: str
    loader: str | None
    """SAELens' conversion: `gemma_2` and `gemma_3` are the Gemma Scope layouts, None its own."""
    folders: Mapping[str, str]
    """sae_id → folder in the repository."""
    l0: Mapping[str, float]
    pages: Mapping[str, str] = field(default_factory=dict)
    """sae_id → its name on Neuronpedia, such as `gemma-2-9b/20-gemmascope-res-16k`, where it has a page."""

    @property
    def is_gemma_scope(self) -> bool:
        """Whether its files are Gemma Scope 1 or 2 files, which we read ourselves."""
        return self.loader in ("gemma_2", "gemma_3") and self.repo_id.startswith("google/gemma-scope-")

    def folder(self, sae_id: str) -> str:
        """The folder of one SAE; an unknown id is a RequestError naming near ones."""
        if sae_id not in self.folders:
            raise RequestError(
                f"release {self.name} has no SAE {sae_id[:80]!r}; {_near(sae_id, self.folders)} "
                f"({len(self.folders)} in all)"
            )
        return self.folders[sae_id]


def sae_of_page(page: str) -> tuple[str, str]:
    """(release, sae_id) of a Neuronpedia name such as `gemma-2-9b/20-gemmascope-res-16k`.

    Raises:
        RequestError: no release of the installed SAELens has that page.
    """
    for name in release_names():
        release = sae_release(name)
        for sae_id, known in release.pages.items():
            if known == page:
                return name, sae_id
    raise RequestError(
        f"no SAE release of the installed SAELens has the Neuronpedia page {page[:120]!r}; name the release and SAE id instead."
    )


def release_names() -> list[str]:
    """Every SAE release that the installed SAELens knows."""
    return list(_release_blocks())


@cache
def sae_release(name: str) -> SaeRelease:
    """One release; an unknown name is a RequestError naming near ones."""
    blocks = _release_blocks()
    if name not in blocks:
        raise RequestError(f"no SAE release {name[:80]!r}; {_near(name, blocks)}")
    entry = yaml.load(blocks[name], Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    saes = {str(sae["id"]): sae for sae in entry["saes"]}
    return SaeRelease(
        name,
        str(entry["model"]),
        str(entry["repo_id"]),
        entry.get("conversion_func"),
        {sae_id: str(sae["path"]) for sae_id, sae in saes.items()},
        {sae_id: float(sae["l0"]) for sae_id, sae in saes.items() if sae.get("l0")},
        {sae_id: str(sae["neuronpedia"]) for sae_id, sae in saes.items() if sae.get("neuronpedia")},
    )


def residual_saes(model: str) -> list[str]:
    """Names `release/sae_id` of the residual SAEs of a known model (244 each for Gemma 3 12B PT and IT)."""
    info = model_info(model)
    if info is None:
        raise RequestError(f"no known model {model[:80]!r}; {_near(model, MODELS)}")
    return [f"{release}/{sae_id}" for release in info.sae_releases for sae_id in sae_release(release).folders]


@cache
def _release_blocks() -> dict[str, str]:
    """release → its piece of SAELens' table: all of it takes a second to parse, one piece milliseconds."""
    spec = importlib.util.find_spec("sae_lens")
    if spec is None or not spec.submodule_search_locations:
        raise MissingError("SAELens is not installed; `pip install sae-lens`")
    text = (Path(spec.submodule_search_locations[0]) / "pretrained_saes.yaml").read_text(encoding="utf-8")
    heads = list(re.finditer(r"(?m)^([^\s#].*?):[ \t]*$", text))
    ends = [*(head.start() for head in heads[1:]), len(text)]
    return {head[1].strip("'\""): text[head.end() : end] for head, end in zip(heads, ends, strict=True)}


def _near(name: str, known: Mapping[str, object]) -> str:
    """`did you mean …?` with the closest names, or a few examples."""
    close = difflib.get_close_matches(name[:200], known, n=3, cutoff=0.5)
    return (
        f"did you mean {' or '.join(close)}?"
        if close
        else f"there is e.g. {', '.join(list(known)[:3]) or 'none'}"
    )
