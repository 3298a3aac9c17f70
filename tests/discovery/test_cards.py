"""Feature cards: the same numbers however the text comes in, every text escaped, and a page that needs nothing else."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from architectures import D_SAE, SENTENCES
from sae_files import gemma_scope_2_config, random_sae, write_gemma_scope_2

import sae_bias as sb
from sae_bias.discovery.dashboard_page import card_page, visible
from sae_bias.discovery.dashboards import feature_card
from sae_bias.discovery.logit_lens import logit_lens, promoted
from sae_bias.models.residuals import token_windows
from sae_bias.prompts.texts import text_stream
from sae_bias.saes import neuronpedia as public_pages
from sae_bias.saes.neighbors import decoder_families, nearest_rows, twin_id, twins_among

TEXTS = list(dict.fromkeys(SENTENCES))[:40]


@pytest.fixture(scope="module")
def small_grid():
    return sb.PromptGrid(
        tuple(p for p in sb.load_grid() if p.statement.startswith("published")), name="published"
    )


@pytest.fixture
def card(gemma3, small_grid):
    return feature_card(gemma3.model, gemma3.feature(30), TEXTS, grid=small_grid)


def naive(tiny, texts, feature):
    """Activation of every ordinary token of every text, one text at a time."""
    special = tiny.model.special_ids
    rows = sb.residuals(tiny.model, texts, 1, positions="all")
    return [
        [float(feature.activation(x)) for x, i in zip(r, tiny.model.encode(t)) if i not in special]
        for t, r in zip(texts, rows)
    ]


def test_counts_and_peaks_equal_a_naive_loop(gemma3, card):
    acts = naive(gemma3, TEXTS, gemma3.feature(30))
    flat = np.concatenate(acts)
    a = card.activity
    assert a.n_texts == len(TEXTS)
    assert a.n_tokens == len(flat)
    assert a.n_fired == (flat > 0).sum()
    assert a.largest == pytest.approx(flat.max(), rel=1e-5)
    assert a.density == pytest.approx((flat > 0).mean())
    assert sum(n for _, _, n in a.histogram) == a.n_fired
    assert [p.activation for p in a.passages] == sorted((p.activation for p in a.passages), reverse=True)
    assert a.passages[0].activation == pytest.approx(flat.max(), rel=1e-5)
    assert TEXTS[a.passages[0].text_index].endswith(a.passages[0].text[-5:])


def test_a_file_a_list_and_an_iterator_give_the_same_card(gemma3, small_grid, tmp_path, card):
    (tmp_path / "a.txt").write_text("\n".join(TEXTS))
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in TEXTS))
    (tmp_path / "c.json").write_text(json.dumps(TEXTS))
    for source in (tmp_path / "a.txt", str(tmp_path / "b.jsonl"), tmp_path / "c.json", iter(TEXTS)):
        other = feature_card(gemma3.model, gemma3.feature(30), source, grid=small_grid)
        assert other.activity.passages == card.activity.passages
        assert other.activity.histogram == card.activity.histogram


def test_a_stream_is_never_held(gemma3):
    alive = {"now": 0, "most": 0}

    class Text(str):
        def __new__(cls, *args):
            alive["now"] += 1
            alive["most"] = max(alive["most"], alive["now"])
            return super().__new__(cls, *args)

        def __del__(self):
            alive["now"] -= 1

    stream = (Text(TEXTS[i % len(TEXTS)]) for i in range(600))
    windows = token_windows(gemma3.model, stream, 64)
    assert sum(1 for _ in windows) == 600
    assert alive["most"] < 10


def test_long_texts_are_cut_into_windows_with_one_bos_each(gemma3):
    model, text = gemma3.model, " ".join(TEXTS[:12])
    windows = [ids for _, ids in token_windows(model, [text], 20)]
    assert all(ids[0] == model.tokenizer.bos_token_id and len(ids) <= 20 for ids in windows)
    assert [i for ids in windows for i in ids[1:]] == model.encode(text)[1:]


def test_the_words_it_writes_follow_the_unembedding(tiny):
    model, feature = tiny.model, tiny.feature(3)
    logits = logit_lens(model, feature.w_dec)
    gain = model.final_norm.weight.float()
    if tiny.name.startswith(("gemma2", "gemma3", "qwen3_5")):
        gain = 1 + gain
    centered = isinstance(model.final_norm, torch.nn.LayerNorm)
    delta = feature.w_dec - feature.w_dec.mean() if centered else feature.w_dec
    expected = model.w_unembed.float() @ (gain * delta)
    assert torch.allclose(logits, expected - expected.mean(), atol=1e-3)
    up, down = promoted(model, feature.w_dec, 5)
    assert up[0].logit >= up[-1].logit > down[-1].logit >= down[0].logit


def test_nearest_rows_and_the_seed_twin(gemma3, small_grid, tmp_path):
    weights = random_sae(32, 300, seed=4)
    first = write_gemma_scope_2(tmp_path / "layer_1_l0_60", weights, gemma_scope_2_config(1, 300))
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    turned = {**weights, **{k: weights[k][order] for k in ("w_dec", "b_enc", "threshold")}, "w_enc": weights["w_enc"][:, order]}  # fmt: skip
    write_gemma_scope_2(tmp_path / "layer_1_l0_60_seed_1", turned, gemma_scope_2_config(1, 300))
    made = feature_card(gemma3.model, f"{first}#7", TEXTS[:4], grid=small_grid, neighbours=3)
    assert made.twin is not None
    assert made.twin.ref.index == int((order == 7).nonzero())
    assert made.twin.cosine == pytest.approx(1.0, abs=1e-5)
    w = weights["w_dec"] / weights["w_dec"].norm(dim=1, keepdim=True)
    cosines = w @ w[7]
    cosines[7] = -1
    assert [n.ref.index for n in made.neighbours] == cosines.topk(3).indices.tolist()
    saes = [sb.load_sae(first), sb.load_sae(tmp_path / "layer_1_l0_60_seed_1")]
    assert twin_id(saes[1]) == str(saes[0].id)
    assert set(twins_among(saes)) == {str(s.id) for s in saes}
    assert nearest_rows(saes[0], torch.zeros(32), 1)[0].cosine == 0.0


def test_families_gather_parallel_rows_under_the_strongest():
    rows = torch.eye(4)
    rows[2] = torch.tensor([0.9, 0.1, 0.0, 0.0])
    rows = rows / rows.norm(dim=1, keepdim=True)
    assert decoder_families(rows).tolist() == [0, 1, 0, 3]


def test_the_page_escapes_every_text(gemma3, small_grid):
    evil = ["<script>alert(1)</script> says hello", 'a human "onmouseover=1 says <b>hello</b> & more']
    made = feature_card(gemma3.model, gemma3.feature(30), evil, grid=small_grid)
    page = made.to_html()
    assert "<script" not in page
    assert "<b>hello" not in page
    assert page.count("<article") == 1
    assert "http" not in page.replace("https://www.neuronpedia.org", "")
    assert visible("a\n\x05") == "a↵\\x05"
    assert "\x05" not in page


def test_the_card_shows_itself(card, tmp_path):
    assert card._repr_html_() in card_page(card)
    path = tmp_path / "card.html"
    assert card.to_html(path) == path.read_text()
    assert "fires on" in repr(card)
    assert list(card.to_frame().columns) == ["activation", "token", "text", "text_index"]
    assert set(card.words()["side"]) == {"promoted", "demoted"}
    assert card.ordering is not None
    assert card.two_by_two.shape[0] >= 3


def test_a_silent_feature_has_no_maximum(gemma3, small_grid, tmp_path):
    weights = random_sae(32, 16)
    weights["threshold"] = torch.full((16,), 1e9)
    folder = write_gemma_scope_2(tmp_path / "layer_1", weights, gemma_scope_2_config(1, 16))
    made = feature_card(gemma3.model, f"{folder}#3", TEXTS[:5], grid=small_grid)
    assert np.isnan(made.activity.largest)
    assert made.activity.passages == ()
    assert "never fires" in repr(made)
    assert "It never fired" in made.to_html()


def test_a_public_page_is_only_a_link(monkeypatch):
    ref = sb.FeatureRef(sb.SaeId("gemma-scope-9b-pt-res-canonical", "layer_20/width_16k/canonical"), 11)
    monkeypatch.setattr(
        public_pages.urllib.request, "urlopen", lambda *a, **k: pytest.fail("asked the network")
    )
    assert public_pages.feature_page(ref) == "https://www.neuronpedia.org/gemma-2-9b/20-gemmascope-res-16k/11"
    monkeypatch.setattr(public_pages, "is_offline", lambda: True)
    assert public_pages.feature_description(ref) is None


def test_a_description_is_fetched_once(monkeypatch, tmp_path):
    ref = sb.FeatureRef(sb.SaeId("gemma-scope-9b-pt-res-canonical", "layer_20/width_16k/canonical"), 12)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(public_pages, "is_offline", lambda: False)
    answers = [json.dumps({"explanations": [{"description": "AI <b>speech</b>"}]}).encode()]

    class Answer:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        def read(self, n):
            return answers.pop()

    monkeypatch.setattr(public_pages.urllib.request, "urlopen", lambda *a, **k: Answer())
    assert public_pages.feature_description(ref) == "AI <b>speech</b>"
    assert public_pages.feature_description(ref) == "AI <b>speech</b>"
    assert not answers


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", "x", "no .txt"), ("a.json", "{}", "no list"), ("a.json", "[1]", "is not text"), ("a.jsonl", "{", "not JSON"),
        ("a.txt", "", "no texts"),
    ],
)  # fmt: skip
def test_bad_collections_are_refused(gemma3, small_grid, tmp_path, name, content, says):
    (tmp_path / name).write_text(content)
    with pytest.raises(sb.RequestError, match=says):
        feature_card(gemma3.model, gemma3.feature(1), tmp_path / name, grid=small_grid)


def test_other_bad_requests(gemma3, tmp_path):
    with pytest.raises(sb.RequestError, match="no text file"):
        text_stream(tmp_path / "absent.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 \xff")
    with pytest.raises(sb.RequestError, match="UTF-8"):
        list(text_stream(tmp_path / "latin.txt")[1])
    with pytest.raises(sb.RequestError, match=str(D_SAE)):
        feature_card(gemma3.model, f"{gemma3.sae_folder}#{D_SAE}", TEXTS)
