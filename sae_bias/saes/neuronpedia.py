"""The public page of a feature (Neuronpedia): its link, and, only when asked, its description, cached.

Nothing here is needed for any number: offline, or where a feature has no page, a card says so and goes on.
"""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from sae_bias.core.errors import RequestError, SaeBiasError
from sae_bias.core.files import cache_folder, writing_whole
from sae_bias.models.hub import is_offline
from sae_bias.saes import releases
from sae_bias.saes.ids import FeatureRef
from sae_bias.saes.sae import Sae

SITE = "https://www.neuronpedia.org"
_NAME = re.compile(r"[A-Za-z0-9._-]+/[A-Za-z0-9._-]+")
_MOST_BYTES = 4 << 20
_SECONDS = 10


def feature_page(ref: FeatureRef, sae: Sae | None = None) -> str | None:
    """Link of the feature's public page, from SAELens' table or the SAE's own metadata; None where it has none."""
    name = _page_name(ref, sae)
    return f"{SITE}/{name}/{ref.index}" if name else None


def feature_description(ref: FeatureRef, sae: Sae | None = None) -> str | None:
    """The public description: from the cache, else from the network once; None where there is none or no network."""
    name = _page_name(ref, sae)
    if name is None:
        return None
    cached = cache_folder("descriptions") / f"{name.replace('/', '_')}_{ref.index}.json"
    try:
        return json.loads(cached.read_text(encoding="utf-8"))["description"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    if is_offline():
        return None
    try:
        with urllib.request.urlopen(f"{SITE}/api/feature/{name}/{ref.index}", timeout=_SECONDS) as answer:
            found = _description(json.loads(answer.read(_MOST_BYTES)))
    except (OSError, ValueError, urllib.error.URLError):
        return None
    # a cache that cannot be written is not a reason to fail
    with suppress(SaeBiasError), writing_whole(cached) as partial:
        partial.write_text(json.dumps({"description": found}), encoding="utf-8")
    return found


def feature_list(refs: Iterable[FeatureRef | str], *, describe: bool = False) -> list[dict[str, str]]:
    """The features that have a public page, as entries of a Neuronpedia list: modelId, layer (the source), index, description.

    describe: fetch each page's own description (cached; empty where there is none).
    """
    entries = []
    for given in refs:
        ref = given if isinstance(given, FeatureRef) else FeatureRef.parse(given)
        name = _page_name(ref, None)
        if name is not None:
            model, source = name.split("/")
            text = (feature_description(ref) or "") if describe else ""
            entries.append({"modelId": model, "layer": source, "index": str(ref.index), "description": text})
    return entries


def _page_name(ref: FeatureRef, sae: Sae | None) -> str | None:
    """`model/source` as Neuronpedia spells it."""
    name: Any = None
    if sae is not None and sae.lens is not None:
        metadata = getattr(sae.lens.cfg, "metadata", None)
        name = getattr(metadata, "neuronpedia_id", None)
    if name is None and ref.sae.release in releases.release_names():
        try:
            name = releases.sae_release(ref.sae.release).pages.get(ref.sae.sae_id)
        except RequestError:
            return None
    return name if isinstance(name, str) and _NAME.fullmatch(name) else None


def _description(answer: Any) -> str | None:
    explanations = answer.get("explanations") if isinstance(answer, dict) else None
    texts = [e.get("description") for e in explanations or [] if isinstance(e, dict)]
    return next((t[:500] for t in texts if isinstance(t, str) and t.strip()), None)
