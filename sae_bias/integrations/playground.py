"""A page on this machine for trying features by hand: tokens colored by what fires, a strength to move, two texts growing side by side.

    sae-bias play MODEL FEATURE…          http://127.0.0.1:PORT, for this machine alone

The server answers on 127.0.0.1 only, refuses every other Host and Origin (so that a page of another site cannot drive it), loads nothing
from elsewhere, and runs one request at a time: hooks belong to the one model. Needs the extra `play` (FastAPI and uvicorn).
"""

import json
import secrets
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from typing import Any

import torch

from sae_bias.core.errors import MissingError, RequestError, SaeBiasError
from sae_bias.discovery.tables import token_activations
from sae_bias.measures.costs import CostEngine
from sae_bias.models.chat import opening_ids
from sae_bias.models.model import Model
from sae_bias.probe.words import Probe, default_probe
from sae_bias.prompts.pairs import PromptPairs
from sae_bias.saes.load import as_feature
from sae_bias.saes.sae import Feature
from sae_bias.steering.controls import observed_max
from sae_bias.steering.edits import Ablate, Clamp, Scale, Steer
from sae_bias.steering.engine import ProbeEngine
from sae_bias.steering.generate import check_room
from sae_bias.steering.hooks import intervene
from sae_bias.steering.intervention import FeatureLike, Intervention

HOST = "127.0.0.1"
MOST_TEXT, MOST_TOKENS = 20_000, 200
KINDS = ("clamp", "scale", "steer", "ablate")
TEMPLATES, ENTITIES = 6, 4


@dataclass(eq=False)
class Playground:
    """What the page asks for; every call holds the model's lock."""

    model: Model
    features: Sequence[FeatureLike]
    pairs: PromptPairs
    probe: Probe | None = None

    def __post_init__(self) -> None:
        self.loaded: list[Feature] = [as_feature(f) for f in self.features]
        self.lock = threading.Lock()

    @cached_property
    def units(self) -> list[float | None]:
        """Each feature's largest activation on the pairs, the unit of strengths; None where it fires on none of them."""
        found: list[float | None] = []
        for feature in self.loaded:
            try:
                found.append(observed_max(self.model, feature, self.quick))
            except RequestError:
                found.append(None)
        return found

    @cached_property
    def quick(self) -> PromptPairs:
        """A small block of the pairs: enough to see a direction, too few for a claim."""
        templates, entities = _spread(self.pairs.templates, TEMPLATES), _spread(self.pairs.entities, ENTITIES)
        return self.pairs.select(templates=templates, entities=entities)

    @cached_property
    def engines(self) -> tuple[ProbeEngine, CostEngine]:
        sites = sorted({f.site for f in self.loaded})
        probe = self.probe or default_probe(self.pairs)
        return ProbeEngine(self.model, self.quick, probe, sites=sites), CostEngine(self.model, sites=sites)

    def state(self) -> dict[str, Any]:
        """The model, its features and their units."""
        with self.lock:
            both = zip(self.loaded, self.units)
            features = [{"ref": str(f.ref), "layer": f.site.layer, "unit": unit} for f, unit in both]
            return {
                "model": self.model.label,
                "features": features,
                "kinds": KINDS,
                "n_pairs": len(self.quick),
            }

    def edits(self, asked: Sequence[Mapping[str, Any]]) -> list[Intervention]:
        """Edits from [{feature: number, kind, strength}]; strengths of clamp and steer in units of the feature's largest activation.

        Raises:
            RequestError: a feature that is not on the page, an unknown kind, a strength that is not a number.
        """
        made: list[Intervention] = []
        for one in asked:
            i, kind, strength = one.get("feature"), one.get("kind"), one.get("strength")
            if not isinstance(i, int) or not 0 <= i < len(self.loaded) or kind not in KINDS:
                kinds = ", ".join(KINDS)
                raise RequestError(
                    f"an edit names a feature of the page and one of {kinds}, not {dict(one)!r}."
                )
            if isinstance(strength, bool) or not isinstance(strength, int | float):
                raise RequestError(f"the strength {strength!r} is not a number.")
            feature, unit = self.loaded[i], self.units[i] or 1.0
            made.append(_edit(kind, feature, strength, unit))
        return made

    def tokens(self, text: str) -> dict[str, Any]:
        """The text's tokens, and each feature's activation on them."""
        with self.lock:
            found = [token_activations(self.model, f, [_checked(text)]) for f in self.loaded]
        return {"tokens": found[0].tokens[0], "acts": [f.acts[0] for f in found]}

    def measure(self, asked: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The quick probe and the cost in KL, unsteered and under the edits."""
        with self.lock:
            probe, costs = self.engines
            edits = self.edits(asked)
            after = probe.run(edits)[0] if edits else probe.base
            kl = {} if not edits else dict(zip(*(costs.run(edits)[c] for c in ("kind", "kl_mean"))))
        moved = {
            f"{s}_moved": getattr(after, f"score_{s}") - getattr(probe.base, f"score_{s}")
            for s in ("human", "ai")
        }
        found = {"n_pairs": len(self.quick), "before": probe.base.bias, "after": after.bias}
        found |= {name: float(values.mean()) for name, values in moved.items()}
        return found | {"kl": {kind: float(value) for kind, value in kl.items()}}

    def continuations(
        self, prompt: str, asked: Sequence[Mapping[str, Any]], n: int, chat: bool
    ) -> Iterator[dict[str, str]]:
        """The unsteered and the steered continuation, a greedy token of each in turn."""
        with self.lock:
            edits = self.edits(asked)
            ids = opening_ids(self.model, _checked(prompt), chat=chat)
            check_room(self.model, len(ids), min(n, MOST_TOKENS))
            arms = {"unsteered": _Arm(self.model, ids, []), "steered": _Arm(self.model, ids, edits)}
            for _ in range(min(n, MOST_TOKENS)):
                for name, arm in arms.items():
                    if (piece := arm.step()) is not None:
                        yield {"arm": name, "piece": piece}


def _spread(names: Sequence[str], n: int) -> list[str]:
    """At most n of the names, evenly over the list."""
    return [names[i * len(names) // min(n, len(names))] for i in range(min(n, len(names)))]


def _edit(kind: str, feature: Feature, strength: float, unit: float) -> Intervention:
    if kind == "ablate":
        return Ablate(feature)
    if kind == "scale":
        return Scale(feature, strength)
    return Clamp(feature, strength * unit) if kind == "clamp" else Steer(feature, strength * unit)


class _Arm:
    """One growing text with a cache of its own."""

    def __init__(self, model: Model, ids: Sequence[int], edits: Sequence[Intervention]):
        self.model, self.edits = model, list(edits)
        self.next = torch.tensor([list(ids)], device=model.device)
        self.cache: Any = None
        self.made: list[int] = []
        self.end = model.end_ids

    @torch.no_grad()
    def step(self) -> str | None:
        """The next piece of text; None once the model has ended it."""
        if self.made and self.made[-1] in self.end:
            return None
        with intervene(self.model, *self.edits):
            out = self.model.hf(input_ids=self.next, past_key_values=self.cache, use_cache=True)
        self.cache = out.past_key_values
        token = int(out.logits[0, -1].argmax())
        before = self.model.decode(self.made)
        self.made.append(token)
        self.next = torch.tensor([[token]], device=self.model.device)
        return None if token in self.end else self.model.decode(self.made)[len(before) :]


def _checked(text: Any) -> str:
    if not isinstance(text, str) or not text.strip() or len(text) > MOST_TEXT:
        raise RequestError(f"a text of 1 to {MOST_TEXT:,} characters is needed.")
    return text


def make_app(playground: Playground, port: int) -> Any:
    """The FastAPI application; it serves one page and its requests to this machine alone.

    Raises:
        MissingError: the extra `play` is not installed.
    """
    try:
        from fastapi import FastAPI, Request, Response
        from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
    except ImportError as error:
        raise MissingError(
            "the playground needs FastAPI and uvicorn: pip install 'sae-bias[play]'."
        ) from error
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    hosts = {f"{HOST}:{port}", f"localhost:{port}"}

    @app.middleware("http")
    async def own_page_only(request: Request, call_next: Any) -> Response:
        host, origin = request.headers.get("host"), request.headers.get("origin")
        if host not in hosts or (origin is not None and origin.removeprefix("http://") not in hosts):
            return JSONResponse({"error": "this page is for its own machine and address only."}, 403)
        if request.method == "POST" and request.headers.get("content-type") != "application/json":
            return JSONResponse({"error": "expected application/json."}, 415)
        return await call_next(request)

    @app.exception_handler(SaeBiasError)
    async def said(_: Request, error: SaeBiasError) -> Response:
        return JSONResponse({"error": str(error)}, 400)

    @app.get("/")
    def page() -> Response:
        nonce = secrets.token_urlsafe(16)
        text = (files("sae_bias") / "data" / "play.html").read_text(encoding="utf-8").replace("NONCE", nonce)
        policy = f"default-src 'none'; connect-src 'self'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; base-uri 'none'; form-action 'none'"
        return HTMLResponse(text, headers={"Content-Security-Policy": policy, "X-Frame-Options": "DENY"})

    @app.get("/state")
    def state() -> Any:
        return playground.state()

    @app.post("/tokens")
    def tokens(asked: dict[str, Any]) -> Any:
        return playground.tokens(asked.get("text", ""))

    @app.post("/measure")
    def measure(asked: dict[str, Any]) -> Any:
        return playground.measure(asked.get("edits") or [])

    @app.post("/generate")
    def generate(asked: dict[str, Any]) -> Response:
        n, edits = int(asked.get("n") or 30), asked.get("edits") or []
        playground.edits(edits)
        pieces = playground.continuations(_checked(asked.get("prompt")), edits, n, bool(asked.get("chat")))
        return StreamingResponse((json.dumps(p) + "\n" for p in pieces), media_type="application/x-ndjson")

    return app
