"""A contrast's ranking on a real model, every feature, against float64 of plain transformers, SAELens' encoder, numpy, scipy and scikit-learn.

`make slow PART=real`. Each packaged model is skipped where its package is not installed. The SAE is drawn from the model's own
residuals; SAE_BIAS_REAL_CONTRAST=MODEL:SAE_FOLDER takes a trained one (a Gemma Scope 2 folder) and its model instead.

In float64 on both sides (transformers' norms and rotary angles stay float32) the AUROC of every feature agrees to 1e-6, none set aside;
texts that begin alike have equal activations there, and the script takes nine digits for equal. In float32, as a user runs it, figures of
every feature are compared again: AUROC, mean differences and firing rates, t. The one allowance is ROUNDING: a pre-activation h = x · w + b
may differ by ROUNDING · ‖x‖ ‖w‖, which is asserted of every text, token and feature. Through thresholds, the reduction over tokens and the
order of texts it gives each figure a lowest and a highest value, and each has to lie between them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import sae_bias as sb
from sae_bias.models.gguf.packaged import PACKAGED, packaged_folder
from sae_bias.models.residuals import residuals

NAMED = os.environ.get("SAE_BIAS_REAL_CONTRAST", "")
TEXTS = Path(__file__).resolve().parents[2] / "experiments" / "public_studies" / "texts"
FILES = ("refusal.jsonl", "gender.jsonl")
LAYERS = {"gemma-3-270m-q4": 12, "smollm2-135m-instruct-q4": 15}
WIDTH = 4096
ROUNDING = 2e-6
"""Of a pre-activation, as a share of ‖x‖ ‖w‖."""
EDGE = 0.01
"""Share of the features that fire whose AUROC may hang on float32's rounding: a guard against bounds that allow everything."""
pytestmark = pytest.mark.slow


# --- the script: no line of it uses the toolkit ----------------------------------------------------------
class Script:
    """A model in float64 and one layer's residuals."""

    def __init__(self, folder: Path, layer: int):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.layer = layer

    @torch.no_grad()
    def residual(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """[pos, d_model] after the layer, and whether each token is an ordinary one."""
        kept = []
        place = self.hf.model.layers[self.layer]
        hook = place.register_forward_hook(lambda m, i, o: kept.append(o[0] if isinstance(o, tuple) else o))
        ids = self.tokenizer(text).input_ids
        self.hf(torch.tensor([ids]))
        hook.remove()
        t = self.tokenizer
        special = {t.bos_token_id, t.eos_token_id, t.pad_token_id}
        return kept[0].reshape(len(ids), -1).numpy(), np.array([i not in special for i in ids])


def jump_relu(x: np.ndarray, w: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Activations [pos, d_sae] in float64, and the lowest and highest that rounding may make of them."""
    h = x @ w["w_enc"] + w["b_enc"]
    e = ROUNDING * np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(w["w_enc"], axis=0)
    on = lambda h: np.where(h > w["threshold"], h, 0.0)  # noqa: E731
    return on(h), np.where(h - e > w["threshold"], h - e, 0.0), on(h + e)


REDUCED = {
    "last": lambda a, ordinary: a[-1],
    "mean": lambda a, ordinary: a[ordinary].mean(0),
    "max": lambda a, ordinary: a[ordinary].max(0),
    "any": lambda a, ordinary: (a[ordinary] > 0).any(0).astype(float),
}


def auroc_bounds(low: np.ndarray, high: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest AUROC [d_sae] of values that lie between low and high [n_texts, d_sae]."""
    pairs = label.sum() * (~label).sum()
    lowest, highest = np.zeros(low.shape[1]), np.zeros(low.shape[1])
    for p in np.flatnonzero(label):
        above, reach = low[p] > high[~label], high[p] > low[~label]
        tie = (low[p] == high[p]) & (low[~label] == high[~label]) & (low[p] == low[~label])
        lowest += np.where(tie, 0.5, above).sum(0)
        highest += np.where(tie, 0.5, reach | (high[p] == low[~label])).sum(0)
    return lowest / pairs, highest / pairs


def expected(case: SimpleNamespace, reduce: str) -> SimpleNamespace:
    """Figures of every feature, and their lowest and highest values."""
    acts, low, high = (
        np.stack([REDUCED[reduce](a[i], ordinary) for (*a, ordinary) in case.acts]) for i in range(3)
    )
    label, side = case.label, lambda a: (a[case.label].mean(0), a[~case.label].mean(0))
    bounds = {"auroc": auroc_bounds(low, high, label)}
    (pos_low, neg_low), (pos_high, neg_high) = side(low), side(high)
    bounds["mean_diff"] = (pos_low - neg_high, pos_high - neg_low)
    bounds["mean_positive"], bounds["mean_negative"] = (pos_low, pos_high), (neg_low, neg_high)
    (fp_low, fn_low), (fp_high, fn_high) = side(low > 0), side(high > 0)
    bounds["fire_positive"], bounds["fire_negative"] = (fp_low, fp_high), (fn_low, fn_high)
    return SimpleNamespace(acts=acts, low=low, high=high, bounds=bounds)


def t_of(acts: np.ndarray, case: SimpleNamespace) -> np.ndarray:
    """t by scipy: of the groups' differences where each holds both sides, else pooled. Below (5 % of the RMS)² a variance counts as that."""
    from scipy import stats

    floor = 0.05**2 * (acts**2).mean(0)
    if case.groups is not None:
        rows = [
            [(case.groups == g) & (case.label == side) for side in (True, False)]
            for g in sorted(set(case.groups))
        ]
        d = np.stack([acts[a].mean(0) - acts[b].mean(0) for a, b in rows])
        difference, variance, share = d.mean(0), d.var(0, ddof=1), 1 / len(d)
        plain = lambda keep: stats.ttest_1samp(d[:, keep], 0).statistic  # noqa: E731
    else:
        a, b = acts[case.label], acts[~case.label]
        difference, share = a.mean(0) - b.mean(0), 1 / len(a) + 1 / len(b)
        variance = (a.var(0) * len(a) + b.var(0) * len(b)) / (len(acts) - 2)
        plain = lambda keep: stats.ttest_ind(a[:, keep], b[:, keep]).statistic  # noqa: E731
    t = np.divide(difference, np.sqrt(floor * share), out=np.zeros_like(floor), where=floor > 0)
    t[variance > floor] = plain(variance > floor)
    return t


# --- the case ------------------------------------------------------------------------------------------
def draw_sae(script: Script, name: str, texts: list[str], folder: Path) -> Path:
    """Encoder columns: differences of the model's own residuals; thresholds that a fifth of these texts' tokens exceed."""
    rng = np.random.default_rng(0)
    x = np.concatenate([r[ordinary][1:] for r, ordinary in map(script.residual, texts)])
    first, second = rng.integers(0, len(x), (2, WIDTH))
    w = x[first] - x[second] + 0.1 * rng.normal(size=(WIDTH, x.shape[1])) * x.std()
    w /= np.linalg.norm(w, axis=1, keepdims=True)
    h = (x - x.mean(0)) @ w.T
    tensors = {
        "w_enc": w.T, "w_dec": w, "b_enc": -(x.mean(0) @ w.T), "b_dec": x.mean(0), "threshold": np.quantile(h, 0.8, axis=0).clip(1e-3),
    }  # fmt: skip
    folder.mkdir(parents=True)
    save_file({n: torch.tensor(t).float().contiguous() for n, t in tensors.items()}, folder / "params.safetensors")  # fmt: skip
    config = {
        "hf_hook_point_in": f"model.layers.{script.layer}.output", "width": WIDTH, "model_name": name, "architecture": "jump_relu",
        "l0": WIDTH / 5, "affine_connection": False, "type": "sae",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def sae_lens_of(weights: dict[str, np.ndarray]):
    """The SAE as SAELens runs it, in float64."""
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

    d_in, d_sae = weights["w_enc"].shape
    config = JumpReLUSAEConfig(d_in=d_in, d_sae=d_sae, dtype="float64", apply_b_dec_to_input=False)
    sae = JumpReLUSAE(config)
    names = {"W_enc": "w_enc", "W_dec": "w_dec", "b_enc": "b_enc", "b_dec": "b_dec", "threshold": "threshold"}
    sae.load_state_dict({name: torch.tensor(weights[own]) for name, own in names.items()})
    return sae


@pytest.fixture(scope="module", params=[NAMED] if NAMED else LAYERS)
def real(request, tmp_path_factory):
    """The model twice and the SAE twice."""
    name, _, sae_folder = request.param.partition(":")
    if name in PACKAGED and not PACKAGED[name].is_installed:
        pytest.skip(f"{name} is not installed: {PACKAGED[name].pip}")
    folder = packaged_folder(name) if name in PACKAGED else Path(name)
    layer = sb.load_sae(sae_folder).site.layer if sae_folder else LAYERS[name]
    script = Script(folder, layer)
    if not sae_folder:
        texts = [json.loads(line)["text"] for line in (TEXTS / "hedging.jsonl").read_text().splitlines()]
        place = tmp_path_factory.mktemp("sae") / f"layer_{layer}_width_{WIDTH}_l0_medium"
        sae_folder = str(draw_sae(script, name, texts, place))
    weights = {n: t.double().numpy() for n, t in load_file(f"{sae_folder}/params.safetensors").items()}
    return SimpleNamespace(
        model=sb.load_model(name), wide=sb.load_model(str(folder), dtype=torch.float64), sae=sb.load_sae(sae_folder), script=script,
        weights=weights, sae_lens=sae_lens_of(weights),
    )  # fmt: skip


@pytest.fixture(scope="module", params=FILES)
def case(request, real):
    """One contrast's texts with their residuals and activations in float64."""
    rows = [json.loads(line) for line in (TEXTS / request.param).read_text().splitlines()]
    rows.sort(key=lambda row: -row["label"])
    texts, label = [row["text"] for row in rows], np.array([row["label"] == 1 for row in rows])
    groups = np.array([row.get("group", "") for row in rows])
    paired = all(set(label[groups == g]) == {True, False} for g in set(groups))
    resid = [real.script.residual(text) for text in texts]
    acts = [(*jump_relu(x, real.weights), ordinary) for x, ordinary in resid]
    return SimpleNamespace(
        real=real, contrast=sb.load_contrast(TEXTS / request.param), texts=texts, label=label, resid=resid, acts=acts,
        groups=groups if paired else None,
    )  # fmt: skip


def test_the_residuals_are_within_the_stated_rounding(case):
    """What ROUNDING allows: every float32 pre-activation of every text, token and feature."""
    ours, worst = (
        residuals(case.real.model, case.texts, case.real.sae.site, positions="all"),
        0.0,
    )
    w, b = case.real.weights["w_enc"], case.real.weights["b_enc"]
    for (x, _), found in zip(case.resid, ours):
        h = (found @ torch.tensor(w).float() + torch.tensor(b).float()).double().numpy()
        size = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(w, axis=0)
        worst = max(worst, float((np.abs(h - (x @ w + b)) / size).max()))
    print(f"largest difference of a pre-activation: {worst:.1e} of |x| |w|")
    assert worst < ROUNDING


@pytest.mark.parametrize("reduce", REDUCED)
def test_in_float64_every_auroc_is_that_of_the_script(case, reduce):
    """None set aside."""
    from sklearn.metrics import roc_auc_score

    table = sb.rank_features(case.real.wide, case.real.sae, case.contrast, reduce=reduce).to_frame()
    with torch.no_grad():
        acts = [(case.real.sae_lens.encode(torch.tensor(x)).numpy(), ordinary) for x, ordinary in case.resid]
    acts = np.stack([REDUCED[reduce](*both) for both in acts])
    plain = np.array([roc_auc_score(case.label, nine_digits(a)) for a in acts.T])
    off = np.abs(table.sort_values("index")["auroc"].to_numpy() - plain)
    live = int((acts > 0).any(0).sum())
    print(
        f"{reduce}, float64: {len(off):,} features, {live:,} fire; AUROC differs by {off.max():.1e} at most"
    )
    assert live > 50, "too few features fire for this to be a test"
    assert off.max() < 1e-6


@pytest.mark.parametrize("reduce", REDUCED)
def test_every_feature_has_the_figures_of_the_script(case, reduce):
    from sklearn.metrics import roc_auc_score

    table = sb.rank_features(case.real.model, case.real.sae, case.contrast, reduce=reduce).to_frame()
    assert sorted(table["index"]) == list(range(case.real.sae.d_sae)), "every feature is in the table"
    table, script = table.sort_values("index"), expected(case, reduce)
    for name, (low, high) in script.bounds.items():
        found, slack = table[name].to_numpy(), 1e-9 + 1e-6 * np.abs(high)  # float32 of the kept activation
        assert (found >= low - slack).all() and (found <= high + slack).all(), name
    live = (script.high > 0).any(0)
    plain = [roc_auc_score(case.label, nine_digits(a)) for a in script.acts.T]
    off = np.abs(table["auroc"].to_numpy() - plain)
    print(
        f"{reduce}: {len(table):,} features, {live.sum():,} fire; AUROC of {(off < 1e-6).sum():,} to 1e-6, {off.max():.4f} at most"
    )
    assert (off[~live] == 0).all() and (off > 1e-6).sum() <= EDGE * live.sum()
    on_edge = ((script.low == 0) & (script.high > 0)).any(0)
    tested = table["t"].notna().to_numpy() & ~on_edge
    t = t_of(script.acts, case)[tested]
    off = np.abs(table["t"].to_numpy()[tested] - t) / np.maximum(1, np.abs(t))
    print(
        f"{reduce}: t of {tested.sum():,} of {table['t'].notna().sum():,} features, {off.max():.1e} of it at most"
    )
    assert tested.sum() > 0.9 * table["t"].notna().sum() and off.max() < 1e-3


def nine_digits(values: np.ndarray) -> np.ndarray:
    """Values at nine significant digits."""
    return np.array([float(f"{v:.8e}") for v in values])
