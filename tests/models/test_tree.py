"""One tree of prefixes, each computed once: the numbers of one sequence at a time, on every architecture.

Logits here are tens, and the random weights make rounding grow to some 1e-4; a token too many or too few in sight moves them by 1e-1.
"""

from __future__ import annotations

import functools
from collections import Counter

import numpy as np
import pytest
import torch
import transformers
from architectures import ARCHITECTURES as TINY
from architectures import D_MODEL, VOCAB, qwen2_tokenizer, randomise
from passes import layer_tokens
from test_architectures import OTHERS

import sae_bias as sb
from sae_bias.models.architectures import ARCHITECTURES as RECORDS
from sae_bias.models.forward import Kept, forward_with_grad
from sae_bias.models.reads import Reads, knowing
from sae_bias.models.tree import Packed, Tree, packs, passes_of
from sae_bias.steering.intervention import Intervention, register_edit

pytestmark = pytest.mark.filterwarnings("ignore:.*is used in place")
CLOSE = 1e-3
PLAIN = {"qwen3_5", "qwen3_5_moe", "falcon_alibi"}
"""Run as they are: a state that is carried along, positions read off the mask."""
WINDOWED = {
    "mixtral": {"sliding_window": 6},
    "qwen3_moe": {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 0},
    "starcoder2": {"sliding_window": 6},
    "smollm3": {"sliding_window": 6, "use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"] * 2},
}  # fmt: skip


@functools.cache
def model_of(name: str):
    """Shared: a test leaves it as it found it."""
    if name in TINY:
        return sb.load_model(TINY[name].make(), tokenizer=TINY[name].tokenizer())
    stem, options = OTHERS[name]
    config = getattr(transformers, f"{stem}TextConfig", None) or getattr(transformers, f"{stem}Config")
    options = options | WINDOWED.get(name, {})
    hf = randomise(getattr(transformers, f"{stem}ForCausalLM")(config(**options)))
    return sb.load_model(hf, tokenizer=qwen2_tokenizer())


def sequences(seed: int = 0) -> list[list[int]]:
    """Seventeen sequences of three stems, longer than every window here; one is the beginning of another, one stands twice."""
    rng = np.random.default_rng(seed)
    draw = lambda n: rng.integers(10, VOCAB, n).tolist()  # noqa: E731
    out = []
    for stem in (draw(9), draw(5), draw(1)):
        middle = stem + draw(4)
        out += [middle + draw(k) for k in (1, 2, 5, 5)]
        out.append(stem + draw(3))
    return [*out, out[0][:6], out[3]]


def distinct(given: list[list[int]]) -> int:
    return len({tuple(s[: k + 1]) for s in given for k in range(len(s))})


def plain_logits(model, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model.hf(input_ids=torch.tensor([ids])).logits[0].float()


def read(model, given, positions=None, **options):
    """Logits at the wanted positions, by sequence, and what was run."""
    reads = Reads(model, given, positions, **options)
    found, handed = {}, []
    for numbers, final in reads.run():
        found |= dict(zip(numbers, final.logits()[:, 0]))
        handed += numbers
    assert sorted(handed) == list(range(reads.n)), (
        "each result once: readers that add up would count it twice"
    )
    return [torch.stack([found[n] for n in slots]) for slots in reads.slots], reads


@pytest.mark.parametrize("name", [*TINY, *OTHERS])
def test_each_position_is_that_of_its_sequence_alone(name, monkeypatch):
    monkeypatch.setattr("sae_bias.models.tree.price_of", lambda model: 0.0)
    model, given = model_of(name), sequences()
    assert packs(model) == (name not in PLAIN)
    positions = [sorted({0, len(s) // 2, len(s) - 1}) for s in given]
    with layer_tokens(model) as count:
        found, reads = read(model, given, positions)
    assert count.tokens == reads.n_tokens
    if name in PLAIN:
        assert reads.n_tokens == sum(map(len, given))
    else:
        assert reads.n_tokens == distinct(given)
    for s, at, z in zip(given, positions, found):
        torch.testing.assert_close(z, plain_logits(model, s)[at], atol=CLOSE, rtol=0)


def test_every_record_that_names_its_masks_is_checked_above():
    checked = {m for name in [*TINY, *OTHERS] if name not in PLAIN for m in model_of(name).arch.model_types}
    assert {m for record in RECORDS if record.masks for m in record.model_types} <= checked


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "mistral", "opt", "gpt2"])
@pytest.mark.parametrize("at", ["all", "last", "subject", "prompt", "generated"])
def test_edits_act_where_they_would_on_each_sequence_alone(name, at):
    """Ends and subjects differ between sequences that begin alike; the receipt counts sequences, not shared tokens."""
    model, given = model_of(name), sequences()
    ends = [max(1, len(s) - 2 * (i % 2)) for i, s in enumerate(given)]
    starts = [min(2 + i % 2, len(s) - 1) for i, s in enumerate(given)]
    along = torch.randn(1, D_MODEL, generator=torch.Generator().manual_seed(1)) * 4
    edit = sb.Steer(sb.Direction("d", sb.Site(1), along), 1.0, positions=at)
    with sb.intervene(model, edit) as receipt:
        found, reads = read(model, given, [range(len(s)) for s in given], ends=ends, starts=starts)
    assert reads.n_tokens < sum(map(len, given))
    seen = 0
    for s, end, start, z in zip(given, ends, starts, found):
        place = torch.arange(len(s))
        acts = {"all": place >= 0, "last": place == end - 1, "subject": place >= start, "prompt": place < end, "generated": place >= end}[at]  # fmt: skip
        acts = acts & torch.tensor([i not in model.special_ids for i in s])
        seen += int(acts.sum())

        def hook(module, args, output, acts=acts):
            x = output[0] if isinstance(output, tuple) else output
            return x + along * acts[None, :, None]

        handle = model.layer(1).register_forward_hook(hook)
        own = plain_logits(model, s)
        handle.remove()
        torch.testing.assert_close(z, own, atol=CLOSE, rtol=0)
    assert receipt.edits[0].positions_changed == receipt.edits[0].positions_seen == seen


def test_where_prompts_end_apart_only_what_is_edited_apart_is_computed_apart():
    given = [[5, 6, 7, 8, k] for k in range(20, 30)] * 2
    ends = [5] * 10 + [4] * 10
    model = model_of("gemma3")
    along = sb.Direction("d", sb.Site(1), torch.ones(1, D_MODEL))
    for at, expected in (("all", 14), ("last", 25), ("subject", 14)):
        with sb.intervene(model, sb.Steer(along, 1.0, positions=at)):
            reads = Reads(model, given, ends=ends, starts=[0] * 20)
            for _ in reads.run():
                pass
        assert len(reads.tree) == reads.n_tokens == expected, at


@pytest.mark.parametrize("name", ["gemma3", "mistral", "gpt_oss"])
def test_a_window_one_too_wide_would_be_seen(name, monkeypatch):
    """The comparison above has teeth: tokens beyond the window move the logits."""
    model, given = model_of(name), sequences()
    run, window = Packed.arguments, model.config.sliding_window

    def wider(packed, model):
        monkeypatch.setattr(model.config, "sliding_window", window + 1)
        try:
            return run(packed, model)
        finally:
            monkeypatch.setattr(model.config, "sliding_window", window)

    monkeypatch.setattr(Packed, "arguments", wider)
    off = [(z[0] - plain_logits(model, s)[-1]).abs().max() for z, s in zip(read(model, given)[0], given)]
    assert max(off) > 100 * CLOSE


@pytest.mark.parametrize("among", [None, {0, 3, 4, 7}])
@pytest.mark.parametrize("price", [0.0, 0.05, 1.0])
def test_rows_hold_whole_paths_and_no_row_is_longer_than_asked(price, among):
    tree = Tree(sequences())
    wanted = set(range(len(tree.paths))) if among is None else among
    for longest in (1, 20, 30, 1000):
        rows = tree.rows(price, longest=longest, among=among)
        assert sorted(i for r in rows for i in r.sequences) == sorted(wanted)
        for row in rows:
            assert len(set(row.nodes)) == len(row.nodes) <= max(longest, max(map(len, tree.paths)))
            assert all(set(tree.paths[i]) <= set(row.nodes) for i in row.sequences)
            assert set(row.nodes) == {v for i in row.sequences for v in tree.paths[i]}
            assert all(p == -1 or row.nodes[p] in set(row.nodes[:c]) for c, p in enumerate(row.parents))
    assert among or len(tree.rows(0.0)[0].nodes) == len(tree) == distinct(sequences())


@pytest.mark.parametrize("price", [0.0, 0.01, 0.03, 0.1, 1.0])
@pytest.mark.parametrize("longest", [1, 24, 60, 1024])
def test_no_other_cut_of_the_paths_into_rows_costs_less(price, longest):
    """Against every cut, tried one by one on the sequences themselves."""
    given = sorted(set(map(tuple, sequences(seed=3))))
    given = [s for k, s in enumerate(given) if k + 1 == len(given) or given[k + 1][: len(s)] != s][:11]

    def size(part):
        return len({s[: k + 1] for s in part for k in range(len(s))})

    least = np.inf
    for cuts in range(1 << (len(given) - 1)):
        stops = [k + 1 for k in range(len(given) - 1) if cuts >> k & 1]
        parts = [given[a:b] for a, b in zip([0, *stops], [*stops, len(given)])]
        if all(size(part) <= longest or len(part) == 1 for part in parts):
            least = min(least, sum(size(part) * (1 + price * size(part)) for part in parts))
    rows = Tree([list(s) for s in given]).rows(price, longest=longest)
    assert sum(len(r.nodes) * (1 + price * len(r.nodes)) for r in rows) == pytest.approx(least, rel=1e-12)


def test_a_pass_is_padded_by_little():
    rows = Tree([list(range(100, 100 + n)) if n % 2 else list(range(n)) for n in range(3, 60)]).rows(1.0)
    for group in passes_of(rows, 4096, 32):
        assert sum(len(group[0].nodes) - len(row.nodes) for row in group) <= 32


def test_several_rows_and_passes(monkeypatch):
    monkeypatch.setattr("sae_bias.models.tree.price_of", lambda model: 0.05)
    model, given = model_of("gemma3"), sequences(0) + sequences(1)
    found, reads = read(model, given, [range(len(s)) for s in given], batch_size=2)
    assert len(reads._packed) > 1 < max(len(rows) for rows in reads._packed)
    for s, z in zip(given, found):
        torch.testing.assert_close(z, plain_logits(model, s), atol=CLOSE, rtol=0)


def test_a_prefix_in_two_rows_of_a_pass_is_handed_over_once(monkeypatch):
    """A short beginning that is cheaper computed twice than attended over: its position is wanted of every sequence, and is one result."""
    monkeypatch.setattr("sae_bias.models.tree.price_of", lambda model: 0.1)
    model, rng = model_of("gemma3"), np.random.default_rng(0)
    opening = rng.integers(10, VOCAB, 3).tolist()
    given = [
        opening + [k] * 2 + rng.integers(10, VOCAB, 12).tolist() + [j] for k in range(20, 24) for j in (1, 2)
    ]
    given += [[*given[0][:-1], j] for j in range(30, 36)]  # so that packed passes cost less than plain ones
    found, reads = read(model, given, [[1, len(s) - 1] for s in given])
    rows_of_a_node = [
        Counter(v for row in rows for v in row.nodes)[reads.paths[0][1]] for rows in reads._packed
    ]
    assert max(rows_of_a_node) > 1, "two rows of one pass hold the opening"
    assert reads.n == len(given) + 1
    for s, z in zip(given, found):
        torch.testing.assert_close(z, plain_logits(model, s)[[1, -1]], atol=CLOSE, rtol=0)


def test_the_order_of_the_sequences_changes_no_bit():
    given = sequences()
    one = read(model_of("gemma3"), given)[0]
    order = np.random.default_rng(0).permutation(len(given))
    other = read(model_of("gemma3"), [given[i] for i in order])[0]
    assert all(torch.equal(other[k], one[i]) for k, i in enumerate(order))


def test_sequences_that_share_nothing_run_as_they_are():
    given = [[k, *range(100, 120)] for k in range(10, 20)]
    reads = Reads(model_of("gemma3"), given)
    assert not reads._packed
    assert reads.n_tokens == 210


def test_hooks_that_are_not_ours_see_plain_sequences():
    model, shapes = model_of("gemma3"), []
    handle = model.layer(0).register_forward_hook(lambda m, a, o: shapes.append(a[0].shape[:2]))
    found, _ = read(model, sequences())
    handle.remove()
    assert sorted(n for b, n in shapes for _ in range(b)) == sorted(map(len, sequences()))
    torch.testing.assert_close(found[0][0], plain_logits(model, sequences()[0])[-1], atol=CLOSE, rtol=0)


def test_an_edit_that_mixes_positions_sees_plain_sequences():
    """A plugin's edit says nothing of positions: its delta here is the sum of the residuals before."""
    from dataclasses import dataclass

    from sae_bias.steering.intervention import EDITS

    @register_edit("running_sum")
    @dataclass(frozen=True)
    class RunningSum(Intervention):
        site = sb.Site(1)
        target = "sum"

        def bind(self, model):
            return self

        def delta(self, x, context):
            return context.only_here(0.1 * x.cumsum(1))

        def describe(self):
            return "adds what came before"

    try:
        model = model_of("gemma3")
        with sb.intervene(model, RunningSum()):
            found, reads = read(model, sequences())
            assert reads.n_tokens == sum(map(len, sequences()))
            for s, z in zip(sequences(), found):
                torch.testing.assert_close(z[0], plain_logits(model, s)[-1], atol=CLOSE, rtol=0)
    finally:
        del EDITS._entries["running_sum"]


# --- what is known already ---


def test_what_one_reading_has_said_no_other_passes_again():
    """Inside a `knowing` block a sequence passes the model once; ends and residuals are those of a reading of its own."""
    model, given = model_of("gemma3"), sequences()
    more = [given[0] + [11, 12], given[4], [20, 21, 22]]
    with knowing(model, [1]):
        read(model, given)
        with layer_tokens(model) as again:
            found, reads = read(model, given)
            kept = reads.keep(1)
        assert again.tokens == 0 == reads.n_tokens
        with layer_tokens(model) as count:
            later, _ = read(model, more)
        assert count.tokens == distinct([more[0], more[2]]), "only what is new passes"
        with sb.intervene(model, sb.Steer(sb.Direction("d", sb.Site(1), torch.ones(1, D_MODEL)), 1.0)):
            edited, _ = read(model, given)
    assert model.known is None
    for s, z, w, path in zip(given, found, edited, reads.paths):
        torch.testing.assert_close(z[0], plain_logits(model, s)[-1], atol=CLOSE, rtol=0)
        assert not torch.allclose(w[0], z[0], atol=10 * CLOSE), "an edited pass is no unedited one"
        own = sb.residuals(model, [s], 1, positions="all")[0]
        torch.testing.assert_close(kept[path], own, atol=CLOSE, rtol=0)
    for s, z in zip(more, later):
        torch.testing.assert_close(z[0], plain_logits(model, s)[-1], atol=CLOSE, rtol=0)


def test_past_its_room_nothing_is_kept_and_nothing_is_wrong(monkeypatch):
    model, given = model_of("gemma3"), sequences()
    monkeypatch.setattr("sae_bias.models.reads.MOST_KNOWN", 0)
    with knowing(model, [1]) as known:
        read(model, given)
        found, reads = read(model, given)
        kept = reads.keep(1)
    assert known.n_bytes == 0
    for s, z, path in zip(given, found, reads.paths):
        torch.testing.assert_close(z[0], plain_logits(model, s)[-1], atol=CLOSE, rtol=0)
        torch.testing.assert_close(
            kept[path], sb.residuals(model, [s], 1, positions="all")[0], atol=CLOSE, rtol=0
        )


@pytest.mark.parametrize("name", ["gemma3", "falcon_alibi"])
def test_residuals_that_are_given_go_on_from_where_they_stand(name):
    """On the tree and as they are: the ends and the gradients of sequences run one at a time."""
    model, given = model_of(name), sequences()
    reads = Reads(model, given)
    x = reads.keep(0) + torch.randn(reads.n_nodes, D_MODEL, generator=torch.Generator().manual_seed(2))
    x.requires_grad_(True)
    ends: dict[int, torch.Tensor] = {}
    total = torch.zeros_like(x)

    def visit(wanted, final):
        for ((i, _),), r in zip(wanted, final.resid[:, 0].detach()):
            ends[i] = r
        total.add_(torch.autograd.grad(final.resid.pow(2).sum(), x)[0])

    reads.resume(0, x, visit, grad=True)
    expected = torch.zeros_like(x)
    for i, (s, path) in enumerate(zip(given, reads.paths)):
        own = x.detach()[path][None].requires_grad_(True)
        final = forward_with_grad(model, torch.tensor([s]), resume=Kept(0, own)).last().resid
        expected.index_add_(0, torch.tensor(path), torch.autograd.grad(final.pow(2).sum(), own)[0][0])
        torch.testing.assert_close(ends[i], final[0, 0].detach(), atol=CLOSE, rtol=1e-4)
    torch.testing.assert_close(total, expected, atol=CLOSE, rtol=1e-3)
