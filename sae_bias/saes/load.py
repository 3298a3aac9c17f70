"""Sparse autoencoders and their features; the only module that imports SAELens, and only for whole SAEs.

    a = JumpReLU(x · W_enc + b_enc) = h · 1[h > threshold]        x̂ = a · W_dec + b_dec

(Rajamanoharan et al. 2024, arXiv:2407.14435). One feature is one column of W_enc, one row of W_dec and two
numbers; for a plain ReLU or JumpReLU encoder nothing else is ever read. SAEs whose activation needs all
features at once (TopK, gated, normalized input) take the full path through SAELens and say so:
`Sae.reduces_to_one_row` is False.
"""

from __future__ import annotations

import os
import re
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from sae_bias.core.errors import RequestError
from sae_bias.models import catalog, hub
from sae_bias.saes import releases
from sae_bias.saes.formats import format_of, gemma_scope, saelens, weights_files
from sae_bias.saes.ids import EXAMPLE_SAE, HUB_NAME, FeatureRef, SaeId, local_id
from sae_bias.saes.randomized import MADE
from sae_bias.saes.releases import release_names, sae_release
from sae_bias.saes.remote import HubPlace, hub_place
from sae_bias.saes.sae import Feature, Sae

if TYPE_CHECKING:
    from sae_lens import SAE


# ── loading ─────────────────────────────────────────────────────────────────────────────────────────────────
def load_sae(name: str | Path | SaeId | Sae | SAE[Any]) -> Sae:
    """An SAE by name, folder or SAELens object; its weights stay on disk until a slice is asked for.

    name: `"<release>/<sae_id>"`, `"organism:planted/constructed"`, a Gemma Scope or SAELens folder, or a
        SAELens SAE.

    Raises:
        RequestError: unknown name, no SAE there, not a residual SAE, or a damaged file.
        MissingError: not cached and no network, or gated; says what gets it.
    """
    if isinstance(name, Sae):
        return name
    if hasattr(name, "W_dec") and hasattr(name, "cfg"):
        return saelens.wrap_lens(name)
    if not isinstance(name, str | Path | SaeId):
        raise RequestError(
            f"an SAE cannot be a {type(name).__name__}; expected a name such as {EXAMPLE_SAE} or a folder"
        )
    text = str(name).strip()
    if "\0" in text or not text:
        raise RequestError(f"SAE name {text[:80]!r}: expected e.g. {EXAMPLE_SAE}")
    if text in MADE:
        return MADE[text]
    path = _existing(text)
    if path is not None and path.is_dir():
        return _load_folder(path, local_id(text.rstrip("/") or "/"))
    if text.startswith(catalog.ORGANISM):
        return _load_organism(SaeId.parse(text))
    if path is not None and path.is_file():
        return _load_file(path)
    if "#" in text:
        raise RequestError(f"{text[:120]!r} names a feature; an SAE name has no #, e.g. {EXAMPLE_SAE}")
    if text.startswith(("/", ".", "~")):
        raise RequestError(
            f"no folder {text[:200]!r}; expected a folder with params.safetensors, params.npz or cfg.json"
        )
    return _load_named(text)


def load_feature(name: str | FeatureRef) -> Feature:
    """One feature by `"<release>/<sae_id>#<index>"`, `"path/to/sae_folder#446"` or a FeatureRef."""
    ref = name if isinstance(name, FeatureRef) else FeatureRef.parse(str(name))
    feature = load_sae(ref.sae).feature(ref.index)
    return feature if feature.ref == ref and ref.split is None else replace(feature, ref=ref)


def sae_of(feature: Feature) -> Sae | None:
    """The SAE a feature belongs to, where it can be loaded."""
    if feature.whole is not None:
        return feature.whole
    try:
        return load_sae(feature.ref.sae)
    except RequestError:
        return None


def as_feature(x: str | FeatureRef | Feature) -> Feature:
    """The feature that a string, a reference or a Feature stands for."""
    if isinstance(x, Feature):
        return x
    if isinstance(x, str | FeatureRef):
        return load_feature(x)
    raise RequestError(
        f"a feature cannot be a {type(x).__name__}; expected e.g. {EXAMPLE_SAE}#2511, never a bare index"
    )


def _load_named(text: str) -> Sae:
    """A release of SAELens or a Gemma Scope repository on the hub."""
    sae_id, release = SaeId.parse(text), None
    if not HUB_NAME.fullmatch(text):
        try:
            release = sae_release(
                sae_id.release if sae_id.release in release_names() else text.partition("/")[0]
            )
        except RequestError as error:
            raise RequestError(f"no folder {text[:200]!r}, and {error}") from error
        if sae_id.release == ".":
            raise RequestError(
                f"{text} is a release; which SAE of it? e.g. {text}/{next(iter(release.folders))}"
            )
    hub.refuse_traversal(sae_id.sae_id)
    if (place := hub_place(text)) is not None:
        return _load_hub(place)
    assert release is not None
    release.folder(sae_id.sae_id)  # refuses an unknown one
    return _once(text, lambda: _load_through_lens(sae_id, release), sae_id)


def _load_hub(place: HubPlace) -> Sae:
    """A Gemma Scope SAE from the hub: with its weights cached, no network is touched."""
    gemma_scope.read_info(
        place.label, None
    )  # refuses a transcoder by its name, before anything is downloaded
    params, config = _hub_files(place.repo_id, place.file_name, f"{place.folder}/config.json")
    info = gemma_scope.read_info(place.label, config, model_name=place.model)
    return _once(
        str(params),
        lambda: _labelled(gemma_scope.open_files(place.sae, params, config, place.label, info), place.l0),
        place.sae,
    )


def _hub_files(repo_id: str, params_name: str, config_name: str) -> tuple[Path, Path | None]:
    """Weights and, in Gemma Scope 2, the config where there is one (the small file is asked for first)."""
    params, is_npz = hub.cached_file(repo_id, params_name), params_name.endswith(".npz")
    if params is not None or is_npz or hub.is_offline():
        config = None if is_npz else hub.cached_file(repo_id, config_name)
        return params or hub.hub_file(repo_id, params_name), config
    config = hub.optional_hub_file(repo_id, config_name)
    return hub.hub_file(repo_id, params_name), config


def _load_organism(sae_id: SaeId) -> Sae:
    folder = catalog.organism_folder(sae_id.release)
    if not sae_id.sae_id:
        raise RequestError(
            f"{sae_id.release} is a model; its SAEs are {', '.join(releases.organism_saes(folder.name))}"
        )
    hub.refuse_traversal(sae_id.sae_id)
    inside = folder / "sae" / sae_id.sae_id
    if gemma_scope.find_params(inside) is None:
        known = ", ".join(releases.organism_saes(folder.name)) or "none"
        raise RequestError(f"{sae_id.release} has no SAE {sae_id.sae_id[:80]!r}; it has {known}")
    return _load_folder(inside, sae_id)


def _load_folder(folder: Path, sae_id: SaeId) -> Sae:
    """A local folder in the layout of one of the registered formats."""
    found = format_of(folder)
    if found is None:
        raise RequestError(f"no SAE in {folder}: {_what_is_there(folder)}")
    return _once(str(folder.absolute()), lambda: found.open(folder, sae_id), sae_id)


# ── one SAE a process ───────────────────────────────────────────────────────────────────────────────────────
_OPEN: WeakValueDictionary[tuple[str, str], Sae] = WeakValueDictionary()
_STAMPS: dict[tuple[str, str], object] = {}
_RECENT: deque[Sae] = deque(maxlen=8)
"""Those read in slices are kept a while; one that is whole in memory only as long as somebody holds it."""


def _once(name: str, open_sae: Callable[[], Sae], sae_id: SaeId) -> Sae:
    """The open SAE of this name, opened where it is not, or where its files have changed since."""
    key = (name, str(sae_id))
    known = _OPEN.get(key)
    if known is not None and _stamp(known) == _STAMPS.get(key):
        return known
    sae = open_sae()
    _OPEN[key], _STAMPS[key] = sae, _stamp(sae)
    if sae.lens is None:
        _RECENT.append(sae)
    return sae


def _stamp(sae: Sae) -> object:
    """Size and time of the files beside its weights; None for one that has no files here."""
    if sae.path is None:
        return None
    try:
        files = [
            entry
            for entry in os.scandir(sae.path.parent)
            if entry.name == sae.path.name or entry.name.endswith(".json")
        ]
        return sorted((entry.name, entry.stat().st_size, entry.stat().st_mtime_ns) for entry in files)
    except OSError:
        return ()


def _load_through_lens(sae_id: SaeId, release: releases.SaeRelease) -> Sae:
    """Any other release, whole, by SAELens' own loader."""
    from sae_lens import SAE

    with hub.hub_errors(str(sae_id), release.repo_id), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            lens = SAE.from_pretrained(sae_id.release, sae_id.sae_id, device="cpu")
        except (ValueError, KeyError, NotImplementedError) as error:
            raise RequestError(f"{sae_id}: SAELens cannot load it: {str(error).strip()[:200]}") from error
    return _labelled(saelens.wrap_lens(lens, sae_id), release.l0.get(sae_id.sae_id))


def _labelled(sae: Sae, l0: float | None) -> Sae:
    """`sae` with the L0 that its release states, where it has none of its own."""
    return (
        sae if l0 is None or sae.label_l0 is not None else replace(sae, info=replace(sae.info, label_l0=l0))
    )


# ── names ───────────────────────────────────────────────────────────────────────────────────────────────────
def _existing(text: str) -> Path | None:
    try:
        path = Path(text).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):
        return None


def _load_file(file: Path) -> Sae:
    """The SAE whose weights file was named."""
    if any(fnmatch(file.name, name) for name in weights_files()):
        return load_sae(file.parent)
    if file.suffix in _PICKLES:
        raise RequestError(f"{file}: {_convert(file.name)}")
    raise RequestError(
        f"{file} is not the weights of an SAE; name the folder that holds {', '.join(weights_files())}"
    )


_PICKLES = (".pt", ".bin", ".pth", ".pkl")


def _convert(name: str) -> str:
    """What to do with a pickle, which may run any code while it is read."""
    layer = re.fullmatch(r"(layer\d+)\.sae\.pt", name)
    new, line = "ae.safetensors", "from torch import load; from safetensors.torch import save_file; "
    if layer is not None:
        new = f"{layer[1]}/{layer[1]}.sae.safetensors"
        line = f"import os; os.makedirs('{layer[1]}', exist_ok=True); {line}"
    line += f"save_file({{k: v.contiguous() for k, v in load('{name}', weights_only=True, map_location='cpu').items()}}, '{new}')"
    then = "an ae.pt of dictionary_learning is then read with its config.json"
    if layer is not None:
        then = f"a layer of Qwen Scope is then the folder {layer[1]}"
    return f'{name} is a pickle, which is never loaded; convert it once, where you trust it: python -c "{line}" ({then})'


def _what_is_there(folder: Path) -> str:
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        return f"it cannot be listed ({error.strerror})"
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        return _convert(pickles[0])
    inside = [name for name in names if (folder / name).is_dir()]
    hint = f" (its folders: {', '.join(inside[:3])})" if inside else ""
    return f"expected {', '.join(weights_files())} with its config{hint}"


def expand_saes(saes: Sequence[Sae | SaeId | str] | Sae | SaeId | str) -> list[Sae | SaeId | str]:
    """The candidates named; a folder that is not an SAE itself stands for every SAE below it, a release for all of its SAEs.

    Raises:
        RequestError: nothing named, or a folder with no SAE in it.
    """
    given = list(saes) if isinstance(saes, (list, tuple)) else [saes]
    found: list[Sae | SaeId | str] = []
    for name in given:
        folder = Path(str(name)).expanduser() if isinstance(name, str | Path) else None
        if (
            folder is not None
            and not folder.exists()
            and "/" not in str(name)
            and str(name) in release_names()
        ):
            found += [f"{name}/{sae_id}" for sae_id in sae_release(str(name)).folders]
            continue
        if folder is None or not folder.is_dir() or format_of(folder) is not None:
            found.append(str(name) if isinstance(name, Path) else name)  # type: ignore[arg-type]
            continue
        inside = sorted({f.parent for pattern in weights_files() for f in folder.rglob(pattern)})
        if not inside:
            raise RequestError(f"no SAE in {name}: no folder below it holds {' or '.join(weights_files())}.")
        found += [str(path) for path in inside]
    if not found:
        raise RequestError("there is no candidate SAE; name SAEs, or a folder of them.")
    return found
