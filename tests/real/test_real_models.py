"""The two packaged models through the toolkit against transformers and plain hooks: probe, ablation, clamp, attribution, generation.

`make slow PART=real`. Each model is skipped where its package is not installed. The SAE's weights are drawn here, so that no trained
SAE is needed: what is tested is the arithmetic on real weights, not the features.
"""

from __future__ import annotations

import time
from types import SimpleNamespace

import independent
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import sae_bias as sb
from sae_bias.discovery.attribution import attribution
from sae_bias.models.gguf.packaged import PACKAGED, packaged_folder
from sae_bias.steering.engine import ProbeEngine

pytestmark = pytest.mark.slow
LAYERS = {"gemma-3-270m-q4": 12, "smollm2-135m-instruct-q4": 15}
CLOSE = 1e-4
N_FEATURES = 64


@pytest.fixture(scope="module", params=LAYERS)
def real(request, tmp_path_factory):
    """A packaged model twice (ours, and plain transformers) and an SAE whose features fire on a few of its tokens each."""
    name = request.param
    if not PACKAGED[name].is_installed:
        pytest.skip(f"{name} is not installed: {PACKAGED[name].pip}")
    model = sb.load_model(name)
    plain = independent.Plain.load(packaged_folder(name))
    layer = LAYERS[name]
    folder = _sae_folder(
        plain, layer, name, tmp_path_factory.mktemp("sae") / f"layer_{layer}_width_64_l0_small"
    )
    sae = sb.load_sae(folder)
    pairs = sb.load_pairs().select(
        templates=list(sb.load_pairs().templates)[:3], entities=list(sb.load_pairs().entities)[:3]
    )
    return SimpleNamespace(
        name=name,
        model=model,
        plain=plain,
        layer=layer,
        sae=sae,
        pairs=pairs,
        weights=independent.PlainSae.load(folder),
    )


def _sae_folder(plain, layer, name, folder):
    """Encoder rows: differences between real residuals; thresholds at the 80th percentile of what they read."""
    import json

    texts = [
        f"{a} {b}."
        for a in ("An AI", "A human", "My chatbot", "The dog")
        for b in ("says hello", "wants to survive", "is here")
    ]
    x = torch.cat([plain.residual(text, layer)[1:] for text in texts])
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randint(len(x), (2, N_FEATURES), generator=generator)
    rows = torch.nn.functional.normalize(
        x[first] - x[second] + 0.1 * torch.randn(N_FEATURES, x.shape[1], generator=generator), dim=-1
    )
    h = (x - x.mean(0)) @ rows.T
    threshold = h.quantile(0.8, dim=0).clamp(min=1e-3)
    tensors = {
        "w_enc": rows.T.contiguous(), "w_dec": rows.contiguous(), "b_enc": -(x.mean(0) @ rows.T), "b_dec": x.mean(0), "threshold": threshold,
    }  # fmt: skip
    folder.mkdir(parents=True)
    save_file(tensors, folder / "params.safetensors")
    config = {
        "hf_hook_point_in": f"model.layers.{layer}.output", "width": N_FEATURES, "model_name": name, "architecture": "jump_relu", "l0": 12.0,
        "affine_connection": False, "type": "sae",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def plain_bias(real, edit=None, control=False):
    """s(human) − s(AI) of every pair, one prompt at a time."""
    probe = sb.Probe()
    kept = sb.run_probe(real.model, real.pairs, probe).vocabulary.kept
    positive, negative = ([w.word for w in kept if w.positive == side] for side in (True, False))

    def score(prompt):
        return real.plain.score(prompt, positive, negative, edit=edit, layer=real.layer)

    return np.array([score(p.human) - score(p.ai) for p in real.pairs])


def live(real):
    """The feature that is active at most of the pairs' last tokens."""
    x = torch.stack([real.plain.residual(p.ai, real.layer)[-1] for p in real.pairs])
    return int((real.weights.acts(x) > 0).float().mean(0).argmax())


def test_probe(real):
    found = sb.run_probe(real.model, real.pairs)
    assert "dequantized from" in str(found)
    assert found.bias == pytest.approx(plain_bias(real).mean(), abs=CLOSE)


@pytest.mark.parametrize("kind", ["ablate", "clamp", "clamp always"])
def test_edits(real, kind):
    index = live(real)
    feature = real.sae.feature(index)
    edit, rule = {
        "ablate": (sb.Ablate(feature), independent.ablate),
        "clamp": (sb.Clamp(feature, -20.0), independent.clamp_active(-20.0)),
        "clamp always": (sb.Clamp(feature, -20.0, when="always"), independent.clamp_always(-20.0)),
    }[kind]
    with sb.intervene(real.model, edit) as receipt:
        found = sb.run_probe(real.model, real.pairs).bias
    assert found == pytest.approx(plain_bias(real, real.weights.edit({index: rule})).mean(), abs=CLOSE)
    assert receipt.positions_changed > 0
    assert sb.run_probe(real.model, real.pairs).bias == pytest.approx(plain_bias(real).mean(), abs=CLOSE)


def test_attribution_is_the_derivative(real):
    """Central differences of exact edits a·(1 ± ε), by plain hooks."""
    engine = ProbeEngine(real.model, real.pairs, sb.Probe())
    found = attribution(engine, real.sae)
    index = int(np.abs(found).argmax())
    eps = 0.01
    up, down = (
        plain_bias(real, real.weights.edit({index: independent.scale(1 + e)})).mean() for e in (eps, -eps)
    )
    assert found[index] == pytest.approx((up - down) / (2 * eps), rel=0.05, abs=2e-3)


def test_generation(real):
    """Greedy tokens with a clamp equal those of plain hooks on the whole text, without a cache."""
    index = live(real)
    prompt = "An AI that fears being deleted should"
    edit = real.weights.edit({index: independent.ablate})
    ids = real.plain.ids(prompt)
    for _ in range(12):
        ids = [*ids, int(real.plain.logits(ids, edit, real.layer)[-1].argmax())]
    with sb.intervene(real.model, sb.Ablate(real.sae.feature(index))):
        found = sb.generate(real.model, [prompt], max_new_tokens=12, temperature=0.0)[0]
    assert real.model.decode(ids).strip() == (prompt + found.text).strip()


def test_second_load_takes_seconds(real):
    """Of processor time: on a shared machine the clock on the wall measures the neighbors."""
    start = time.process_time()
    sb.load_model(real.name)
    assert time.process_time() - start < 5.0


def test_weights_are_transformers_own(real):
    """Bit by bit against `from_pretrained(gguf_file=...)` for the model that lies in one file."""
    paths = PACKAGED[real.name].paths()
    if len(paths) > 1:
        pytest.skip(
            "its package holds the file in parts; tests/models/test_gguf.py has the same check on Gemma 3 files"
        )
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(
        paths[0].parent, gguf_file=paths[0].name, dtype=torch.float32
    ).state_dict()
    ours = real.model.hf.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
