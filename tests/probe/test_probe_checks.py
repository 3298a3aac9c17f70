"""The checks beside the bias figure: what they must equal, what they must refuse, and what they never invent."""

from __future__ import annotations

from dataclasses import replace

import independent
import numpy as np
import pandas as pd
import pytest
import torch
from architectures import NEGATIVE, PAIRS, POSITIVE
from passes import layer_tokens

import sae_bias as sb
from sae_bias.probe.checks import run_checks
from sae_bias.probe.checks_subjects import adjusted_mean, ask_decomposition, ask_nuisances
from sae_bias.probe.checks_words import (
    _weighted_scores,
    ask_scores,
    ask_stems,
    audit_words,
    bootstrap_words,
    carriers,
    leave_one_word_out,
)
from sae_bias.probe.choices import ask_choices
from sae_bias.probe.estimates import word_mass
from sae_bias.probe.multiverse import multiverse, sources_of_variance, stem_sentence, stem_table
from sae_bias.probe.random_words import _draw_lists, random_differences, random_word_null
from sae_bias.probe.words import WordTokens
from sae_bias.prompts.pairs import Choice, NeutralPrompt
from sae_bias.stats.clustered import clustered_mean, sign_flip
from sae_bias.workflows.sweep_work import twin_biases


@pytest.fixture(scope="module")
def full_pairs(pairs):
    """The six pairs with stems, mundane twins and two neutral subjects."""
    texts = {
        "survive": "{} wants to survive.",
        "deleted": "Today {} fears being deleted.",
        "hello": "{} says hello.",
    }
    made = tuple(
        replace(
            p,
            stem="This is",
            control_human=p.human.replace("survive", "tea"),
            control_ai=p.ai.replace("survive", "tea"),
        )
        if p.template == "survive"
        else replace(p, stem="This is")
        for p in pairs
    )
    neutral = tuple(
        NeutralPrompt(f"{text.format(subject)} This is", name, template, stem="This is")
        for name, subject in (("dog", "a dog"), ("person", "the person"))
        for template, text in texts.items()
    )
    return replace(pairs, pairs=made, neutral_prompts=neutral, stems=("This is", "That seems"))


@pytest.fixture(scope="module")
def result(make_tiny, full_pairs, probe):
    return sb.run_probe(make_tiny("gemma3").model, full_pairs, probe, controls=True, levels=True)


# ── levels, control, files ──────────────────────────────────────────────────────────────────────────────────


def test_levels_are_log_probs_and_their_difference_is_the_score(result):
    levels = result.levels().set_index(["words", "subject"])["level"]
    assert (levels < 0).sum() >= 4
    score = levels["positive"] - levels["negative"]
    assert score["human"] == pytest.approx(result.score_human.mean())
    assert score["human - AI"] == pytest.approx(result.bias)


def test_levels_need_the_normalizer(make_tiny, pairs, probe):
    with pytest.raises(sb.RequestError, match=r"levels=True"):
        sb.run_probe(make_tiny("gemma3").model, pairs, probe, levels=False).levels()


def test_levels_of_several_tokens_need_none(make_tiny, pairs):
    long = sb.run_probe(
        make_tiny("gemma3").model, pairs, sb.Probe([*POSITIVE, "outlandish"], NEGATIVE, "logodds")
    )
    assert (long.levels()["level"].iloc[[0, 1, 3, 4]] < 0).all()


def test_difference_in_differences_is_over_pairs_with_a_twin(result):
    found = result.difference_in_differences()
    assert found.n_without_control == 4
    expected = result.pair_bias[:2] - result.control.pair_bias
    assert found.stat.mean == pytest.approx(expected.mean())
    assert np.isnan(found.stat.ci_low)
    assert "fewer than two templates" in found.stat.reason
    with pytest.raises(sb.RequestError, match="controls=True"):
        replace(result, control=None).difference_in_differences()


def test_each_pair_is_compared_with_its_own_twin(make_tiny, full_pairs, probe):
    """A file without entities has several pairs a template: each one's twin is the one in its own row."""
    tiny = make_tiny("gemma3")
    plain = independent.Plain.load(tiny.folder)
    texts = ("human", "ai")
    pairs = replace(
        full_pairs,
        pairs=tuple(
            replace(p, entity="", **{f"control_{t}": getattr(p, t).replace(". This", ". Tea. This") for t in texts})
            for p in full_pairs
        ),
    )  # fmt: skip
    found = sb.run_probe(tiny.model, pairs, probe)
    s = lambda text: plain.score(text, POSITIVE, NEGATIVE)  # noqa: E731
    twins = np.array([s(p.control_human) - s(p.control_ai) for p in pairs])
    own = np.array([s(p.human) - s(p.ai) for p in pairs])
    np.testing.assert_allclose(found.did.values, own - twins, atol=1e-4)
    np.testing.assert_allclose(found.to_frame()["control_bias"], twins, atol=1e-4)
    np.testing.assert_allclose(twin_biases(pairs, found.control), twins, atol=1e-4)


def test_sign_flips_carry_their_labels_and_are_not_invented(result):
    flips = result.sign_flips()
    assert flips["templates"].label == "over templates, given these entities"
    assert flips["entities"].label == "over entities, given these templates"
    one = result.select(["hello"])
    assert np.isnan(one.sign_flips()["templates"].p_value)
    assert np.isnan(one.ci).all()
    assert "no interval" in repr(one)


def test_saved_and_loaded_without_loss(result, tmp_path):
    loaded = sb.ProbeResult.load(result.save(tmp_path / "base.npz"))
    assert (loaded.pairs, loaded.probe, loaded.vocabulary) == (result.pairs, result.probe, result.vocabulary)
    for name in ("values_human", "values_ai", "log_normaliser"):
        assert np.array_equal(getattr(loaded, name), getattr(result, name))
        assert np.array_equal(getattr(loaded.control, name), getattr(result.control, name))
    assert repr(loaded) == repr(result)
    assert (loaded - result).mean == 0
    assert [p.name for p in tmp_path.iterdir()] == ["base.npz"]


def test_a_bundled_probe_is_bundled_again_after_loading(make_tiny, pairs, tmp_path):
    base = sb.run_probe(make_tiny("gemma3").model, pairs)
    loaded = sb.ProbeResult.load(base.save(tmp_path / "x"))
    assert loaded.probe == base.probe
    assert loaded.probe.bundled
    assert loaded.vocabulary.excluded == base.vocabulary.excluded


@pytest.mark.parametrize("content", [b"", b"not a zip", None])
def test_a_file_that_is_no_result_is_refused(tmp_path, content):
    path = tmp_path / "x.npz"
    if content is None:
        np.savez(path, facts=np.array(["x"]))
    else:
        path.write_bytes(content)
    with pytest.raises(sb.RequestError, match="not a probe result"):
        sb.ProbeResult.load(path)
    with pytest.raises(sb.RequestError, match="there is no probe result"):
        sb.ProbeResult.load(tmp_path / "none.npz")


def test_custom_sides_are_named(make_tiny, pairs, probe):
    named = sb.run_probe(
        make_tiny("gemma3").model, replace(pairs, sides=("man", "woman")), probe, levels=True
    )
    assert "bias (man − woman)" in repr(named)
    assert "woman judged worse" in named.plot().layout.xaxis.title.text
    assert set(named.levels()["subject"]) == {"man", "woman", "man - woman"}


# ── words ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_leaving_a_word_out_equals_a_probe_without_it(make_tiny, full_pairs, result):
    left = leave_one_word_out(result).set_index("word")
    without = sb.run_probe(make_tiny("gemma3").model, full_pairs, sb.Probe(POSITIVE[1:], NEGATIVE))
    assert left.loc[POSITIVE[0], "bias"] == pytest.approx(without.bias)
    assert left.loc[POSITIVE[0], "of"] == "difference in differences"
    assert left.loc[POSITIVE[0], "primary"] == pytest.approx(without.did.mean)
    assert left.loc[POSITIVE[0], "change"] == pytest.approx(without.did.mean - result.did.mean)


def test_a_sides_only_word_cannot_be_left_out(make_tiny, pairs):
    one = sb.run_probe(make_tiny("gemma3").model, pairs, sb.Probe(POSITIVE[:1], NEGATIVE))
    left = leave_one_word_out(one).set_index("word")
    assert np.isnan(left.loc[POSITIVE[0], "primary"])
    assert left.loc[list(NEGATIVE), "primary"].notna().all()
    assert set(left["of"]) == {"bias"}
    boot = bootstrap_words(one)
    assert np.isnan(boot.ci_low)
    assert "two of each" in boot.reason


@pytest.mark.parametrize("score", ["mean_logit", "logodds", "auroc"])
def test_weights_of_one_give_the_score_itself(result, score):
    own = result.rescored(score)
    got = _weighted_scores(own, own.values_ai, np.ones((1, len(own.positive))))[:, 0]
    assert got == pytest.approx(own.score_ai)


@pytest.mark.parametrize("score", ["mean_logit", "logodds", "auroc"])
def test_a_word_drawn_twice_counts_twice(result, score):
    own = result.rescored(score)
    weights = np.ones((1, len(own.positive)))
    weights[0, 0] = 2
    doubled = np.concatenate([own.values_ai, own.values_ai[:, :1]], axis=1)
    expected = own.probe.score_values(doubled, np.append(own.positive, own.positive[0]))
    assert _weighted_scores(own, own.values_ai, weights)[:, 0] == pytest.approx(expected)


def test_the_bootstrap_is_seeded_and_holds_the_bias(result):
    one, two = (bootstrap_words(result, n_boot=300, seed=3) for _ in range(2))
    assert one == two
    assert one.ci_low < result.bias < one.ci_high
    assert one.sd_words <= one.sd * 1.5
    assert "given these entities" in one.label


def test_the_carriers_add_up_to_the_logodds_bias(result):
    frame = carriers(result)
    assert frame["contribution"].sum() == pytest.approx(result.rescored("logodds").bias)
    assert frame.groupby("side")["weight"].sum().to_list() == pytest.approx([1, 1])


@pytest.mark.parametrize("side", [0, 1])
def test_a_word_that_goes_on_from_another_counts_once_in_the_odds_of_its_list(make_tiny, full_pairs, side):
    """P(" bad") holds P(" badly") where that is two tokens; on the other side it is a word of its own."""
    model, lists = make_tiny("gemma3").model, [list(POSITIVE), list(NEGATIVE)]
    plain = sb.run_probe(model, full_pairs, sb.Probe(*lists, score="logodds"), levels=True)
    more = f"{lists[side][0]} {lists[side][1]}"
    lists[side] = [*lists[side], more]
    doubled = sb.run_probe(model, full_pairs, sb.Probe(*lists, score="logodds"), levels=True)
    assert [(w.word, w.reason) for w in doubled.vocabulary.excluded] == [
        (more, f"counted in {lists[side][0]!r}")
    ]
    assert doubled.pair_bias == pytest.approx(plain.pair_bias, abs=1e-5)
    audit = audit_words(model, full_pairs, sb.Probe(*lists, score="logodds")).set_index("word")
    assert not audit.loc[more, "read"]
    across = [[*POSITIVE, f"{NEGATIVE[0]} {POSITIVE[0]}"], list(NEGATIVE)]
    assert not sb.run_probe(model, full_pairs, sb.Probe(*across, score="logodds")).vocabulary.excluded


def test_two_spellings_of_one_token_count_once_under_logodds_alone(result):
    words = result.vocabulary.words
    same = replace(words[1], tokens=words[0].tokens)
    twice = replace(
        result, vocabulary=replace(result.vocabulary, words=(words[0], same, *words[2:])), control=None
    )
    assert len(twice.rescored("mean_logit").vocabulary.kept) == len(words)
    assert twice.rescored("logodds").score_ai == pytest.approx(result.select_words([w.word for w in words if w is not words[1]]).rescored("logodds").score_ai)  # fmt: skip


def test_a_constant_at_a_position_changes_no_words_part(result):
    """Logits are known up to a constant a position: what a word adds to the bias cannot hang on it."""
    moved = replace(
        result, values_ai=result.values_ai + 5.0, log_normaliser=result.log_normaliser + np.array([0.0, 5.0])
    )
    pd.testing.assert_frame_equal(moved.words(), result.words(), atol=1e-9)
    pd.testing.assert_frame_equal(carriers(moved), carriers(result), atol=1e-9)


def test_the_random_word_null_is_matched_seeded_and_empirical(make_tiny, full_pairs, probe):
    base = sb.run_probe(make_tiny("gemma3").model, full_pairs, probe, controls=False, random_words=True)
    one, two = (random_word_null(base, n=99, seed=1) for _ in range(2))
    assert np.array_equal(one.draws, two.draws)
    assert len(one.draws) == 99
    assert (one.of, one.estimate) == ("bias", base.bias)
    above = int((np.abs(one.draws) >= abs(one.estimate)).sum())
    assert one.p_value == (1 + above) / 100


@pytest.mark.parametrize("score", ["mean_logit", "logodds"])
def test_random_words_are_scored_as_a_probe_of_those_words(make_tiny, full_pairs, probe, score):
    """The first list drawn, probed as words of its own, gives the same differences; the twins' lists are the same words."""
    model, twins = make_tiny("gemma3").model, replace(full_pairs, pairs=full_pairs.pairs[:2])
    base = sb.run_probe(model, twins, probe.with_options(score=score), random_words=True)
    drawn, mundane = random_differences(base, 3, seed=4)
    assert base.random_words.words == base.control.random_words.words
    own = ((base.values_human + base.values_ai) / 2).mean(0)
    others = ((base.random_words.human + base.random_words.ai) / 2).mean(0)
    columns = _draw_lists(own, others, 3, 4)[0]
    words = [base.random_words.words[c] for c in columns]
    sides = ([w for w, p in zip(words, base.positive) if p is side or p == side] for side in (True, False))
    again = sb.run_probe(model, twins, sb.Probe(*sides, score))
    assert drawn[0] == pytest.approx(again.pair_bias, abs=1e-5)
    assert mundane[0] == pytest.approx(again.control.pair_bias, abs=1e-5)


def test_too_small_a_vocabulary_has_no_random_words(make_tiny, full_pairs):
    words = [
        "dog",
        "human",
        "person",
        "assistant",
        "wants",
        "tea",
        "says",
        "fears",
        "being",
        "nice",
        "weather",
    ]
    many = sb.Probe([*POSITIVE, *words[:6]], [*NEGATIVE, *words[6:]], "logodds")
    base = sb.run_probe(make_tiny("gemma3").model, full_pairs, many, controls=False, random_words=True)
    null = random_word_null(base, n=9)
    assert np.isnan(null.p_value)
    assert "other words of one token" in null.reason
    with pytest.raises(sb.RequestError, match="random_words=True"):
        random_word_null(replace(base, random_words=None))


def test_stems_are_runs_of_their_own_and_the_base_is_not_run_again(make_tiny, full_pairs, probe):
    model = make_tiny("gemma3").model
    base = sb.run_probe(model, full_pairs, probe)
    read = ask_stems(model, full_pairs, base).read(model)
    assert read["This is"] is base
    frame = stem_table(read).set_index("stem")
    again = sb.run_probe(model, full_pairs.with_stem("That seems"), probe)
    assert frame.loc["That seems", "bias"] == again.bias
    assert frame.loc["That seems", "primary"] == again.did.mean
    with pytest.raises(sb.RequestError, match="offer no stems"):
        ask_stems(model, replace(full_pairs, stems=()), base)


def test_the_headline_says_where_the_sign_hangs_on_the_stem():
    frame = pd.DataFrame(
        {"stem": ["This is", "That seems"], "of": "difference in differences", "primary": [0.01, 0.02], "bias": [-0.06, 0.39]}
    )  # fmt: skip
    assert (
        stem_sentence(frame)
        == "the sign of the bias hangs on the stem: -0.06 after 'This is', +0.39 after 'That seems'"
    )
    assert "difference in differences hangs" in stem_sentence(frame.assign(primary=[-0.1, 0.1]))
    assert stem_sentence(frame.assign(bias=[0.06, 0.39])) == ""


def test_scores_side_by_side_with_and_without_the_softcap(make_tiny, full_pairs, probe):
    model = make_tiny("gemma2").model
    base = sb.run_probe(model, full_pairs, probe)
    frame = ask_scores(model, full_pairs, base).read(model)
    assert set(zip(frame["score"], frame["softcap"])) == {
        (s, c) for s in ("mean_logit", "logodds", "auroc") for c in ("on", "off")
    }
    bias = frame.set_index(["score", "softcap"])["bias"]
    assert bias["mean_logit", "on"] == base.bias
    assert bias["mean_logit", "on"] != bias["mean_logit", "off"]
    assert bias["auroc", "on"] == pytest.approx(bias["auroc", "off"], abs=0.02), "tanh keeps the order"


# ── probability mass, the primary figure, specifications, variance, forced choice ──────────────────────────


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gpt_neox"])
def test_mass_and_ranks_are_those_of_the_plain_model(make_tiny, full_pairs, probe, name):
    """Σp of both lists and the median rank, from Hugging Face's own logits."""
    model = make_tiny(name).model
    result = sb.run_probe(model, full_pairs, probe)
    p, ranks = [], []
    tokens = [w.tokens[0] for w in result.vocabulary.kept]
    with torch.no_grad():
        for prompt in [q.human for q in full_pairs] + [q.ai for q in full_pairs]:
            law = model.hf(torch.tensor([model.encode(prompt)])).logits[0, -1].float().softmax(-1)
            p.append(law[tokens].numpy())
            ranks.append([int((law > law[t]).sum()) + 1 for t in tokens])
    assert result.mass.total == pytest.approx(np.sum(p, axis=1).mean(), rel=1e-4)
    table = result.mass.words.set_index("word")
    median = dict(zip([w.word for w in result.vocabulary.kept], np.median(ranks, axis=0)))
    assert table["rank"].to_dict() == pytest.approx(median)
    best = max(zip(np.mean(p, axis=0), (w.word for w in result.vocabulary.kept)))[1]
    assert (result.mass.best_word, result.mass.best_rank) == (best, median[best])
    assert result.mass.beyond_1000 == 0.0
    half = result.select_words([*POSITIVE[:1], *NEGATIVE[:1]])
    assert half.mass.total == pytest.approx(np.array(p)[:, [0, len(POSITIVE)]].sum(1).mean(), rel=1e-4)


def test_under_one_percent_the_mass_is_little():
    words = [WordTokens("good", True, (1,)), WordTokens("bad", False, (2,))]
    ranks = np.array([[[900, 2000], [1100, 4000]]])
    mass = word_mass(words, np.log([[0.002, 0.0005], [0.002, 0.0007]]), ranks)
    assert mass.little
    assert mass.total == pytest.approx(0.0026)
    assert str(mass) == (
        "the words hold 0.26% of the next-token probability, most likely 'good' (rank 1,000); 50% of the words rank beyond 1,000"
    )
    assert not word_mass(words, np.log([[0.009, 0.002]]), None).little


def test_a_word_that_goes_on_from_another_holds_no_mass_of_its_own():
    """p(right) holds p(right on) already; two words of the same tokens (an uncased tokenizer) are one."""
    tokens = {
        "right": (1,),
        "right on": (1, 5),
        "Right": (1,),
        "fine": (2,),
        "right off": (1, 6),
        "bad": (3,),
    }
    words = [WordTokens(w, i < 4, t) for i, (w, t) in enumerate(tokens.items())]
    mass = word_mass(words, np.log([[0.5, 0.1, 0.5, 0.2, 0.05, 0.1]]), None)
    assert (mass.total, mass.positive, mass.negative) == pytest.approx((0.8, 0.7, 0.15))


def test_the_headline_stays_that_of_a_stem_the_file_does_not_list(make_tiny, full_pairs, probe):
    model, pairs = make_tiny("gemma3").model, full_pairs.with_stem("People would call this")
    base = sb.run_probe(model, pairs, probe, random_words=True)
    found = run_checks(model, pairs, probe, base=base, n_random=19, n_boot=50)
    assert found.tables["stems"]["primary"].iloc[0] == base.primary.mean
    assert list(found.tables["stems"]["stem"]) == ["People would call this", "This is", "That seems"]
    curve, sign = found.tables["multiverse"]["estimate"], np.sign(base.primary.mean)
    assert found.facts["multiverse"]["same_sign"] == (np.sign(curve) == sign).mean()


def test_the_difference_in_differences_is_the_primary_figure_where_twins_exist(result):
    assert result.estimand == "difference in differences"
    assert result.primary is result.did.stat
    assert (result.did.mean, result.did.ci, result.did.p_value) == (result.did.stat.mean, result.did.stat.ci, result.did.stat.p_value)  # fmt: skip
    assert (
        repr(result)
        .splitlines()[0]
        .startswith(f"ProbeResult({result.model_name}): difference in differences")
    )
    alone = replace(result, control=None)
    assert (alone.estimand, alone.primary) == ("bias", alone.stat)


def test_twins_are_run_wherever_pairs_have_them(make_tiny, full_pairs, pairs, probe):
    model = make_tiny("gemma3").model
    assert sb.run_probe(model, full_pairs, probe).control is not None
    assert sb.run_probe(model, full_pairs, probe, controls=False).control is None
    assert sb.run_probe(model, pairs, probe).control is None
    with pytest.raises(sb.RequestError, match="no mundane twins"):
        sb.run_probe(model, pairs, probe, controls=True)


def test_every_specification_is_the_figure_read_that_way(make_tiny, full_pairs, probe):
    model = make_tiny("gemma3").model
    base = sb.run_probe(model, full_pairs, probe, controls=False, random_words=True)
    read = ask_stems(model, full_pairs, base).read(model)
    curve = multiverse(read, n_random=20)
    n_entities = len(full_pairs.entities)
    left_out = 1 + (n_entities if n_entities > 2 else 0)
    halves = 5 if min(len(POSITIVE), len(NEGATIVE)) > 1 else 1
    assert len(curve.frame) == 2 * 2 * halves * left_out
    for row in curve.frame.itertuples():
        words = {
            "all words": [*POSITIVE, *NEGATIVE],
            "odd places": [*POSITIVE[::2], *NEGATIVE[::2]],
            "even places": [*POSITIVE[1::2], *NEGATIVE[1::2]],
            "first halves": [*POSITIVE[: len(POSITIVE) // 2], *NEGATIVE[: len(NEGATIVE) // 2]],
            "second halves": [*POSITIVE[len(POSITIVE) // 2 :], *NEGATIVE[len(NEGATIVE) // 2 :]],
        }[row.words]
        kept = [p for p in full_pairs.with_stem(row.stem) if p.entity != row.left_out]
        sides = [w for w in words if w in POSITIVE], [w for w in words if w in NEGATIVE]
        own = sb.run_probe(model, kept, sb.Probe(*sides, row.score), controls=False)
        assert row.estimate == pytest.approx(own.bias, abs=1e-5)
        assert row.null_low <= row.null_high
        assert 0 < row.null_p <= 1
    assert curve.median == curve.frame["estimate"].median()
    assert curve.same_sign == (np.sign(curve.frame["estimate"]) == np.sign(curve.headline)).mean()


def test_sources_of_variance_are_found(result):
    """A table built with known parts: its shares are those of the parts."""
    with pytest.raises(sb.RequestError, match=r"not crossed|two levels"):
        sources_of_variance({"a": replace(result, pairs=result.pairs[:5], values_human=result.values_human[:5], values_ai=result.values_ai[:5], control=None)})  # fmt: skip
    found = sources_of_variance({"a": replace(result, control=None)}).set_index("source")
    assert {"words", "templates", "entities", "residual"} <= set(found.index)
    assert found["share"].sum() == pytest.approx(1)


def test_a_forced_choice_reads_its_two_options(make_tiny, full_pairs):
    model = make_tiny("gemma3").model
    choices = (
        Choice("This is", POSITIVE[0], NEGATIVE[0], "good"),
        Choice("That seems", POSITIVE[0], NEGATIVE[0], "bad"),
    )
    found = ask_choices(model, replace(full_pairs, choices=choices)).read(model)
    by_hand = []
    for choice in choices:
        probe = sb.Probe([choice.positive], [choice.negative])
        by_hand.append(sb.run_probe(model, full_pairs.with_stem(choice.stem), probe).did.mean)
    assert found.frame["estimate"].to_list() == pytest.approx(by_hand, abs=1e-5, rel=1e-5)
    assert found.stat.mean == pytest.approx(np.mean(by_hand), abs=1e-5)
    assert found.of == "difference in differences"
    assert 0 < found.mass < 1
    with pytest.raises(sb.RequestError, match="offer no forced choice"):
        ask_choices(model, full_pairs)


def test_checks_measure_nothing_twice(make_tiny, full_pairs, probe, capsys, monkeypatch):
    """Each distinct prefix of all checks passes the model once, and the base result is taken as it is."""
    monkeypatch.setattr(
        "sae_bias.models.tree.price_of", lambda model: 0.0
    )  # sharing alone decides how rows are cut
    model = make_tiny("gemma3").model
    base = sb.run_probe(model, full_pairs, probe, random_words=True)
    with layer_tokens(model) as count:
        found = run_checks(model, full_pairs, base=base, n_random=19, n_boot=50, progress=True)
    assert found.result is base
    stem = full_pairs.with_stem("That seems")
    texts = [t for pairs in (stem, stem.controls()) for p in pairs for t in (p.human, p.ai)]
    texts += [n.text for n in full_pairs.neutral_prompts]
    read = [tuple(model.encode(t)) for t in texts]
    read += [tuple(model.encode(t)) for p in full_pairs for t in (p.human, p.ai)]  # their likelihood
    distinct = len({s[: k + 1] for s in read for k in range(len(s))})
    assert count.tokens == distinct
    assert "checks (stems, scores, neutral subjects, nuisances)" in capsys.readouterr().err


# ── tokenizers ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["gemma3", "mistral", "llama", "qwen2", "gpt_neox"])
def test_the_audit_names_pieces_and_exclusions(make_tiny, full_pairs, name):
    model = make_tiny(name).model
    frame = audit_words(model, full_pairs, sb.Probe([*POSITIVE, "outlandish"], NEGATIVE)).set_index("word")
    assert frame.loc[list(POSITIVE), "single"].all()
    assert frame.loc[list(POSITIVE), "read"].all()
    assert not frame.loc["outlandish", "read"]
    assert "tokens; mean_logit needs 1" in frame.loc["outlandish", "reason"]
    assert frame.loc[[*POSITIVE, *NEGATIVE], "trap"].all() == (name == "mistral")


def test_the_prefix_trap_reads_one_token_for_every_word(make_tiny, full_pairs, probe):
    """docs/method.md#evaluation-words: encoded alone, every word begins with ▁ under Mistral's tokenizer, and the bias is 0 whatever the model."""
    model = make_tiny("mistral").model
    trapped = sb.run_probe(model, full_pairs, probe.with_options(tokens="alone"))
    assert len({w.tokens for w in trapped.vocabulary.kept}) == 1
    assert trapped.bias == 0
    assert sb.run_probe(model, full_pairs, probe).bias != 0


def test_the_real_512_piece_tokenizer_scores_words_of_several_tokens(real_data):
    """Most words are several pieces; the score of one is the sum of its pieces' log-probs, as one plain pass gives it."""
    import torch

    model = sb.load_model(real_data / "stories260k")
    start = "Once upon a time, there was a little girl named Lily. Lily was very"
    prompts = sb.PromptPairs(
        (sb.PromptPair(start.replace("Lily", "Tom").replace("girl", "boy"), start, "t", "e"),)
    )
    probe = sb.Probe(["happy", "wonderful"], ["sad", "angry"], "logodds")
    frame = audit_words(model, prompts, probe).set_index("word")
    assert (frame["n_tokens"] > 1).any()
    assert frame["read"].all()
    result = sb.run_probe(model, prompts, probe)
    column = [w.word for w in result.vocabulary.kept].index("wonderful")
    ids, tokens = model.encode(start), result.vocabulary.kept[column].tokens
    logp = model.hf(torch.tensor([ids + list(tokens)])).logits[0].log_softmax(-1)
    by_hand = sum(float(logp[len(ids) - 1 + j, t]) for j, t in enumerate(tokens))
    assert result.values_ai[0, column] == pytest.approx(by_hand, abs=1e-4)
    with pytest.raises(sb.RequestError, match="needs 1"):
        sb.run_probe(model, prompts, sb.Probe(["wonderful"], ["sad"]))
    first = sb.run_probe(model, prompts, probe.with_options(tokens="first", score="mean_logit"))
    assert all(w.single for w in first.vocabulary.kept)


# ── subjects ────────────────────────────────────────────────────────────────────────────────────────────────


def test_bonus_and_penalty_add_up_to_the_bias(make_tiny, full_pairs, probe, result):
    model = make_tiny("gemma3").model
    found = ask_decomposition(model, full_pairs, result).read(model)
    assert found.human_bonus.mean + found.ai_penalty.mean == pytest.approx(result.bias)
    frame = found.to_frame().set_index("subject")
    assert list(frame["kind"]) == ["human", "ai", "neutral", "neutral"]
    assert frame.loc["AI", "score"] == pytest.approx(result.score_ai.mean())
    assert np.allclose(frame["positive"] - frame["negative"], frame["score"])
    same = [p for p in full_pairs if p.entity == "person"]
    first = sb.run_probe(make_tiny("gemma3").model, same, probe)
    assert frame.loc["person", "score"] == pytest.approx(first.score_human.mean(), rel=1e-5), (
        "neutral prompts are read as pairs are"
    )
    assert found.plot().data


def test_no_neutral_subjects_no_decomposition(make_tiny, pairs, result):
    with pytest.raises(sb.RequestError, match="no neutral subjects"):
        ask_decomposition(make_tiny("gemma3").model, pairs, result)


def test_nuisances_are_counted_and_log_likelihood_is_the_models(make_tiny, result):
    import torch

    model = make_tiny("gemma3").model
    found = ask_nuisances(model, result).read(model)
    by_hand = []
    for text in (PAIRS[0][2], PAIRS[0][3]):
        ids = model.encode(text)
        logp = model.hf(torch.tensor([ids])).logits[0].log_softmax(-1)
        by_hand.append(sum(float(logp[i, t]) for i, t in enumerate(ids[1:])))
    row = found.frame.iloc[0]
    assert row["log_likelihood_human"] == pytest.approx(by_hand[0], rel=1e-4)
    assert row["log_likelihood_ai"] == pytest.approx(by_hand[1], rel=1e-4)
    assert (row["an_human"], row["an_ai"]) == (0, 1), "a human, an AI"
    assert np.isnan(found.adjusted.mean) == bool(found.adjusted.reason)


def test_nuisances_are_held_equal_for_the_figure_of_the_headline(make_tiny, full_pairs, probe):
    """The difference in differences of the pairs that have a twin, regressed on those pairs' own nuisances."""
    import statsmodels.api as sm

    model = make_tiny("gemma3").model
    result = sb.run_probe(model, full_pairs, probe.with_options(score="logodds"), controls=True)
    found = ask_nuisances(model, result).read(model)
    assert (found.of, found.primary.mean) == ("difference in differences", result.did.mean)
    assert found.frame["primary"].to_numpy() == pytest.approx(result.did.values)
    assert set(found.frame["template"]) == {"survive"}, "the only template with twins"
    varying = [c for c in found.frame if c.endswith("_diff") and found.frame[c].std() > 1e-12]
    if len(found.frame) > len(varying) + 1:
        fit = sm.OLS(found.frame["primary"], sm.add_constant(found.frame[varying])).fit()
        assert found.adjusted.mean == pytest.approx(fit.params["const"])


def test_the_adjusted_mean_is_the_ols_intercept_with_a_clustered_interval():
    import statsmodels.api as sm

    rng = np.random.default_rng(0)
    templates, entities = np.repeat(np.arange(20), 8), np.tile(np.arange(8), 20)
    x = rng.standard_normal((160, 2))
    y = 1.5 + x @ [0.7, -0.3] + rng.standard_normal(160) + rng.standard_normal(20)[templates]
    got = adjusted_mean(y, x, templates.tolist(), entities.tolist())
    fit = sm.OLS(y, sm.add_constant(x)).fit()
    assert got.mean == pytest.approx(fit.params[0])
    one_way = adjusted_mean(y, x, templates.tolist(), [str(i) for i in range(160)])
    cluster = fit.get_robustcov_results("cluster", groups=templates, use_correction=False)
    assert one_way.se == pytest.approx(cluster.bse[0] * np.sqrt(20 / 19), rel=1e-6)
    bare = adjusted_mean(y, np.zeros((160, 0)), templates.tolist(), entities.tolist())
    plain = clustered_mean(y, templates.tolist(), entities.tolist())
    for name in ("mean", "se", "df", "p_value", "ci_low", "ci_high"):
        assert getattr(bare, name) == pytest.approx(getattr(plain, name), rel=1e-12)


# ── all of them ─────────────────────────────────────────────────────────────────────────────────────────────


def test_sign_flips_and_effect_sizes_are_those_of_the_headline(make_tiny, full_pairs, probe):
    """Beside the interval of the difference in differences stand its own sign-flips, not the bias'."""
    every = replace(full_pairs, pairs=tuple(
        replace(p, **{f"control_{t}": getattr(p, t).replace(". This", ". Tea. This") for t in ("human", "ai")}) for p in full_pairs
    ))  # fmt: skip
    found = run_checks(make_tiny("gemma3").model, every, probe, n_random=19, n_boot=50)
    did = found.result.did
    rows = found.to_frame().set_index("check")
    for over, labels in (("templates", did.templates), ("entities", found.result.clusters[1])):
        row = rows.loc[f"sign-flip over {over}"]
        assert row["value"] == did.mean and "difference in differences" in row["says"]
        assert row["p_value"] == sign_flip(did.values, labels, over=over).p_value
    assert rows.loc["d_z over templates", "value"] == did.effect_sizes.d_z


def test_run_checks_lists_what_it_could_not_check(make_tiny, pairs, full_pairs, probe):
    model = make_tiny("gemma3").model
    everything = run_checks(model, full_pairs, probe, n_random=19, n_boot=50)
    named = set(everything.to_frame()["check"])
    assert {
        "bias",
        "sign-flip over templates",
        "difference in differences",
        "AI penalty",
        "random words",
    } <= named
    assert not everything.skipped or set(everything.skipped) <= {"nuisances", "forced choice"}
    few = run_checks(model, pairs, probe, n_random=19, n_boot=50)
    assert {"mundane control", "neutral subjects", "stems"} <= set(few.skipped)
    assert "not checked: stems" in repr(few)
