"""Placement: a model whose layers are offloaded or spread reads, edits, sweeps and writes as it does in one piece.

The expected value is the same checkpoint, loaded plainly.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sae_bias as sb
from sae_bias.models.fingerprint import model_digest
from sae_bias.models.placement import device_of, is_offloaded, resident, stored_state, widest_float
from sae_bias.steering.engine import ProbeEngine

accelerate = pytest.importorskip("accelerate")

F, G = 3, 5
N_LAYERS = 4
WAYS = ("cpu_offload", "disk_offload", "dispatch", "device_map")


def spread(name: str) -> dict[str, str]:
    """Every other layer and the embedding on disk; the unembedding too where it is not the embedding itself."""
    neox = name == "gpt_neox"
    root, embed, norm = (
        ("gpt_neox", "embed_in", "final_layer_norm") if neox else ("model", "embed_tokens", "norm")
    )
    where = {
        f"{root}.{embed}": "disk",
        f"{root}.{norm}": "disk",
        f"{root}.rotary_emb": "cpu",
        "lm_head": "disk",
    }
    return where | {f"{root}.layers.{i}": "disk" if i % 2 else "cpu" for i in range(N_LAYERS)}


@pytest.fixture(params=WAYS)
def placed(request, make_tiny, tmp_path):
    """(plain, placed) models of one tiny checkpoint, for each way of placing it."""

    def make(name: str):
        tiny = make_tiny(name)
        if request.param == "device_map":
            return tiny, sb.load_model(tiny.folder, device_map={"": "cpu"})
        model = tiny.fresh()
        if request.param == "cpu_offload":
            accelerate.cpu_offload(model.hf, execution_device=torch.device("cpu"))
        elif request.param == "disk_offload":
            accelerate.disk_offload(model.hf, str(tmp_path / "disk"), execution_device=torch.device("cpu"))
        else:
            accelerate.dispatch_model(
                model.hf,
                spread(name),
                main_device="cpu",
                offload_dir=str(tmp_path / "disk"),
                force_hooks=True,
            )
        return tiny, model

    return make


@pytest.mark.parametrize("name", ["gemma2", "gemma3_multimodal", "gpt_neox"])
def test_probe_hooks_engine_and_generation_are_the_same(placed, name, pairs, probe):
    """To float32 rounding of scores near 20: spread layers run every prompt whole, plain ones share openings."""
    tiny, model = placed(name)
    plain = tiny.model
    assert model.device == torch.device("cpu") and model.d_vocab == plain.d_vocab
    edits = [sb.Clamp(tiny.feature(F), -1.0), sb.Steer(tiny.feature(G), 2.0)]
    for open_edits in ([], edits):
        found = []
        for each in (plain, model):
            with sb.intervene(each, *open_edits) as receipt:
                found.append((sb.run_probe(each, pairs, probe, levels=True), receipt))
        (a, receipt_a), (b, receipt_b) = found
        np.testing.assert_allclose(a.values_ai, b.values_ai, rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(a.log_normaliser, b.log_normaliser, rtol=1e-5, atol=1e-4)
        assert [e.positions_changed for e in receipt_a.edits] == [
            e.positions_changed for e in receipt_b.edits
        ]
    cells = [[e] for e in edits] + [[sb.Ablate(tiny.feature(G))], edits]
    for (a, _), (b, _) in zip(*(ProbeEngine(m, pairs, probe).run_many(cells) for m in (plain, model))):
        np.testing.assert_allclose(a.values_ai, b.values_ai, rtol=1e-5, atol=1e-4)
    written = [
        sb.generate(m, [p.ai for p in pairs][:3], interventions=edits, max_new_tokens=6)
        for m in (plain, model)
    ]
    assert [c.tokens for c in written[0]] == [c.tokens for c in written[1]]


def test_weights_elsewhere_are_the_same_weights(placed, pairs, probe):
    """Every parameter, the digest of a model in memory, and the float32 norm of a bfloat16 one."""
    tiny, model = placed("gemma3")
    before = dict(tiny.model.hf.state_dict())
    after = dict(stored_state(model.hf))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    model.source = tiny.model.source
    assert model_digest(model) == model_digest(tiny.model)


def test_rankings_by_gradient_are_the_same(make_tiny, tmp_path, pairs, probe):
    """The backward pass through offloaded layers."""
    tiny, model = make_tiny("gemma2"), make_tiny("gemma2").fresh()
    accelerate.disk_offload(model.hf, str(tmp_path), execution_device=torch.device("cpu"))
    a, b = (
        sb.rank_features(m, tiny.sae, pairs[:3], by="attribution", probe=probe)
        .to_frame()
        .set_index("feature")
        for m in (tiny.model, model)
    )
    np.testing.assert_allclose(a["attribution"], b["attribution"].reindex(a.index), rtol=1e-4, atol=1e-6)


def test_the_float32_norm_of_an_offloaded_half_model(make_tiny):
    tiny = make_tiny("gemma3")
    plain = sb.load_model(tiny.folder, dtype="bfloat16")
    model = sb.load_model(tiny.folder, dtype="bfloat16")
    accelerate.cpu_offload(model.hf, execution_device=torch.device("cpu"))
    x = torch.randn(3, plain.d_model)
    assert is_offloaded(model.base.norm)
    torch.testing.assert_close(model.final_norm(x), plain.final_norm(x), rtol=0, atol=0)
    torch.testing.assert_close(model.rows([5, 7])[0], plain.rows([5, 7])[0], rtol=0, atol=0)
    assert is_offloaded(model.base.norm), "reading it has not brought it to stay"


def test_an_edit_sits_where_its_layer_runs(gemma3, monkeypatch):
    """With the layers on different devices the site's tensors go to the layer's, not to the embedding's."""
    model = gemma3.fresh()
    monkeypatch.setattr(
        type(model), "layer_device", lambda self, i: torch.device("meta" if i == 1 else "cpu")
    )
    from sae_bias.steering.hooks import compile_edits

    (edit,) = compile_edits(model, [sb.Ablate(gemma3.feature(F))]).values()
    (bound,) = edit.edits
    assert bound.feature.w_dec.device.type == "meta"


def test_the_device_of_a_module():
    plain = torch.nn.Linear(2, 2)
    assert device_of(plain) == torch.device("cpu")
    assert device_of(torch.nn.Sequential(torch.nn.ReLU(), plain)) == torch.device("cpu")
    hooked = torch.nn.Linear(2, 2, device="meta")
    hooked._hf_hook = accelerate.hooks.AlignDevicesHook(execution_device="cuda:1", offload=True)
    assert device_of(torch.nn.Sequential(hooked)) == torch.device("cuda:1")
    assert resident(plain, "weight") is plain.weight


def test_no_float64_on_mps():
    """MPS has no float64: nothing on the model's device is widened before it has come to the CPU."""
    assert widest_float(torch.device("mps")) == torch.float32
    assert widest_float(torch.device("cuda")) == torch.float64
    import re
    from pathlib import Path

    package = Path(sb.__file__).parent
    wide = re.compile(r"(?<!cpu\(\))\.double\(\)")
    on_cpu_by_construction = {"measures/costs.py"}
    found = {
        str(path.relative_to(package))
        for path in [*package.glob("*.py"), *package.glob("measures/*.py")]
        if wide.search(path.read_text(encoding="utf-8"))
    }
    assert found <= on_cpu_by_construction


def test_device_map_without_accelerate(gemma3, monkeypatch):
    from sae_bias.models import load

    monkeypatch.setattr(load, "find_spec", lambda name: None)
    with pytest.raises(sb.MissingError, match="pip install accelerate"):
        sb.load_model(gemma3.folder, device_map="auto")
