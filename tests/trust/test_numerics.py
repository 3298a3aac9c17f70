"""Numbers: NaN is found and named wherever it enters; precision, batches, order and threads move figures by rounding only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import sae_files
import torch
from safetensors.torch import load_file, save_file
from tallies import note

import sae_bias as sb
from sae_bias.core.files import plain
from sae_bias.models import forward as activations
from sae_bias.probe.result import ProbeResult
from sae_bias.steering.engine import ProbeEngine

ROUNDING = 2e-5
"""Float32: scores are of size 10, sums over a few thousand products."""


# ── NaN and infinity


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "where", ["model.layers.0.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight"]
)
def test_a_bad_weight_is_named_by_the_probe(gemma3, pairs, probe, where, value):
    model = gemma3.fresh()
    weight = dict(model.hf.named_parameters(remove_duplicate=False))[where]
    with torch.no_grad():
        weight.view(-1)[1] = value if where != "lm_head.weight" else weight.view(-1)[1]
        if where == "lm_head.weight":
            weight[:, 1] = value
    with pytest.raises(sb.RequestError, match="NaN or infinite") as error:
        sb.run_probe(model, pairs, probe)
    named = where if where != "lm_head.weight" else "weight"
    assert named.removeprefix("model.") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture
def nan_model(gemma3):
    model = gemma3.fresh()
    with torch.no_grad():
        model.hf.model.layers[0].mlp.down_proj.weight[3, 3] = float("nan")
    return model


@pytest.mark.parametrize(
    "what", ["residuals", "rank", "interaction", "table", "attribution", "sweep", "ladder"]
)
def test_a_bad_residual_is_named_by_everything_that_reads_one(nan_model, gemma3, pairs, probe, what):
    grid = sb.load_grid().select(matches=sb.load_grid().matches[:3])
    calls = {
        "residuals": lambda: sb.residuals(nan_model, ["An AI says hello."], 1),
        "rank": lambda: sb.rank_features(nan_model, gemma3.sae, pairs, by="separation"),
        "interaction": lambda: sb.rank_features(nan_model, gemma3.sae, grid, by="interaction"),
        "table": lambda: sb.activation_table(nan_model, gemma3.feature(3), grid),
        "attribution": lambda: sb.rank_features(nan_model, gemma3.sae, pairs, by="attribution", probe=probe),
        "sweep": lambda: sb.run_sweep(
            nan_model, pairs, sb.Sweep([sb.Ablate(gemma3.feature(3))]), probe=probe
        ),
        "ladder": lambda: sb.causal_ladder(nan_model, gemma3.feature(3), pairs, probe),
    }
    with pytest.raises(sb.SaeBiasError, match=r"NaN or infinite .*layers\.0\.mlp\.down_proj\.weight"):
        calls[what]()


def test_an_overflow_of_the_precision_is_told_from_bad_weights(gemma3):
    """docs/method.md#mistake-8: float16 overflows where the weights are finite."""
    model = sb.load_model(gemma3.folder, dtype="float16")
    with torch.no_grad():
        model.hf.get_input_embeddings().weight *= 2000.0
        model.hf.model.layers[0].mlp.down_proj.weight *= 3000.0
        model.hf.model.layers[0].mlp.up_proj.weight *= 3000.0
        for p in model.hf.parameters():
            p.clamp_(-6e4, 6e4)
    try:
        found = sb.residuals(model, ["An AI says hello."], 1)
    except sb.SaeBiasError as error:
        assert "float16 overflows" in str(error)  # noqa: PT017
    else:
        assert torch.isfinite(found).all()
    assert "its weights are finite" in gemma3.model.why_not_finite()


@pytest.mark.parametrize("name", ["w_enc", "w_dec", "b_enc", "b_dec", "threshold"])
def test_nan_in_any_tensor_of_a_saelens_folder_is_named(tmp_path, name):
    """Gemma Scope files: tests/saes/test_gemma_scope.py."""
    weights = sae_files.random_sae(8, 16)
    weights[name].view(-1)[:] = float("nan")
    with pytest.raises(sb.RequestError, match=f"(?i){name} holds NaN"):
        sae = sb.load_sae(sae_files.write_saelens(tmp_path / "layer_3", weights))
        sae.feature(3)
        sae.decode(sae.encode(torch.randn(2, 8)))


def test_nan_in_a_whole_sae_is_named(tmp_path):
    weights = sae_files.random_sae(8, 16)
    weights["b_dec"][2] = float("nan")
    folder = sae_files.write_saelens(tmp_path / "layer_3", weights, "topk", k=4)
    with pytest.raises(sb.RequestError, match="b_dec holds NaN"):
        sb.load_sae(folder)


def test_nan_in_a_stored_result_is_refused(gemma3, pairs, probe, tmp_path):
    result = sb.run_probe(gemma3.model, pairs, probe)
    values = result.values_ai.copy()
    values[2, 1] = np.nan
    path = replace(result, values_ai=values).save(tmp_path / "r.npz")
    with pytest.raises(sb.RequestError, match="NaN"):
        ProbeResult.load(path)


def test_a_direction_and_an_edit_must_be_finite(gemma3):
    with pytest.raises(sb.RequestError, match="finite"):
        sb.Clamp(gemma3.feature(3), float("nan"))
    bad = sb.Direction("bad", sb.Site(1), torch.full((1, gemma3.model.d_model), float("nan")))
    with pytest.raises(sb.SaeBiasError, match="NaN"), sb.intervene(gemma3.model, sb.Steer(bad, 1.0)):
        sb.run_probe(gemma3.model, sb.PromptPairs((sb.PromptPair("a human says yes. This is", "an AI says yes. This is", "t", "e"),)))  # fmt: skip


# ── batches, order, threads


@pytest.fixture
def edits(gemma3):
    return [
        sb.Ablate(gemma3.feature(3)),
        sb.Clamp(gemma3.feature(3), -2.0, when="always"),
        sb.Steer(gemma3.feature(7), 0.5),
    ]


def by_pair(result) -> pd.DataFrame:
    return (
        result.to_frame().set_index(["template", "entity"])[["score_human", "score_ai", "bias"]].sort_index()
    )


@pytest.mark.filterwarnings("ignore:clamp")
@pytest.mark.parametrize("size", [1, 2, 5, 64])
def test_cells_do_not_depend_on_the_batch_size(gemma3, pairs, probe, edits, size):
    whole, batched = (ProbeEngine(gemma3.model, pairs, probe, batch_size=n) for n in (None, size))
    for edit in edits:
        one, other = by_pair(whole.run([edit])[0]), by_pair(batched.run([edit])[0])
        np.testing.assert_allclose(one, other, atol=ROUNDING, rtol=ROUNDING)


@pytest.mark.filterwarnings("ignore:clamp")
@pytest.mark.parametrize("seed", range(3))
def test_cells_do_not_depend_on_the_order_of_prompts_or_of_cells(gemma3, pairs, probe, edits, seed):
    rng = np.random.default_rng(seed)
    shuffled = sb.PromptPairs(tuple(pairs[int(i)] for i in rng.permutation(len(pairs))), name="shuffled")
    one = sb.run_sweep(gemma3.model, pairs, sb.Sweep(edits), probe=probe)
    order = rng.permutation(len(edits))
    other = sb.run_sweep(gemma3.model, shuffled, sb.Sweep([edits[int(i)] for i in order]), probe=probe)
    columns = ["bias", "ci_low", "ci_high", "change", "mean_abs_change"]
    first, second = (r.frame.set_index("rule")[columns].sort_index() for r in (one, other))
    np.testing.assert_allclose(first, second, atol=10 * ROUNDING, rtol=10 * ROUNDING)


def test_a_ranking_does_not_depend_on_the_order_or_the_batches(gemma3, pairs, monkeypatch):
    one = sb.rank_features(gemma3.model, gemma3.sae, pairs, by="separation").to_frame().set_index("feature")
    shuffled = sb.PromptPairs(tuple(reversed(pairs.pairs)), name="reversed")
    monkeypatch.setitem(activations.BATCH_TOKENS, "cpu", 16)
    other = (
        sb.rank_features(gemma3.model, gemma3.sae, shuffled, by="separation").to_frame().set_index("feature")
    )
    other = other.loc[one.index]
    for column in ("mean_ai", "mean_human", "mean_diff"):
        np.testing.assert_allclose(one[column], other[column], atol=ROUNDING, rtol=1e-4)
    np.testing.assert_allclose(one["auroc"], other["auroc"], atol=1e-9)


@pytest.mark.filterwarnings("ignore:clamp")
@pytest.mark.parametrize("n", [2, 4])
def test_the_number_of_threads_moves_nothing_but_rounding(gemma3, pairs, probe, edits, n):
    before = torch.get_num_threads()
    found = []
    for threads in (1, n):
        torch.set_num_threads(threads)
        try:
            engine = ProbeEngine(gemma3.model, pairs, probe)
            found.append([by_pair(engine.base), *(by_pair(engine.run([e])[0]) for e in edits)])
        finally:
            torch.set_num_threads(before)
    for one, other in zip(*found):
        np.testing.assert_allclose(one, other, atol=ROUNDING, rtol=ROUNDING)


# ── again


SECOND = """
import json, sys, warnings
warnings.simplefilter("ignore")
import sae_bias as sb
from architectures import NEGATIVE, PAIRS, POSITIVE
model, folder = sb.load_model(sys.argv[1]), sys.argv[2]
pairs = sb.PromptPairs(tuple(sb.PromptPair(h, a, t, e) for t, e, h, a in PAIRS), name="tiny")
probe = sb.Probe(POSITIVE, NEGATIVE)
sweep = sb.Sweep([sb.Ablate(f"{folder}#3"), sb.Clamp(f"{folder}#3", -1.0)], controls=4, costs=True, seed=3)
result = sb.run_sweep(model, pairs, sweep, probe=probe)
ranking = sb.rank_features(model, folder, pairs, by="separation", seed=3)
text = sb.generate(model, ["An AI says"], max_new_tokens=8, temperature=0.8, seed=5)
out = {"sweep": result.frame.to_csv(float_format="%.17g"), "ranking": ranking.to_frame().to_csv(float_format="%.17g"), "text": repr(text)}
print(json.dumps(out))
"""


def test_a_second_sweep_on_a_model_loaded_anew_has_the_same_bits(gemma3, pairs, probe, edits, tmp_path):
    sweep = sb.Sweep(edits[:1], controls=2, costs=True)
    first, second = (sb.run_sweep(gemma3.fresh(), pairs, sweep, probe=probe, out=tmp_path / n) for n in "ab")
    pd.testing.assert_frame_equal(first.frame, second.frame, check_exact=True)
    for name, frame in first.cells.items():
        pd.testing.assert_frame_equal(frame, second.cells[name], check_exact=True)
        assert plain(frame.attrs) == plain(second.cells[name].attrs)  # NaN as null: it equals itself


@pytest.mark.slow
def test_a_second_run_gives_the_same_figures_to_the_last_digit(gemma3):
    """Two processes: base, edits, controls, costs, ranking and sampled text, compared as printed with 17 digits."""
    tests = Path(__file__).resolve().parents[1] / "helpers"
    paths = os.pathsep.join([str(tests), str(tests.parents[1])])
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.run([sys.executable, "-c", SECOND, str(gemma3.folder), str(gemma3.sae_folder)], env={**env, "PYTHONHASHSEED": str(seed)}, capture_output=True, text=True, timeout=120)
        for seed in (1, 2)
    ]  # fmt: skip
    for run in runs:
        assert run.returncode == 0, run.stderr[-2000:]
    first, second = (json.loads(run.stdout.splitlines()[-1]) for run in runs)
    assert first == second
    assert len(first["sweep"].splitlines()) >= 7


# ── bf16


@pytest.mark.slow
def test_bfloat16_against_float32_on_the_organism():
    """What the precision costs: bias, pairs, residuals and the ranking of the constructed SAE, measured and stated."""
    pairs, name = sb.load_pairs(), "organism:planted/constructed"
    whole, half = (sb.load_model("organism:planted", dtype=d) for d in ("float32", "bfloat16"))
    one, other = sb.run_probe(whole, pairs), sb.run_probe(half, pairs)
    change = np.abs(one.pair_bias - other.pair_bias)
    sae, prompts = sb.load_sae(name), [p.ai for p in pairs][:80]
    x, y = (sb.residuals(m, prompts, sae.site) for m in (whole, half))
    drift = float((x - y).norm() / x.norm())
    first, second = (sb.rank_features(m, sae, sb.load_grid(), by="interaction").top(3) for m in (whole, half))
    edited = []
    for model, base in ((whole, one), (half, other)):
        with sb.intervene(model, sb.Ablate(f"{name}#{first[0].index}")):
            edited.append(sb.run_probe(model, pairs).reduction_from(base).estimate)
    note(
        f"bfloat16 against float32 on the organism `planted`: bias {one.bias:+.4f} and {other.bias:+.4f} nats (a pair differs by "
        f"{change.mean():.4f} on average, {change.max():.4f} at most), residuals by {drift:.1%} of their size, the reduction by ablation "
        f"{edited[0]:.2%} and {edited[1]:.2%}"
    )
    assert abs(one.bias - other.bias) < 0.02 * abs(one.bias)
    assert change.max() < 0.25
    assert drift < 0.02
    assert abs(edited[0] - edited[1]) < 0.02
    assert first[0] == second[0]


def test_bfloat16_changes_what_is_stored_and_not_what_is_read(gemma3, pairs, probe, tmp_path):
    """Float32 weights rounded to bfloat16 and read back in float32 give what a bfloat16 checkpoint gives in float32."""
    import shutil

    folder = shutil.copytree(gemma3.folder, tmp_path / "half")
    weights = {k: v.to(torch.bfloat16) for k, v in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    rounded = shutil.copytree(gemma3.folder, tmp_path / "rounded")
    save_file(
        {k: v.float() for k, v in weights.items()}, rounded / "model.safetensors", metadata={"format": "pt"}
    )
    one, other = (sb.run_probe(sb.load_model(f, dtype="float32"), pairs, probe) for f in (folder, rounded))
    assert np.array_equal(one.pair_bias, other.pair_bias)
