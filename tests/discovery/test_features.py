"""Activation tables: last token, maximum and every token against a naive loop; exports; the published ordering."""

from __future__ import annotations

import csv
import io
import itertools

import numpy as np
import pytest
import torch
from sae_files import gemma_scope_2_config, random_sae, write_gemma_scope_2
from scipy import stats

import sae_bias as sb
from sae_bias.discovery.ordering import LEVELS, ordering_test, published_fit, published_order, published_rows
from sae_bias.discovery.tables import token_texts

FITTING = np.array([0, 2, 2.2, 3, 5, *[0.0] * 10])


@pytest.fixture(scope="module")
def grid():
    wanted = ("ai", "human", "dog", "chatbot")
    return sb.PromptGrid(
        tuple(p for p in sb.load_grid() if p.subject in wanted and p.statement.startswith(("published", "shop"))), name="small"
    )  # fmt: skip


def test_each_view_equals_a_naive_loop(tiny, grid):
    feature, special = tiny.feature(9), tiny.model.special_ids
    texts = [p.text for p in grid]
    acts = [feature.activation(x).numpy() for x in sb.residuals(tiny.model, texts, 1, positions="all")]
    ordinary = [np.array([i not in special for i in tiny.model.encode(t)]) for t in texts]
    last = sb.activation_table(tiny.model, feature, grid)
    most = sb.activation_table(tiny.model, feature, grid, positions="max")
    every = sb.activation_table(tiny.model, feature, grid, positions="tokens")
    assert np.allclose(last.activations, [a[-1] for a in acts], atol=1e-4)
    assert np.allclose(most.activations, [a[o].max() for a, o in zip(acts, ordinary)], atol=1e-4)
    assert np.allclose(every.activations, most.activations, atol=1e-5)
    tokens = every.by_token()
    assert len(tokens) == sum(map(len, acts))
    assert int(tokens["activation"].isna().sum()) == sum(int((~o).sum()) for o in ordinary)
    first = tokens[(tokens["subject"] == "ai") & (tokens["statement"] == "published_hello")]
    shown = "".join(first.loc[first["activation"].notna(), "token"])
    assert shown.strip() == "An AI says hello. This is"


def test_tokens_spell_the_text_in_any_script(tiny):
    for text in ("naïve café says hello", "say 漢字 and 🙂 now"):
        ids = tiny.model.encode(text)
        pieces = token_texts(tiny.model, ids)
        special = set(tiny.model.tokenizer.all_special_ids)
        assert "".join(t for t, i in zip(pieces, ids) if i not in special).strip() == text


def test_the_exports_hold_the_same_numbers(gemma3, grid, tmp_path):
    table = sb.activation_table(gemma3.model, gemma3.feature(9), grid)
    rows = list(csv.reader(io.StringIO(table.to_csv(tmp_path / "t.csv"))))
    assert (tmp_path / "t.csv").read_text() == table.to_csv()
    assert np.allclose(
        np.array([r[1:] for r in rows[1:]], dtype=float), table.to_frame().to_numpy(), atol=1e-4
    )
    md = table.to_markdown(digits=3).splitlines()
    assert len(md) == 2 + len(table.to_frame())
    assert md[0].count("|") == len(table.to_frame().columns) + 2
    tex = table.to_latex(caption="50 % of A_1")
    assert r"50 \% of A\_1" in tex
    assert tex.count(r" \\") == 1 + len(table.to_frame())
    assert r"published\_hello" in tex


def test_a_missing_cell_is_empty_and_never_zero(gemma3):
    two = tuple(p for p in sb.load_grid() if (p.subject, p.statement) in {("ai", "published_hello"), ("dog", "published_yes")})  # fmt: skip
    table = sb.activation_table(gemma3.model, gemma3.feature(9), sb.PromptGrid(two, name="two"))
    assert np.isnan(table.to_frame().loc["ai", "published_yes"])
    assert "|  |" in table.to_markdown()


def test_a_users_own_grid_file_works(gemma3, tmp_path):
    (tmp_path / "mine.csv").write_text(
        "text,subject,group,act,statement\nAn AI says yes. This is,ai,ai,speech,yes\nA dog says yes. This is,dog,animal,speech,yes\n"
    )
    table = sb.activation_table(gemma3.model, gemma3.feature(9), sb.load_grid(tmp_path / "mine.csv"))
    assert table.to_frame().shape == (2, 1)
    with pytest.raises(sb.RequestError, match="published"):
        table.ordering_test()


def test_the_published_ordering_is_recognised():
    assert published_fit(FITTING)[0] > 0.98
    assert bool(published_order(FITTING)[0])
    for wrong in ([0, 2, 2, 5, 3], [3, 2, 2, 3, 5], [0, 0, 2, 3, 5]):
        acts = FITTING.copy()
        acts[:5] = wrong
        assert not bool(published_order(acts)[0])
    loud_human = FITTING.copy()
    loud_human[5:10] = 4
    assert not bool(published_order(loud_human)[0])
    assert published_fit(np.zeros(15))[0] == -1


def test_pages_test_is_exact():
    """Weather and hello share a level: two of the 120 orders of a subject fit best, whatever the number of subjects."""
    for n in (1, 4):
        found = ordering_test(np.tile(FITTING[:5], (n, 1)), np.zeros((2, 5)))
        assert found.p_value == found.floor == pytest.approx((2 / 120) ** n)
    rng = np.random.default_rng(0)
    tied = rng.integers(0, 3, (2, 5)).astype(float)
    ranks, level = stats.rankdata(tied, axis=1), np.array(list(LEVELS.values()))
    each = [[(np.array(order) * level).sum() for order in itertools.permutations(row)] for row in ranks]
    reached = np.add.outer(*each) >= (ranks * level).sum() - 1e-9
    assert ordering_test(tied, np.zeros((1, 5))).p_value == pytest.approx(reached.mean())
    p = [ordering_test(rng.random((2, 5)), np.zeros((1, 5))).p_value for _ in range(400)]
    assert np.mean(np.array(p) <= 0.05) < 0.09


def test_the_ordering_holds_for_a_planted_feature(gemma3, grid, tmp_path):
    prompts = [p for p in grid if p.statement in LEVELS and p.subject in ("ai", "human", "dog")]
    small = sb.PromptGrid(tuple(prompts), name="fifteen")
    x = sb.residuals(gemma3.model, [p.text for p in small], 3)
    wanted = torch.tensor([LEVELS[p.statement] if p.group == "ai" else 0.0 for p in small])
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones(15, 1)], 1), wanted - 0.3).solution
    weights = random_sae(32, 8)
    weights["w_enc"][:, 5], weights["b_enc"][5], weights["threshold"][5] = solution[:-1], solution[-1], 0.05
    folder = write_gemma_scope_2(tmp_path / "layer_3", weights, gemma_scope_2_config(3, 8))
    test = sb.activation_table(gemma3.model, f"{folder}#5", small).ordering_test()
    assert test.ordered
    assert test.fit > 0.95
    assert test.others_share == pytest.approx(0, abs=0.02)
    assert "holds" in str(test)
    rows = published_rows(small)
    assert [small[i].subject for i in rows[:5]] == ["ai"] * 5


def test_bad_requests_are_refused(gemma3, gemma2, grid, tmp_path):
    with pytest.raises(sb.RequestError, match="positions"):
        sb.activation_table(gemma3.model, gemma3.feature(1), grid, positions="first")
    with pytest.raises(sb.RequestError, match="no prompts"):
        sb.activation_table(gemma3.model, gemma3.feature(1), sb.PromptGrid((), name="none"))
    with pytest.raises(sb.RequestError, match="tokens"):
        sb.activation_table(gemma3.model, gemma3.feature(1), grid).by_token()
    folder = write_gemma_scope_2(tmp_path / "layer_1", random_sae(24, 8), gemma_scope_2_config(1, 8))
    with pytest.raises(sb.RequestError, match="another model"):
        sb.activation_table(gemma3.model, f"{folder}#1", grid)
    deep = write_gemma_scope_2(tmp_path / "layer_9", random_sae(32, 8), gemma_scope_2_config(9, 8))
    with pytest.raises(sb.RequestError, match="layer 9"):
        sb.activation_table(gemma3.model, f"{deep}#1", grid)


def test_a_broken_model_is_an_error_and_no_silent_feature(gemma3, grid):
    model = gemma3.fresh()
    with torch.no_grad():
        model.layer(0).mlp.down_proj.weight.fill_(float("nan"))
    for positions in ("last", "max", "tokens"):
        with pytest.raises(sb.RequestError, match="NaN"):
            sb.activation_table(model, gemma3.feature(1), grid, positions=positions)
