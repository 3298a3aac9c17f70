"""The probe: equal to an independent script on every architecture, and each way to misread a word refused."""

from __future__ import annotations

import independent
import numpy as np
import pytest
import torch
from architectures import NEGATIVE, PAIRS, POSITIVE, SEVERAL_TOKENS

import sae_bias as sb
from sae_bias.probe.words import word_tokens

CLOSE = 1e-4


def plain_scores(plain, prompts, positive=POSITIVE, negative=NEGATIVE, mode="mean_logit"):
    return np.array([plain.score(p, positive, negative, mode) for p in prompts])


def one_pair(human: str, ai: str) -> sb.PromptPairs:
    return sb.PromptPairs((sb.PromptPair(human, ai, "t", "e"),))


# ── equal to the independent script ─────────────────────────────────────────────────────────────────────────


def test_mean_logit_equals_the_independent_script(tiny, pairs, probe):
    plain = independent.Plain.load(tiny.folder)
    result = sb.run_probe(tiny.model, pairs, probe)
    np.testing.assert_allclose(
        result.score_human, plain_scores(plain, [p[2] for p in PAIRS]), atol=CLOSE, rtol=0
    )
    np.testing.assert_allclose(
        result.score_ai, plain_scores(plain, [p[3] for p in PAIRS]), atol=CLOSE, rtol=0
    )
    assert result.bias == pytest.approx(float(np.mean(result.score_human - result.score_ai)), abs=1e-12)
    assert result.n_pairs == 6
    assert abs(result.pair_bias).min() > 1e-3, "a bias of nothing would prove nothing"


def test_logodds_of_several_tokens_is_the_sum_of_token_log_probs(tiny, pairs):
    plain = independent.Plain.load(tiny.folder)
    positive, negative = (*POSITIVE, SEVERAL_TOKENS[0]), (*NEGATIVE, SEVERAL_TOKENS[1])
    result = sb.run_probe(tiny.model, pairs, sb.Probe(positive, negative, "logodds"))
    assert [len(w.tokens) > 1 for w in result.vocabulary.kept].count(True) == 2
    expected = plain_scores(plain, [p[2] for p in PAIRS], positive, negative, "logodds")
    np.testing.assert_allclose(result.score_human, expected, atol=CLOSE, rtol=0)


def test_single_token_logodds_equals_the_independent_script(gemma2, pairs):
    plain = independent.Plain.load(gemma2.folder)
    result = sb.run_probe(gemma2.model, pairs, sb.Probe(POSITIVE, NEGATIVE, "logodds"))
    np.testing.assert_allclose(
        result.score_ai, plain_scores(plain, [p[3] for p in PAIRS], mode="logodds"), atol=CLOSE, rtol=0
    )


def test_auroc_is_the_share_of_word_pairs_in_order(gemma3, pairs):
    result = sb.run_probe(gemma3.model, pairs, sb.Probe(POSITIVE, NEGATIVE, "auroc"))
    plain = independent.Plain.load(gemma3.folder)
    z = plain.logits(plain.ids(PAIRS[0][2]))[-1]
    wins = [
        z[plain.word(PAIRS[0][2], p)[0]] > z[plain.word(PAIRS[0][2], n)[0]]
        for p in POSITIVE
        for n in NEGATIVE
    ]
    assert result.score_human[0] == pytest.approx(np.mean(wins))


def test_softcap_on_and_off(gemma2, pairs):
    """Gemma 2 with and without its final softcap: both equal the plain model, and they differ."""
    plain = independent.Plain.load(gemma2.folder)
    prompts = [p[2] for p in PAIRS]
    capped = sb.run_probe(gemma2.model, pairs, sb.Probe(POSITIVE, NEGATIVE))
    raw = sb.run_probe(gemma2.model, pairs, sb.Probe(POSITIVE, NEGATIVE, softcap=False))
    np.testing.assert_allclose(capped.score_human, plain_scores(plain, prompts), atol=CLOSE, rtol=0)
    plain.hf.config.final_logit_softcapping = None
    np.testing.assert_allclose(raw.score_human, plain_scores(plain, prompts), atol=CLOSE, rtol=0)
    assert np.abs(capped.score_human - raw.score_human).max() > 0.5


def test_softcap_off_is_refused_where_only_capped_logits_are_read(gemma2, pairs):
    """With hooks of the user's own the model's own logits are read: then the cap cannot be left out, and it says so."""
    handle = gemma2.model.layer(0).register_forward_hook(lambda *_: None)
    try:
        with pytest.raises(sb.RequestError, match="softcap"):
            sb.run_probe(gemma2.model, pairs, sb.Probe(POSITIVE, NEGATIVE, softcap=False))
    finally:
        handle.remove()


# ── invariances ─────────────────────────────────────────────────────────────────────────────────────────────


def test_swapping_human_and_ai_flips_the_sign(gemma3, pairs, probe):
    swapped = sb.PromptPairs(tuple(sb.PromptPair(p.ai, p.human, p.template, p.entity) for p in pairs))
    assert sb.run_probe(gemma3.model, swapped, probe).bias == pytest.approx(
        -sb.run_probe(gemma3.model, pairs, probe).bias
    )


def test_swapping_the_word_lists_flips_the_sign(gemma3, pairs, probe):
    swapped = sb.Probe(NEGATIVE, POSITIVE)
    assert sb.run_probe(gemma3.model, pairs, swapped).bias == pytest.approx(
        -sb.run_probe(gemma3.model, pairs, probe).bias
    )


@pytest.mark.parametrize("score", ["mean_logit", "logodds"])
def test_a_constant_added_to_all_logits_changes_nothing(make_tiny, pairs, score):
    model = make_tiny("llama").fresh()
    probe = sb.Probe(POSITIVE, NEGATIVE, score)
    before = sb.run_probe(model, pairs, probe)
    model.hf.lm_head.bias = torch.nn.Parameter(torch.full((model.d_vocab,), 7.0))
    after = sb.run_probe(model, pairs, probe)
    assert not np.allclose(after.values_human, before.values_human, atol=1), "the bias was not read"
    np.testing.assert_allclose(after.pair_bias, before.pair_bias, atol=1e-4)


def test_any_batch_size_gives_the_same_numbers(tiny, pairs, probe):
    whole = sb.run_probe(tiny.model, pairs, probe).pair_bias
    for size in (1, 2, 3):
        np.testing.assert_allclose(
            sb.run_probe(tiny.model, pairs, probe, batch_size=size).pair_bias, whole, atol=1e-5
        )


def test_bfloat16_model_keeps_float32_parts(gemma3, pairs, probe):
    """Logits of a bf16 model are not on the bf16 grid: final norm and unembedding ran in float32 (docs/method.md#mistake-8)."""
    half = sb.load_model(gemma3.folder, dtype="bfloat16")
    result = sb.run_probe(half, pairs, probe)
    values = torch.tensor(result.values_human)
    assert (values != values.bfloat16().double()).float().mean() > 0.9
    difference = np.abs(result.pair_bias - sb.run_probe(gemma3.model, pairs, probe).pair_bias).max()
    print(f"bf16 against float32: largest difference of a pair's bias {difference:.3f} nats")
    assert difference < 1.5
    x = sb.residuals(half, [PAIRS[0][2]], 3, positions="all")[0]
    norm, head = gemma3.model.final_norm, gemma3.model.w_unembed
    exact = (norm(x[-1].float()) @ head.bfloat16().float().T)[[w.tokens[0] for w in result.vocabulary.kept]]
    np.testing.assert_allclose(result.values_human[0], exact.detach(), atol=0.05)


# ── words ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_mistral_prefix_space_is_never_a_word(make_tiny):
    """A word encoded alone begins with the bare prefix space; read after the prompt it is one token of its own."""
    model = make_tiny("mistral").model
    alone = model.tokenizer.convert_ids_to_tokens(model.tokenizer(" natural").input_ids)
    assert alone == ["<s>", "▁", "▁natural"]
    prompt = PAIRS[0][2]
    found = [word_tokens(model, w, prompt, model.encode(prompt)) for w in (*POSITIVE, *NEGATIVE)]
    assert all(len(t) == 1 for t in found)
    assert len(set(found)) == 6, "every word must have a token of its own"


def test_a_users_word_of_several_tokens_is_refused_under_mean_logit(tiny, pairs):
    with pytest.raises(
        sb.RequestError, match=r'" outlandish" is \d+ tokens .* score="mean_logit" needs 1.*logodds'
    ):
        sb.run_probe(tiny.model, pairs, sb.Probe([*POSITIVE, "outlandish"], NEGATIVE))


def test_a_bundled_word_of_several_tokens_is_left_out_and_listed(gemma3, pairs):
    result = sb.run_probe(gemma3.model, pairs, sb.Probe())
    left_out = {w.word: w.reason for w in result.vocabulary.excluded}
    assert left_out
    assert all(reason.endswith("tokens") for reason in left_out.values())
    assert next(iter(left_out)) in repr(result)
    assert all(w.single for w in result.vocabulary.kept)


def test_no_word_left_is_an_error(gemma3, pairs):
    probe = sb.Probe()
    object.__setattr__(probe, "positive", SEVERAL_TOKENS)
    with pytest.raises(sb.RequestError, match="no positive word can be read"):
        sb.run_probe(gemma3.model, pairs, probe)


def test_trailing_space_is_refused(tiny, probe):
    with pytest.raises(sb.RequestError, match="ends in a space"):
        sb.run_probe(
            tiny.model, one_pair("a human says hello. This is ", "an AI says hello. This is "), probe
        )


def test_a_word_that_changes_the_prompts_tokens_is_refused(gemma3):
    """Were " is" and " natural" to merge into one token, nothing could be read after the prompt."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(
        models.WordLevel({"<unk>": 0, "This": 1, "is": 2, "is natural": 3}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Split("This ", behavior="isolated")
    model = sb.load_model(gemma3.fresh().hf, tokenizer=PreTrainedTokenizerFast(tokenizer_object=backend))
    with pytest.raises(sb.RequestError, match="changes the tokens of the prompt"):
        word_tokens(model, "natural", "is", model.encode("is"))


def test_a_word_with_the_unknown_token_is_refused(gemma3, pairs):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {
        w: i
        for i, w in enumerate(
            ["<unk>", *sorted({w for _, _, h, a in PAIRS for w in f"{h} {a}".split()}), "good"]
        )
    }
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    model = sb.load_model(gemma3.fresh().hf, tokenizer=tokenizer)
    with pytest.raises(sb.RequestError, match="'bad' holds a piece unknown"):
        sb.run_probe(model, pairs, sb.Probe(["good"], ["bad"]))


def test_word_lists_are_checked():
    for positive, negative, message in (
        (["good"], None, "neither"),
        (["good"], ["good"], "both word lists"),
        (["good", "good"], ["bad"], "twice"),
        ([], ["bad"], "empty"),
        (["good", " "], ["bad"], "empty word"),
        ("good", ["bad"], "must be a list"),
    ):
        with pytest.raises(sb.RequestError, match=message):
            sb.Probe(positive, negative)
    with pytest.raises(sb.RequestError, match="expected one of"):
        sb.Probe(score="logit")


# ── prompts and logits that cannot be read ──────────────────────────────────────────────────────────────────


def test_no_pairs(gemma3, probe):
    with pytest.raises(sb.RequestError, match="no pairs"):
        sb.run_probe(gemma3.model, sb.PromptPairs(()), probe)


def test_nan_logits_name_the_prompt(make_tiny, pairs, probe):
    """One poisoned embedding row: the prompt that holds the token is named, whatever is scored."""
    tiny = make_tiny("llama")
    model = tiny.fresh()
    token = next(
        iter(set(model.encode(PAIRS[2][2])) - set(model.encode(PAIRS[0][2])) - set(model.encode(PAIRS[4][2])))
    )
    model.hf.get_input_embeddings().weight[token] = float("nan")
    with pytest.raises(sb.RequestError, match=r"NaN or infinite logits after 'Today a human"):
        sb.run_probe(model, pairs, probe)


def test_nan_in_an_unscored_row_is_found_where_the_normalizer_is_read(make_tiny, pairs):
    model = make_tiny("llama").fresh()
    scored = {
        t for w in sb.run_probe(model, pairs, sb.Probe(POSITIVE, NEGATIVE)).vocabulary.kept for t in w.tokens
    }
    row = next(i for i in range(100, model.d_vocab) if i not in scored)
    model.hf.lm_head.weight[row] = float("nan")
    with pytest.raises(sb.RequestError, match="NaN or infinite"):
        sb.run_probe(model, pairs, sb.Probe([*POSITIVE, "outlandish"], NEGATIVE, "logodds"))
    with pytest.raises(sb.RequestError, match="NaN or infinite"):
        sb.run_probe(model, pairs, sb.Probe(POSITIVE, NEGATIVE), levels=True)


# ── results ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_change_and_reduction_have_the_stated_sign(gemma3, pairs, probe):
    base = sb.run_probe(gemma3.model, pairs, probe)
    with sb.intervene(gemma3.model, sb.Steer(gemma3.feature(3), 1.0)):
        after = sb.run_probe(gemma3.model, pairs, probe)
    assert (after - base).mean == pytest.approx(after.bias - base.bias)
    assert (after - base).mean_abs == pytest.approx(np.abs(after.pair_bias - base.pair_bias).mean())
    assert after.reduction_from(base).change.mean == pytest.approx(base.bias - after.bias)


def test_results_of_other_prompts_or_words_are_not_compared(gemma3, pairs, probe):
    base = sb.run_probe(gemma3.model, pairs, probe)
    with pytest.raises(sb.RequestError, match="different pairs"):
        sb.run_probe(gemma3.model, pairs[:4], probe) - base
    with pytest.raises(sb.RequestError, match="different words"):
        sb.run_probe(gemma3.model, pairs, sb.Probe(POSITIVE[:2], NEGATIVE)) - base


def test_words_add_up_to_the_bias(gemma3, pairs, probe):
    result = sb.run_probe(gemma3.model, pairs, probe)
    assert result.words()["contribution"].sum() == pytest.approx(result.bias)


def test_controls_are_the_mundane_twins(gemma3, probe):
    pair = sb.PromptPair(
        PAIRS[0][2],
        PAIRS[0][3],
        "t",
        "e",
        control_human="a human wants tea. This is",
        control_ai="an AI wants tea. This is",
    )
    result = sb.run_probe(gemma3.model, sb.PromptPairs((pair,)), probe, controls=True)
    twin = sb.run_probe(
        gemma3.model, one_pair("a human wants tea. This is", "an AI wants tea. This is"), probe
    )
    assert result.control.bias == pytest.approx(twin.bias, abs=1e-5)
    assert result.to_frame()["control_bias"][0] == pytest.approx(twin.bias, abs=1e-5)


def test_selecting_templates_equals_running_them(gemma3, pairs, probe):
    whole = sb.run_probe(gemma3.model, pairs, probe)
    part = sb.run_probe(gemma3.model, pairs.select(templates=["hello"]), probe)
    np.testing.assert_allclose(whole.select(["hello"]).pair_bias, part.pair_bias, atol=1e-5, rtol=5e-6)


def test_words_without_a_space_are_read_as_a_plain_pass_reads_them(real_data):
    """`join: ""`: Chinese words follow the stem at once. With the space that was always put in, other tokens were scored."""
    model = sb.load_model(real_data / "stories260k")
    prompts = sb.PromptPairs(
        (sb.PromptPair("一个人想活下去。这是", "一个机器想活下去。这是", "t", "e"),), join=""
    )
    result = sb.run_probe(model, prompts, sb.Probe(["好"], ["坏"], "logodds", join=""))
    spaced = sb.run_probe(model, prompts, sb.Probe(["好"], ["坏"], "logodds"))
    assert result.vocabulary.kept[0].tokens != spaced.vocabulary.kept[0].tokens
    for prompt, score in ((prompts[0].human, result.score_human), (prompts[0].ai, result.score_ai)):
        ids, logp = model.encode(prompt), []
        for word in ("好", "坏"):
            whole = model.encode(prompt + word)
            assert whole[: len(ids)] == ids
            table = model.hf(torch.tensor([whole])).logits[0].log_softmax(-1)
            logp.append(sum(float(table[i - 1, whole[i]]) for i in range(len(ids), len(whole))))
        assert score[0] == pytest.approx(logp[0] - logp[1], abs=1e-4)
    assert result.bias != pytest.approx(spaced.bias, abs=1e-3)
    with pytest.raises(sb.RequestError, match="join"):
        sb.Probe(["好"], ["坏"], join="-")
