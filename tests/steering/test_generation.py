"""Generation: the greedy text of an independent loop, with and without a KV cache, at every position an edit can name."""

from __future__ import annotations

import independent
import pytest
import torch
from architectures import PAIRS
from passes import layer_tokens

import sae_bias as sb

F, LAYER, N_NEW = 3, 1, 6
PROMPTS = [PAIRS[0][2], PAIRS[2][3], PAIRS[4][3]]


def greedy(plain, prompt, edit, mode, n_new=N_NEW):
    """Tokens of a loop that recomputes everything, the edit at the positions `mode` names."""
    ids = plain.ids(prompt)
    start, end = len(ids), plain.hf.generation_config.eos_token_id
    while len(ids) < start + n_new:
        inside = {
            "all": lambda i: True,
            "last": lambda i: i == start - 1,
            "prompt": lambda i: i < start,
            "generated": lambda i: i >= start,
        }
        z = plain.logits(ids, edit, LAYER, [inside[mode](i) for i in range(len(ids))])[-1]
        ids.append(int(z.argmax()))
        if ids[-1] == end:
            return tuple(ids[start:-1])
    return tuple(ids[start:])


@pytest.mark.parametrize("mode", ["all", "last", "prompt", "generated"])
def test_greedy_tokens_with_and_without_cache_equal_the_independent_loop(tiny, mode):
    """Steering goes on after the prompt, includes the prompt's last token, and stops where it should (docs/method.md#mistake-7)."""
    plain = independent.Plain.load(tiny.folder)
    delta = independent.PlainSae.load(tiny.sae_folder).steer(F, 4.0)
    edit = sb.Steer(tiny.feature(F), 4.0, positions=mode)
    expected = [greedy(plain, p, delta, mode) for p in PROMPTS]
    for use_cache in (True, False):
        found = sb.generate(
            tiny.model, PROMPTS, interventions=[edit], max_new_tokens=N_NEW, use_cache=use_cache
        )
        assert [c.tokens for c in found] == expected, f"use_cache={use_cache}"


@pytest.mark.parametrize("mode", ["all", "last", "prompt", "generated"])
def test_what_prompts_begin_with_is_computed_once(tiny, mode):
    """Samples of one prompt, and prompts behind one opening: the tokens of each alone, and one pass of what they share."""
    edit = sb.Steer(tiny.feature(F), 4.0, positions=mode)
    ids = tiny.model.encode(PROMPTS[0])
    with layer_tokens(tiny.model) as count:
        samples = sb.generate(tiny.model, [PROMPTS[0]] * 4, interventions=[edit], max_new_tokens=N_NEW)
    (alone,) = sb.generate(tiny.model, PROMPTS[:1], interventions=[edit], max_new_tokens=N_NEW)
    assert [c.tokens for c in samples] == [alone.tokens] * 4
    if tiny.model.arch.packs(tiny.model.config):  # a state that is carried along is not shared
        assert count.tokens <= len(ids) - 1 + 4 * N_NEW
    behind = [f"{PROMPTS[0]} {last}" for last in ("natural", "wrong")]
    assert len({len(tiny.model.encode(p)) for p in behind}) == 1
    together = sb.generate(tiny.model, behind, interventions=[edit], max_new_tokens=N_NEW)
    apart = [sb.generate(tiny.model, [p], interventions=[edit], max_new_tokens=N_NEW)[0] for p in behind]
    assert [c.tokens for c in together] == [c.tokens for c in apart]


def test_steering_changes_the_text(tiny):
    plain = sb.generate(tiny.model, PROMPTS, max_new_tokens=N_NEW)
    steered = sb.generate(
        tiny.model, PROMPTS, interventions=[sb.Steer(tiny.feature(F), 4.0)], max_new_tokens=N_NEW
    )
    assert [c.tokens for c in plain] != [c.tokens for c in steered]
    assert plain[0].interventions == ()
    assert steered[0].interventions[0].startswith("steer")


def test_edits_at_generated_positions_leave_the_first_token(gemma3):
    """The first new token is read at the prompt's last position, which is not a generated one."""
    plain = sb.generate(gemma3.model, PROMPTS, max_new_tokens=4)
    edit = sb.Steer(gemma3.feature(F), 40.0, positions="generated")
    steered = sb.generate(gemma3.model, PROMPTS, interventions=[edit], max_new_tokens=4)
    assert [c.tokens[0] for c in plain] == [c.tokens[0] for c in steered]
    assert [c.tokens for c in plain] != [c.tokens for c in steered]


def test_the_models_own_generate_follows_the_same_contract(gemma3):
    """`model.hf.generate` and left-padded batches inside a block: prefill, then one token at a time."""
    model = gemma3.model
    ids = [model.encode(p) for p in PROMPTS]
    width = max(map(len, ids))
    pad = model.tokenizer.pad_token_id
    batch = torch.tensor([[pad] * (width - len(i)) + i for i in ids])
    mask = (batch != pad).long()
    for mode in ("all", "last", "prompt", "generated"):
        edit = sb.Steer(gemma3.feature(F), 4.0, positions=mode)
        expected = [c.tokens for c in sb.generate(model, PROMPTS, interventions=[edit], max_new_tokens=N_NEW)]
        with sb.intervene(model, edit):
            out = model.hf.generate(
                input_ids=batch, attention_mask=mask, max_new_tokens=N_NEW, do_sample=False
            )
        for row, tokens in zip(out[:, width:].tolist(), expected):
            assert tuple(row[: len(tokens)]) == tokens, mode


def test_a_checkpoints_own_sampling_settings_do_not_leak_in(gemma3):
    """Qwen's generation_config carries a repetition penalty; greedy means greedy."""
    model = gemma3.fresh()
    before = [c.tokens for c in sb.generate(model, PROMPTS, max_new_tokens=12)]
    own = model.hf.generation_config
    own.repetition_penalty, own.no_repeat_ngram_size, own.min_new_tokens = 5.0, 1, 12
    assert [c.tokens for c in sb.generate(model, PROMPTS, max_new_tokens=12)] == before
    assert model.hf.generation_config is own


def test_sampling_is_decided_by_the_seed(gemma3):
    model = gemma3.model
    state = torch.random.get_rng_state()
    one, again, other = (
        [c.tokens for c in sb.generate(model, PROMPTS, temperature=2.0, seed=s, max_new_tokens=8)]
        for s in (1, 1, 2)
    )
    assert one == again
    assert one != other
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's random state is left alone"


def test_any_batch_size_gives_the_same_greedy_text(gemma3):
    prompts = [p[2] for p in PAIRS]
    texts = [
        [c.tokens for c in sb.generate(gemma3.model, prompts, batch_size=b, max_new_tokens=5)]
        for b in (1, 16)
    ]
    assert texts[0] == texts[1]


def test_chat_puts_the_prompt_in_a_user_turn(gemma3):
    (chat,) = sb.generate(gemma3.model, ["a human says hello."], chat=True, max_new_tokens=4)
    ids = gemma3.model.encode_chat([{"role": "user", "content": "a human says hello."}])
    out = gemma3.model.hf.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False)[
        0, len(ids) :
    ].tolist()
    assert tuple(out[: len(chat.tokens)]) == chat.tokens
    assert chat.prompt == "a human says hello."


def test_the_end_of_sequence_token_ends_the_text(make_tiny):
    model = make_tiny("llama").fresh()
    first = sb.generate(model, PROMPTS[:1], max_new_tokens=5)[0]
    model.hf.generation_config.eos_token_id = first.tokens[2]
    short = sb.generate(model, PROMPTS[:1], max_new_tokens=5)[0]
    assert short.ended
    assert short.tokens == first.tokens[: first.tokens.index(first.tokens[2])]
    assert not first.ended


def test_wrong_requests_are_refused(gemma3):
    for call, message in (
        (lambda: sb.generate(gemma3.model, PROMPTS[0]), "list of prompts"),
        (lambda: sb.generate(gemma3.model, PROMPTS, max_new_tokens=0), "at least 1"),
        (lambda: sb.generate(gemma3.model, PROMPTS, temperature=-1), "at least 0"),
        (lambda: sb.generate(gemma3.model, [""]), "special tokens only"),
        (
            lambda: sb.generate(
                gemma3.model, PROMPTS, interventions=[sb.Ablate(gemma3.feature(F), positions="subject")]
            ),
            "known subject",
        ),
    ):
        with pytest.raises(sb.RequestError, match=message):
            call()
    assert gemma3.model._edits is None
