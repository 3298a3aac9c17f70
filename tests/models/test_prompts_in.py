"""From text to token ids: chat templates, tokenizers of every habit, and the model object that the caller goes on using."""

from __future__ import annotations

import datetime
import warnings

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, PAIRS, qwen2_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import sae_bias as sb
from sae_bias.models.chat import opening_ids, takes_system

TURNS = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
USER = [{"role": "user", "content": "a human says hello."}]
SYSTEM = [{"role": "system", "content": "Answer in one word."}, *USER]


@pytest.fixture
def qwen(make_tiny):
    """A model whose tokenizer and template are the test's own."""
    return make_tiny("qwen2").fresh()


def with_template(model, template):
    model.tokenizer.chat_template = template
    return model


# ── BOS and EOS ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_bos_that_also_opens_turns_is_no_error(qwen):
    """SmolLM2: bos_token is <|im_start|>, which opens every turn; only a doubled leading BOS is an error."""
    qwen.tokenizer.add_special_tokens({"bos_token": "<|im_start|>"})
    with_template(qwen, TURNS)
    ids = qwen.encode_chat(SYSTEM)
    assert ids == qwen.tokenizer(qwen.tokenizer.apply_chat_template(SYSTEM, tokenize=False, add_generation_prompt=True)).input_ids  # fmt: skip
    assert ids.count(qwen.tokenizer.bos_token_id) == 3
    with pytest.raises(sb.RequestError, match="begins with 2 BOS"):
        qwen.encode("<|im_start|><|im_start|>user")


def eos_appending():
    """Byte-level tokens with an EOS put after every text, as some Llama and T5 tokenizers do."""
    tokenizer = qwen2_tokenizer()
    eos = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", eos)]
    )
    return tokenizer


def test_an_eos_the_tokenizer_appends_is_left_out_and_said_once(qwen, pairs, probe):
    plain = [qwen.encode(p.ai) for p in pairs]
    model = sb.load_model(qwen.hf, tokenizer=eos_appending())
    assert model.tokenizer(pairs[0].ai).input_ids[-1] == model.tokenizer.eos_token_id
    with pytest.warns(UserWarning, match="appends <|endoftext|>"):
        assert model.encode(pairs[0].ai) == plain[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [model.encode(p.ai) for p in pairs] == plain
    assert sb.run_probe(model, pairs, probe).bias == sb.run_probe(qwen, pairs, probe).bias
    written = model.encode(pairs[0].ai + "<|endoftext|>")
    assert written[-1] == model.tokenizer.eos_token_id, "one the user wrote stays"


def test_a_lone_leading_bos_that_is_also_eos_stays(make_tiny):
    """OPT: `</s>` is BOS and EOS, and stands in front."""
    model = make_tiny("opt").model
    ids = model.encode("An AI")
    assert ids == model.tokenizer("An AI").input_ids
    assert ids[0] == model.tokenizer.eos_token_id


@pytest.mark.parametrize("where", ["config", "generation_config", "tokenizer", "turn"])
def test_generation_stops_at_every_end_there_is(qwen, where):
    """The model always writes token 7 next; whoever calls it an end is heard."""
    end = 7
    with torch.no_grad():
        qwen.hf.lm_head.weight = torch.nn.Parameter(torch.zeros_like(qwen.hf.lm_head.weight))
        bias = torch.nn.Parameter(torch.eye(512)[end] * 9, requires_grad=False)
        qwen.hf.lm_head.bias = bias
    qwen.hf.config.eos_token_id = qwen.hf.generation_config.eos_token_id = 0
    if where == "config":
        qwen.hf.config.eos_token_id = [0, end]
    elif where == "generation_config":
        qwen.hf.generation_config.eos_token_id = end
    else:
        word = qwen.tokenizer.convert_ids_to_tokens(end)
        qwen.tokenizer.add_special_tokens({"additional_special_tokens": [word]})
        if where == "tokenizer":
            qwen.tokenizer.eos_token = word
        else:
            with_template(qwen, TURNS.replace("<|im_end|>", word))
    (made,) = sb.generate(qwen, ["An AI says"], max_new_tokens=4)
    assert (made.ended, made.tokens) == (True, ())


# ── templates ───────────────────────────────────────────────────────────────────────────────────────────────

DROPS_SYSTEM = "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ONLY_LISTS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}{{ part.text }}{% endfor %}<|im_end|>\n{% endfor %}"


def test_a_template_that_leaves_something_out_is_refused(qwen):
    with pytest.raises(sb.RequestError, match="leaves out what the user says"):
        with_template(qwen, ONLY_LISTS).encode_chat(USER)
    with pytest.raises(sb.RequestError, match="leaves out what the system says"):
        with_template(qwen, DROPS_SYSTEM).encode_chat(SYSTEM)


def test_a_system_prompt_that_the_template_drops_opens_the_users_turn(qwen):
    """`x` occurs in many a template; what is looked for is a sentence."""
    with_template(qwen, "extra " + DROPS_SYSTEM)
    assert not takes_system(qwen)
    text = qwen.tokenizer.decode(
        opening_ids(qwen, "a human says hello.", chat=True, system="Answer in one word.")
    )
    assert "Answer in one word.\n\na human says hello." in text
    assert takes_system(with_template(qwen, TURNS))


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no') }}",
        "{% for %}",
        "{{ 1 / 0 }}",
        "{{ messages[7].content }}",
        "{{ nothing.at.all }}",
    ],
)
def test_a_broken_template_is_one_plain_line(qwen, template):
    with pytest.raises(sb.RequestError, match=r"chat template of") as error:
        with_template(qwen, template).encode_chat(USER)
    assert "\n" not in str(error.value)


def test_of_templates_with_several_names_one_is_named(qwen):
    with_template(qwen, {"plain": TURNS, "tools": "T" + TURNS})
    with pytest.raises(sb.RequestError, match=r"'plain', 'tools'"):
        qwen.encode_chat(USER)
    qwen.template_arguments = {"chat_template": "tools"}
    assert qwen.chat_text(USER) == "T" + qwen_text(USER)


def qwen_text(messages):
    body = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    return body + "<|im_start|>assistant\n"


def test_template_arguments_reach_the_template(qwen):
    template = TURNS + "{% if not enable_thinking | default(true) %}<think></think>{% endif %}"
    model = sb.load_model(qwen.hf, tokenizer=qwen.tokenizer, template_arguments={"enable_thinking": False})
    with_template(model, template)
    assert model.chat_text(USER) == qwen_text(USER) + "<think></think>"
    assert model.chat_facts() == {"arguments": {"enable_thinking": False}}


def test_a_date_in_the_prompt_is_said_and_stays(qwen, tmp_path):
    with_template(qwen, "{{ strftime_now('%d %b %Y') }} " + TURNS)
    qwen.chat_day = datetime.date(2024, 7, 26)
    with pytest.warns(UserWarning, match="2024-07-26"):
        assert qwen.chat_text(USER) == "26 Jul 2024 " + qwen_text(USER)
    from sae_bias.runs.manifest import manifest

    assert manifest(qwen)["model"]["chat"] == {"date": "2024-07-26"}


# ── tokenizers and model objects ────────────────────────────────────────────────────────────────────────────


def test_a_word_level_tokenizer_without_english_words_is_taken(qwen):
    """Its own words are what counts; a prompt of which it knows none is refused."""
    vocab = {w: i for i, w in enumerate(["[UNK]", "人类", "机器", "想要", "生存"])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    model = sb.load_model(qwen.source, tokenizer=tokenizer)
    assert model.encode("人类 想要 生存") == [1, 3, 4]
    with pytest.raises(sb.RequestError, match="knows no word"):
        model.encode("He says yes.")


def test_a_word_level_tokenizer_without_an_unknown_token_is_taken(qwen):
    """Its check was an English sentence, of which the library itself raises; the user's own words are what is read."""
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["[PAD]", "人类", "想要", "生存"])}))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    model = sb.load_model(qwen.source, tokenizer=tokenizer)
    assert model.encode("人类 想要 生存") == [1, 2, 3]
    with pytest.raises(sb.RequestError, match="cannot read the prompt"):
        model.encode("He says yes.")


def test_ids_beyond_the_embedding_are_refused(qwen):
    qwen.tokenizer.add_tokens([f"beyond{i}" for i in range(200)])
    with pytest.raises(sb.RequestError, match="embeds only 512"):
        qwen.encode("An AI beyond199")


def test_a_string_is_a_tokenizer(make_tiny):
    tiny = make_tiny("llama")
    model = sb.load_model(tiny.fresh().hf, tokenizer=str(tiny.folder))
    assert model.encode(PAIRS[0][2]) == tiny.model.encode(PAIRS[0][2])


def test_a_model_without_a_head_is_named(make_tiny):
    tiny = make_tiny("gpt2")
    headless = transformers.GPT2Model.from_pretrained(tiny.folder)
    with pytest.raises(sb.RequestError, match="no language-model head"):
        sb.load_model(headless, tokenizer=tiny.model.tokenizer)


def test_the_callers_model_is_given_back_as_it_came():
    hf = ARCHITECTURES["llama"].make().train()
    hf.lm_head.requires_grad_(False)
    trained = {n for n, p in hf.named_parameters() if p.requires_grad}
    with pytest.warns(UserWarning, match=r"model\.release\(\)"):
        model = sb.load_model(hf, tokenizer=qwen2_tokenizer())
    assert not hf.training
    direction = sb.Direction("first", sb.Site(1), torch.eye(1, model.d_model))
    with sb.intervene(model, sb.ProjectOut(direction)):
        model.hf(input_ids=torch.tensor([model.encode("An AI says")]))
        assert not hf.training
        assert not any(p.requires_grad for p in hf.parameters())
    model.release()
    assert hf.training
    assert {n for n, p in hf.named_parameters() if p.requires_grad} == trained


def test_apple_devices_elsewhere_are_one_short_line(make_tiny):
    if torch.backends.mps.is_available():
        pytest.skip("this is a Mac")
    with pytest.raises(sb.RequestError) as error:
        sb.load_model(make_tiny("llama").folder, device="mps")
    assert len(str(error.value)) < 120
