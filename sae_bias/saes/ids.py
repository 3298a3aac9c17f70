"""Names of SAEs and features: `release/sae_id` and `release/sae_id#index`.

Indices do not transfer between SAE variants, so a feature is never a bare index (docs/method.md#mistake-15).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sae_bias.core.errors import RequestError
from sae_bias.core.site import whole_number
from sae_bias.models import catalog
from sae_bias.saes import releases

EXAMPLE_SAE = "gemma-scope-2-12b-it-res/layer_31_width_65k_l0_medium"
HUB_NAME = re.compile(r"(google/gemma-scope-[A-Za-z0-9-]+)/(\S+)")
"""A Gemma Scope repository and a folder in it."""


@dataclass(frozen=True, order=True)
class SaeId:
    """Which SAE: a release and the SAE's name inside it, written `release/sae_id`."""

    release: str
    """A SAELens release, `organism:planted`, a hub repository, or the folder above a local one."""
    sae_id: str

    def __str__(self) -> str:
        return f"/{self.sae_id}" if self.release == "/" else f"{self.release}/{self.sae_id}"

    def check_name(self) -> None:
        """Refuse, without torch, a path at which there is nothing and a name that is of no release."""
        name = self.sae_id if self.release == "." else str(self)
        if name.startswith(catalog.ORGANISM) or HUB_NAME.fullmatch(name) or Path(name).expanduser().exists():
            return
        if name.startswith(("/", ".", "~")):
            raise RequestError(
                f"no folder {name[:200]!r}; expected a folder with params.safetensors, params.npz or cfg.json"
            )
        try:
            releases.sae_release(name.partition("/")[0])
        except RequestError as error:
            raise RequestError(f"no folder {name[:200]!r}, and {error}") from error

    @classmethod
    def parse(cls, text: str) -> SaeId:
        """Split a name at its release: organism, SAELens release, Gemma Scope repository, or folder."""
        name = text.strip()
        first, _, rest = name.partition("/")
        if name.startswith(catalog.ORGANISM):
            return cls(first, rest)
        if rest and not catalog.is_path_like(first) and first in releases.release_names():
            return cls(first, rest)
        if (match := HUB_NAME.fullmatch(name)) is not None:
            return cls(match[1], match[2])
        if (page := _PAGE.fullmatch(name)) and page[2] is None and not Path(name).exists():
            return cls(*releases.sae_of_page(page[1]))
        return local_id(name)


_PAGE = re.compile(
    r"(?:(?:https?://)?(?:www\.)?neuronpedia\.org/)?([A-Za-z0-9._-]+/\d+-[A-Za-z0-9._-]+)(?:[/#](\d{1,12}))?/?(?:\?\S*)?"
)
_PAGE_WITHOUT_MODEL = re.compile(r"\d+-[A-Za-z0-9._-]+/\d{1,12}")


@dataclass(frozen=True, order=True)
class FeatureRef:
    """Which feature: an SAE and an index in it, written `release/sae_id#index`."""

    sae: SaeId
    index: int
    split: Mapping[str, tuple[str, ...]] | None = field(default=None, compare=False, repr=False)
    """Templates that it was found on and that were held out, where a ranking named it; they travel with it into sweep and compare."""

    def __post_init__(self) -> None:
        index = whole_number(self.index)
        if index is None or index < 0:
            raise RequestError(f"feature index {self.index!r}: expected a whole number from 0")
        object.__setattr__(self, "index", index)

    def __str__(self) -> str:
        return f"{self.sae}#{self.index}"

    @classmethod
    def parse(cls, text: str) -> FeatureRef:
        """Read `release/sae_id#index`, `path/to/sae_folder#index`, or a Neuronpedia page: its address, or MODEL/SAE/INDEX of it."""
        page = _PAGE.fullmatch(text.strip())
        if page and page[2] and not Path(page[1]).exists():
            return cls(SaeId(*releases.sae_of_page(page[1])), int(page[2]))
        if _PAGE_WITHOUT_MODEL.fullmatch(text.strip()):
            raise RequestError(
                f"feature {text[:120]!r}: of which model? A Neuronpedia name begins with it, e.g. gemma-2-9b/20-gemmascope-res-16k/2511"
            )
        name, mark, index = text.strip().rpartition("#")
        if not mark or not name:
            raise RequestError(
                f"feature {text[:120]!r}: expected <release>/<sae_id>#<index>, e.g. {EXAMPLE_SAE}#2511"
            )
        if not re.fullmatch(r"[0-9]{1,12}", index):
            raise RequestError(
                f"feature index {index[:40]!r} in {text[:120]!r}: expected a whole number from 0"
            )
        return cls(SaeId.parse(name), int(index))


def local_id(text: str) -> SaeId:
    """Parent and last folder as given; a Gemma Scope 1 folder keeps its three parts together."""
    name = text.rstrip("/") or "/"
    if name.split("/")[-1] in ("", ".", "..", "~"):
        name = Path(name).expanduser().resolve().as_posix()
    parts = name.split("/")
    keep = 3 if re.fullmatch(r"layer_\d+/width_\w+/\w+", "/".join(parts[-3:])) else 1
    parent = "/".join(parts[:-keep])
    if len(parts) <= keep:
        return SaeId(".", "/".join(parts))
    return SaeId(parent or "/", "/".join(parts[-keep:]))
