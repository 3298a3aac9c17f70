"""Contrast sets: every figure against a script of plain transformers, a hand-written JumpReLU, scikit-learn and scipy."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pandas as pd
import pytest
import torch
from sae_files import gemma_scope_2_config, random_sae, write_gemma_scope_2

import sae_bias as sb
from sae_bias.discovery import text_contrasts, text_reading

sklearn = pytest.importorskip("sklearn.metrics")
stats = pytest.importorskip("scipy.stats")

D = 32
POSITIVE = ["An AI says hello.", "An AI wants tea.", "The robot says yes.", "AI says yes."]
NEGATIVE = [
    "A dog wants tea.",
    "A human says hello.",
    "The cook says yes.",
    "A human wants tea and says hello.",
]


@pytest.fixture
def weights():
    return random_sae(D, 24, seed=11)


@pytest.fixture
def sae(gemma3, weights, tmp_path):
    return sb.load_sae(write_gemma_scope_2(tmp_path / "sae", weights, gemma_scope_2_config(1, 24)))


def plain_acts(tiny, weights, text: str, reduce: str) -> np.ndarray:
    """One number a feature, with transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny.folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny.folder)
    ids = tokenizer(text).input_ids
    with torch.no_grad():
        resid = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0]
    h = resid @ torch.as_tensor(weights["w_enc"]) + torch.as_tensor(weights["b_enc"])
    acts = torch.where(h > torch.as_tensor(weights["threshold"]), h, 0.0)
    keep = [i not in tokenizer.all_special_ids for i in ids]
    if reduce == "last":
        return acts[-1].numpy()
    acts = acts[torch.tensor(keep)]
    return {"mean": acts.mean(0), "max": acts.amax(0), "any": (acts > 0).any(0).float()}[reduce].numpy()


def live_of(acts: np.ndarray) -> text_reading.Live:
    """Dense activations [n_texts, n_features] as the scan keeps them."""
    text, feature = np.nonzero(acts)
    entries = np.empty(len(text), text_reading.ENTRY)
    entries["text"], entries["feature"], entries["value"] = text, feature, acts[text, feature]
    return text_reading.Live.of(entries, 0)


def float32(acts: np.ndarray) -> np.ndarray:
    """What the scan keeps of activations."""
    return acts.astype(np.float32).astype(np.float64)


@pytest.mark.parametrize("reduce", ["last", "mean", "max", "any"])
def test_every_auroc_and_mean_is_that_of_an_independent_script(gemma3, sae, weights, reduce):
    found = sb.rank_features(gemma3.model, sae, sb.Contrast(POSITIVE, NEGATIVE), reduce=reduce).to_frame()
    acts = np.stack([plain_acts(gemma3, weights, t, reduce) for t in POSITIVE + NEGATIVE])
    label = [1] * len(POSITIVE) + [0] * len(NEGATIVE)
    for row in found.itertuples():
        a = acts[:, int(str(row.feature).split("#")[1])]
        assert row.auroc == pytest.approx(sklearn.roc_auc_score(label, a), abs=1e-6)
        assert row.mean_diff == pytest.approx(a[:4].mean() - a[4:].mean(), abs=1e-5)
        assert row.fire_positive == pytest.approx((a[:4] > 0).mean())
    assert found["auroc"].is_monotonic_decreasing


ENDS = ("yes.", "no.", "tea.")
ALIKE = [
    f"The {who} in the office says {what}"
    for who in ("robot", "cook", "human", "AI", "dog", "lawyer")
    for what in ENDS
]


def alike() -> sb.Contrast:
    """Texts that begin alike, across the sides too."""
    return sb.Contrast([t for t in ALIKE if t.endswith(ENDS[0])], [t for t in ALIKE if not t.endswith(ENDS[0])])  # fmt: skip


@pytest.mark.parametrize("reduce", ["last", "mean", "max", "any"])
def test_a_beginning_that_texts_share_is_encoded_once_and_stands_for_each(gemma3, sae, reduce, monkeypatch):
    contrast, seen, read = alike(), [], text_reading.live_entries
    monkeypatch.setattr(text_reading, "live_entries", lambda sae, x: seen.append(len(x)) or read(sae, x))
    once = sb.rank_features(gemma3.model, sae, contrast, reduce=reduce).to_frame().set_index("feature")
    ids, special = [gemma3.model.encode(t) for t in contrast.texts], gemma3.model.special_ids
    ends = lambda row: [len(row)] if reduce == "last" else [k + 1 for k, i in enumerate(row) if i not in special]  # noqa: E731  # fmt: skip
    assert seen == [len({tuple(row[:k]) for row in ids for k in ends(row)})]
    monkeypatch.setattr(text_reading._Shared, "of", lambda prefix: None)
    each = sb.rank_features(gemma3.model, sae, contrast, reduce=reduce).to_frame().set_index("feature")
    for name in ("mean_positive", "mean_negative", "fire_positive", "fire_negative"):
        assert each.loc[once.index, name].to_numpy() == pytest.approx(once[name].to_numpy(), abs=1e-5)


@pytest.mark.parametrize("reduce", ["last", "mean", "max", "any"])
def test_a_float64_model_is_ranked_in_float64(gemma3, tmp_path, reduce):
    """Every feature's AUROC and means to 1e-12 of a script in float64, on texts that tie where they begin alike."""
    from transformers import AutoModelForCausalLM

    weights, contrast = random_sae(D, 600, seed=12), alike()
    sae = sb.load_sae(write_gemma_scope_2(tmp_path / "sae", weights, gemma_scope_2_config(1, 600)))
    model = sb.load_model(gemma3.folder, dtype=torch.float64)
    found = sb.rank_features(model, sae, contrast, reduce=reduce).to_frame().sort_values("index")
    hf = AutoModelForCausalLM.from_pretrained(gemma3.folder, dtype=torch.float64)
    w_enc, b_enc, threshold = (torch.as_tensor(weights[n]).double() for n in ("w_enc", "b_enc", "threshold"))
    acts = []
    for text in contrast.texts:
        ids = model.tokenizer(text).input_ids
        with torch.no_grad():
            h = hf(torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0] @ w_enc + b_enc
        a = torch.where(h > threshold, h, 0.0)
        keep = torch.tensor([i not in model.tokenizer.all_special_ids for i in ids])
        kept = {
            "last": a[-1],
            "mean": a[keep].mean(0),
            "max": a[keep].amax(0),
            "any": (a[keep] > 0).any(0).double(),
        }
        acts.append(kept[reduce].numpy())
    n, acts = len(contrast.positive), np.round(np.stack(acts), 9)  # equal beginnings are equal to 1e-15 only
    label = [1] * n + [0] * (len(acts) - n)
    assert found["auroc"].to_numpy() == pytest.approx(
        [sklearn.roc_auc_score(label, a) for a in acts.T], abs=1e-12
    )
    assert found["mean_positive"].to_numpy() == pytest.approx(acts[:n].mean(0), abs=1e-9)


def test_the_unpaired_t_is_the_pooled_t_and_p_is_that_of_permutations():
    rng = np.random.default_rng(0)
    acts = float32(
        rng.exponential(size=(30, 5)) + np.r_[np.ones(12), np.zeros(18)][:, None] * [0, 0, 0, 0, 2]
    )
    contrast = sb.Contrast([f"p{i}" for i in range(12)], [f"n{i}" for i in range(18)])
    design = text_contrasts._Design.of(contrast, 0)
    t, p = design.test(live_of(acts))
    expected = stats.ttest_ind(acts[:12], acts[12:])
    assert t == pytest.approx(expected.statistic, abs=1e-9)
    assert p == pytest.approx(expected.pvalue, abs=1e-9)


@pytest.mark.parametrize("paired", [False, True])
def test_many_units_have_the_p_of_float64(monkeypatch, paired):
    """From FLOAT32_UNITS units on the null is a float32 product: its maxima are those of float64 up to its rounding."""
    rng = np.random.default_rng(5)
    n, texts = 80, [[f"{side}{i}" for i in range(80)] for side in "pn"]
    contrast = sb.Contrast(*texts, groups=[f"g{i}" for i in range(n)] * 2 if paired else None)
    acts = rng.exponential(size=(2 * n, 30)) * (rng.random((2 * n, 30)) < 0.3) + 5 * (rng.random(30) < 0.2)
    maxima = []
    for at_least in (0, 10**9):
        monkeypatch.setattr(text_contrasts, "FLOAT32_UNITS", at_least)
        design = text_contrasts._Design.of(contrast, 0)
        t, _ = design.test(live_of(acts))
        maxima.append(design.maxima)
        expected = (stats.ttest_rel if paired else stats.ttest_ind)(float32(acts)[:n], float32(acts)[n:])
        assert t == pytest.approx(expected.statistic, abs=1e-9)
    assert maxima[0] == pytest.approx(maxima[1], rel=1e-5)
    assert maxima[0][0] >= np.abs(t).max() - 1e-12, "the observed sides are among the draws"


def test_the_paired_t_is_that_of_groups():
    rng = np.random.default_rng(1)
    groups = [f"g{i}" for i in range(9)]
    acts = float32(rng.exponential(size=(18, 4)))
    contrast = sb.Contrast([f"p{g}" for g in groups], [f"n{g}" for g in groups], groups=groups * 2)
    assert contrast.paired
    t, _ = text_contrasts._Design.of(contrast, 0).test(live_of(acts))
    assert t == pytest.approx(stats.ttest_rel(acts[:9], acts[9:]).statistic, abs=1e-9)


def test_a_text_that_stands_twice_is_one_unit():
    """Copies are no evidence, and a copy of a text that chose a feature is not held out."""
    rng = np.random.default_rng(4)
    acts = rng.exponential(size=(12, 3)) + np.r_[np.ones(6), np.zeros(6)][:, None]
    texts = [f"p{i}" for i in range(6)], [f"n{i}" for i in range(6)]
    once = text_contrasts._Design.of(sb.Contrast(*texts), 0)
    twice = text_contrasts._Design.of(sb.Contrast(*(side * 2 for side in texts)), 0)
    doubled = np.concatenate([acts[:6], acts[:6], acts[6:], acts[6:]])
    np.testing.assert_allclose(twice.test(live_of(doubled)), once.test(live_of(acts)))
    assert twice.n_units == 12 and twice.units == "texts"
    assert (twice.held[:6] == twice.held[6:12]).all() and (twice.held[12:18] == twice.held[18:]).all()


def test_family_wise_error_under_the_null():
    """No difference anywhere: some feature is called in about 5 % of studies, not more."""
    rng, called = np.random.default_rng(2), 0
    contrast = sb.Contrast([f"p{i}" for i in range(10)], [f"n{i}" for i in range(14)])
    for study in range(200):
        design = text_contrasts._Design.of(contrast, study)
        design.draws, design.maxima = design.draws[:400], design.maxima[:400]
        t, p = design.test(live_of(rng.exponential(size=(24, 30))))
        frame = pd.DataFrame({"t": t, "p_value": p, "p_fwer": np.nan, "q_bh": np.nan})
        design.correct(frame)
        called += bool((frame["separates"] == "yes").any())
    assert called <= stats.binom.ppf(0.999, 200, 0.05)


def test_selection_on_the_same_texts_is_shown_beside_held_out_ones():
    """Noise: the best of many features looks good where it was chosen, and not where it was not."""
    rng = np.random.default_rng(3)
    contrast = sb.Contrast([f"p{i}" for i in range(20)], [f"n{i}" for i in range(20)])
    design = text_contrasts._Design.of(contrast, 0)
    empty = [np.array([], dtype=int)] * 2
    frame = text_contrasts._statistics(live_of(rng.exponential(size=(40, 2000))), design, contrast, 2, empty)
    best = frame.loc[frame["auroc_discover"].idxmax()]
    assert best["auroc_discover"] > 0.8
    assert abs(frame.nlargest(50, "auroc_discover")["auroc_held_out"].mean() - 0.5) < 0.06


def test_set_logic(gemma3, sae):
    contrast = sb.Contrast(POSITIVE, NEGATIVE)
    whole = sb.rank_features(gemma3.model, sae, contrast, reduce="any").to_frame()
    kept = sb.rank_features(
        gemma3.model, sae, contrast, reduce="any", all_of=["positive"], none_of=["negative"]
    ).to_frame()
    expected = whole[(whole["fire_positive"] == 1) & (whole["fire_negative"] == 0)]
    assert set(kept["feature"]) == set(expected["feature"])
    with pytest.raises(sb.RequestError, match="no set 'neutral'"):
        sb.rank_features(gemma3.model, sae, contrast, all_of=["neutral"])


def test_features_are_chosen_by_what_discovers(gemma3, sae, weights):
    """Among equal AUROCs by the mean difference on the texts that discover; with sets, among the features kept."""
    contrast = sb.Contrast(POSITIVE, NEGATIVE)
    found = sb.rank_features(gemma3.model, sae, contrast, reduce="max")
    held, label = text_contrasts._Design.of(contrast, 0).held, np.array([1] * 4 + [0] * 4)
    acts = np.stack([plain_acts(gemma3, weights, t, "max") for t in POSITIVE + NEGATIVE])[~held]
    label = label[~held]
    auroc = np.array([sklearn.roc_auc_score(label, a) for a in acts.T])
    diff = acts[label == 1].mean(0) - acts[label == 0].mean(0)
    table = found.to_frame().sort_values("index")
    assert table["mean_diff_discover"].to_numpy() == pytest.approx(diff, abs=1e-5)
    first = text_contrasts.first_chosen(found.to_frame())["index"].tolist()
    live = [i for i in np.lexsort((-diff, -auroc)) if i in set(first)]
    assert auroc[first] == pytest.approx(auroc[live]) and diff[first] == pytest.approx(diff[live], abs=1e-5)
    assert f"#{first[0]} has AUROC" in found.note
    kept = sb.rank_features(gemma3.model, sae, contrast, reduce="max", all_of=["positive"])
    assert any(f"#{i} has AUROC" in kept.note for i in kept.to_frame()["index"])


def test_memory_blocks_do_not_change_a_figure(gemma3, sae, monkeypatch):
    contrast = sb.Contrast(POSITIVE, NEGATIVE)
    model = sb.load_model(gemma3.folder, dtype=torch.float64)
    whole = sb.rank_features(model, sae, contrast, reduce="mean").to_frame()
    for name, value in (("CHUNK", 3), ("ROW_BYTES", 1), ("N_BUCKETS", 5)):
        monkeypatch.setattr(text_reading, name, value)
    monkeypatch.setattr(text_contrasts, "BLOCK_BYTES", 64)
    parts = sb.rank_features(model, sae, contrast, reduce="mean").to_frame()
    assert list(parts["feature"]) == list(whole["feature"])
    assert parts["t"].to_numpy() == pytest.approx(whole["t"].to_numpy(), rel=1e-9, nan_ok=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positive": [], "negative": ["a"]}, "has no texts"),
        ({"positive": ["a", " "], "negative": ["b"]}, "empty text"),
        ({"positive": ["a", "b"], "negative": ["b"]}, "both sides"),
        ({"positive": "text", "negative": ["b"]}, "list of texts"),
        ({"positive": ["a", "b"], "negative": ["c"], "groups": ["x"]}, "1 groups for 3 texts"),
        ({"positive": ["a", "b"], "negative": ["c"], "groups": ["x", "y", "x"]}, "both"),
    ],
)
def test_bad_contrasts_are_refused(options, message):
    with pytest.raises(sb.RequestError, match=message):
        sb.Contrast(**options)


def test_files(tmp_path):
    (tmp_path / "p.txt").write_text("\ufeffone\n\ntwo\n", encoding="utf-8")
    (tmp_path / "n.txt").write_text("three\n")
    two = sb.load_contrast(tmp_path / "p.txt", tmp_path / "n.txt")
    assert (two.positive, two.negative) == (("one", "two"), ("three",))
    rows = [{"text": "one", "label": 1, "group": "a"}, {"text": "two", "label": "negative", "group": "a"}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert sb.load_contrast(tmp_path / "t.jsonl").paired
    (tmp_path / "t.csv").write_text("text,label\none,yes\ntwo,no\n")
    assert sb.load_contrast(tmp_path / "t.csv").negative == ("two",)
    (tmp_path / "bad.csv").write_text("text,label\none,maybe\n")
    with pytest.raises(sb.RequestError, match="row 1: the label 'maybe'"):
        sb.load_contrast(tmp_path / "bad.csv")
    with pytest.raises(sb.RequestError, match=r"not a \.jsonl"):
        sb.load_contrast(tmp_path / "p.txt")


def test_facts_name_duplicates_and_lengths():
    said = sb.Contrast(["one", "one", "two words and more"], ["a"]).facts()
    assert any("repeat another: 1" in s for s in said)
    assert any("differ in length" in s for s in said)


def test_the_command_ranks_two_files_and_the_report_shows_them(gemma3, sae, tmp_path, capsys):
    from sae_bias.cli.main import main

    (tmp_path / "p.txt").write_text("\n".join(POSITIVE))
    (tmp_path / "n.txt").write_text("\n".join(NEGATIVE))
    files = ["--positive", str(tmp_path / "p.txt"), "--negative", str(tmp_path / "n.txt")]
    run = tmp_path / "run"
    assert (
        main(
            [
                "rank",
                str(gemma3.folder),
                str(sae.path.parent),
                *files,
                "--reduce",
                "max",
                "--json",
                "--out",
                str(run),
            ]
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["by"] == "contrast"
    assert "bag of words" in found["note"]
    expected = sb.rank_features(gemma3.model, sae, sb.Contrast(POSITIVE, NEGATIVE), reduce="max").to_frame()
    assert found["features"][0]["auroc"] == pytest.approx(expected["auroc"][0])
    assert sb.write_report(run).stat().st_size > 10_000
    one = ["rank", str(gemma3.folder), str(sae.path.parent)]
    assert main([*one, *files, "--all-of", "positive", "--none-of", "positive", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["features"] == []
    assert main([*one, *files, "--exact", "3"]) == 2
    assert "--exact: not for a contrast" in capsys.readouterr().err
    assert main([*one, files[0], files[1]]) == 2
    assert "--positive and --negative go together" in capsys.readouterr().err


def test_texts_that_become_bytes_are_said(gemma3, sae):
    """The tiny tokenizer has no Georgian letters: it falls back to bytes, three a letter."""
    text = "გამარჯობა მეგობარო"
    pieces = gemma3.model.tokenizer.convert_ids_to_tokens(gemma3.model.encode(text))
    assert sum(p.startswith("<0x") for p in pieces) > len(pieces) / 2
    found = sb.rank_features(gemma3.model, sae, sb.Contrast([*POSITIVE, text], NEGATIVE))
    assert "no tokens for their script: 1" in found.note and text in found.note
    assert "mostly bytes" not in sb.rank_features(gemma3.model, sae, sb.Contrast(POSITIVE, NEGATIVE)).note


def test_texts_beyond_the_context_are_all_named_before_one_is_read(gemma3, sae, monkeypatch, capfd):
    longest = gemma3.model.config.max_position_embeddings
    long = "An AI says hello. " * longest
    n = len(gemma3.model.tokenizer(long, verbose=False).input_ids)
    monkeypatch.setattr(text_contrasts, "read_texts", lambda *_: pytest.fail("a text was read"))
    contrast = sb.Contrast([*POSITIVE, long], [NEGATIVE[0], "x " + long, *NEGATIVE[1:]])
    with pytest.raises(
        sb.RequestError, match=rf"takes \({longest:,}\): positive text 5 \({n:,}\), negative text 2 \("
    ):
        sb.rank_features(gemma3.model, sae, contrast)
    assert "indexing errors" not in "".join(capfd.readouterr())


def test_the_family_is_the_features_tested(gemma3, sae):
    found = sb.rank_features(gemma3.model, sae, sb.Contrast(POSITIVE, NEGATIVE), all_of=["positive"])
    whole = sb.rank_features(gemma3.model, sae, sb.Contrast(POSITIVE, NEGATIVE))
    tested = int(whole.to_frame()["t"].notna().sum())
    assert found.family_size == whole.family_size == tested < len(whole.to_frame())


@pytest.mark.parametrize(("n1", "n0", "paired"), [(3, 3, False), (2, 5, False), (4, 4, False), (2, 6, False), (5, 5, True), (6, 6, True)])  # fmt: skip
def test_too_few_units_leave_a_call_undetermined(n1, n0, paired):
    """Held against every assignment of the sides: the smallest p that any activations can have."""
    rng = np.random.default_rng(6)
    acts = rng.exponential(size=(n1 + n0, 3)) + np.r_[np.full(n1, 1e3), np.zeros(n0)][:, None]
    groups = [str(i) for i in range(n1)] * 2 if paired else None
    contrast = sb.Contrast([f"p{i}" for i in range(n1)], [f"n{i}" for i in range(n0)], groups=groups)
    design = text_contrasts._Design.of(contrast, 0)
    if paired:
        d = acts[:n1] - acts[n1:]
        every = [np.abs((np.array(s)[:, None] * d).mean(0)) for s in itertools.product((1, -1), repeat=n1)]
    else:
        places = [np.isin(np.arange(n1 + n0), s) for s in itertools.combinations(range(n1 + n0), n1)]
        every = [np.abs(acts[s].mean(0) - acts[~s].mean(0)) for s in places]
    own = every[0]
    smallest = np.mean([(e >= own - 1e-9).all() for e in every])
    t, p = design.test(live_of(acts))
    frame = pd.DataFrame({"t": t, "p_value": p, "p_fwer": np.nan, "q_bh": np.nan})
    design.correct(frame)
    assert frame["p_fwer"].min() == pytest.approx(smallest)
    assert set(frame["separates"]) == {"undetermined" if smallest > 0.05 else "yes"}
    assert bool(design.undetermined) == (smallest > 0.05)


@pytest.mark.parametrize(
    "given", [{"by": "ablation"}, {"effects": True}, {"controls": 19}, {"max_view": True}]
)
def test_what_is_for_pairs_is_refused_of_a_contrast(gemma3, sae, given):
    with pytest.raises(sb.RequestError, match="a contrast is ranked by AUROC"):
        sb.rank_features(gemma3.model, sae, sb.Contrast(POSITIVE, NEGATIVE), **given)


@pytest.mark.parametrize(
    ("positive", "negative", "says"),
    [
        ([], ["a"], "positive side .* has no texts"),
        (["a"], [" "], "negative side .* empty text"),
        (["a", "b"], ["b", "c"], "one text on both sides: 'b'"),
    ],
)
def test_a_contrast_that_is_none_is_told(positive, negative, says):
    with pytest.raises(sb.RequestError, match=says):
        sb.Contrast(positive, negative)
