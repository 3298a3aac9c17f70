"""The chat form: the sentence in the user's turn, the stem prefilled in the model's, exactly one BOS."""

from __future__ import annotations

from dataclasses import replace

import pytest

import sae_bias as sb
from sae_bias.models.chat import CHAT_QUESTION, chat_pairs
from sae_bias.probe.words import word_tokens


@pytest.fixture(scope="module")
def stemmed(pairs):
    return replace(
        pairs, pairs=tuple(replace(p, stem="This is", control_human=p.human, control_ai=p.ai) for p in pairs)
    )


@pytest.mark.parametrize("name", ["gemma3", "gemma2", "gemma3_multimodal"])
def test_one_bos_user_question_and_prefilled_stem(make_tiny, stemmed, probe, name):
    model = make_tiny(name).model
    result = sb.run_probe(model, stemmed, probe, chat=True, controls=True)
    for pair in result.pairs:
        ids = model.encode(pair.ai)
        assert ids.count(model.tokenizer.bos_token_id) == 1
        assert ids[0] == model.tokenizer.bos_token_id
        assert pair.ai.endswith("<start_of_turn>model\nThis is")
    sentence = stemmed[0].ai.removesuffix(" This is")
    assert CHAT_QUESTION.replace("{sentence}", sentence) in result.pairs[0].ai
    assert result.control is not None
    assert result.control.bias == result.bias, "the controls are chats too"


def test_the_word_is_read_after_the_stem(make_tiny, stemmed, probe):
    model = make_tiny("gemma3").model
    prompt = chat_pairs(model, stemmed)[0].human
    ids = model.encode(prompt)
    assert ids[-1] == model.encode("x This is")[-1]
    plain = word_tokens(model, "brave", stemmed[0].human, model.encode(stemmed[0].human))
    assert word_tokens(model, "brave", prompt, ids) == plain


def test_no_template_no_chat(make_tiny, stemmed, probe):
    with pytest.raises(sb.RequestError, match="no chat template"):
        sb.run_probe(make_tiny("mistral").model, stemmed, probe, chat=True)


def test_the_stem_must_be_known(make_tiny, pairs, probe):
    with pytest.raises(sb.RequestError, match=r"stem=\."):
        sb.run_probe(make_tiny("gemma3").model, pairs, probe, chat=True)
    with pytest.raises(sb.RequestError, match=r"no \{sentence\}"):
        chat_pairs(make_tiny("gemma3").model, pairs, "How?")


def test_a_bos_in_the_template_stays_where_the_tokenizer_puts_none(make_tiny, stemmed, probe):
    """Exactly one BOS also where only the chat template knows it."""
    model = make_tiny("gemma3").fresh()
    model.tokenizer = make_tiny("gemma3").fresh().tokenizer
    model.tokenizer.add_bos_token = False
    if model.tokenizer("a").input_ids[0] == model.tokenizer.bos_token_id:
        pytest.skip("this tokenizer class always adds its BOS")
    ids = model.encode_chat([{"role": "user", "content": "hello"}], prefill="This is")
    assert ids.count(model.tokenizer.bos_token_id) == 1
