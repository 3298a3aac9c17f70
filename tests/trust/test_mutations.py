"""Mistakes seen in other studies (docs/method.md#known-mistakes), each a wrong function in place of the right one.

A mutant is patched in while the test it names runs: that test must pass on the code as it is and fail on the mutant. `make slow` prints the table mutant → test. MISTAKES lists the sixteen of that page: each has a mutant that names its
number, or the table's own test fails.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import test_activations
import test_attribution
import test_calls
import test_control_verdict
import test_directions
import test_engine
import test_frontier_cost
import test_gate
import test_generation
import test_hooks
import test_hub_faults
import test_interventions
import test_judge
import test_model
import test_probe
import test_sae
import test_stats
import test_tree
import test_verify
import torch
from architectures import ARCHITECTURES
from tallies import tally
from test_directions import drawn  # noqa: F401  (a fixture of the named tests)
from test_gate import cache  # noqa: F401
from test_sae import folder  # noqa: F401

import sae_bias as sb
from sae_bias.discovery import attribution, calls
from sae_bias.discovery import tables as features
from sae_bias.measures import fidelity as gate
from sae_bias.measures import judge_replies
from sae_bias.models import forward as activations
from sae_bias.models import hub, load, model, tree
from sae_bias.probe import estimates, reading, words
from sae_bias.saes import ids as sae_ids
from sae_bias.saes import load as sae_load
from sae_bias.saes.formats import gemma_scope
from sae_bias.stats import clustered, reduction
from sae_bias.steering import controls, directions, hooks, intervention, runner, shared
from sae_bias.steering import generate as generation
from sae_bias.workflows import sweep_rows

TABLE: list[tuple[str, str]] = []

MISTAKES = {
    1: "full-reconstruction hooks",
    2: "a negative value written into inactive units",
    3: "a mean change hides per-prompt damage",
    4: "two BOS tokens",
    5: "no BOS",
    6: "SAEs applied at BOS",
    7: "steering stops after the prompt, or skips its last token",
    8: "bf16 logits, thresholds and norm",
    9: "massive residual dimensions carry a difference of means",
    10: "weight processing changes the residual",
    11: "a hook that never fires is no error",
    12: "random weights are only logged",
    13: "loading a model installs something",
    14: "the network is asked for what is cached; a config is inferred silently",
    15: "an index without its release and SAE id",
    16: "unparsed judge replies counted as 0",
}
"""docs/method.md#known-mistakes, in its order."""


@dataclass(frozen=True)
class Mutant:
    """One mistake: how it is put in, and the test that kills it."""

    mistake: str
    apply: Callable[[pytest.MonkeyPatch], None]
    test: Callable[..., None]
    arguments: dict[str, Any] = field(default_factory=dict)
    """Parameters of the test that are not fixtures; `architecture` stands for `tiny`."""

    @property
    def killer(self) -> str:
        return f"{self.test.__module__}.{self.test.__name__}"


def swap(patch: pytest.MonkeyPatch, function: Any, mutant: Any) -> None:
    """`mutant` wherever a module of the package or of the tests holds `function`, imported names included."""
    found = False
    for name, module in list(sys.modules.items()):
        if module is None or not name.startswith(("sae_bias", "test_")):
            continue
        for attribute, value in list(vars(module).items()):
            if value is function:
                patch.setattr(module, attribute, mutant)
                found = True
    assert found, f"nothing holds {function}; rewrite the mutant"


def around(owner: Any, name: str, mutant: Callable[..., Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """`owner.name` becomes `mutant(real, *args, **options)`; a module's function is replaced wherever it was imported."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        real = getattr(owner, name)
        broken = functools.wraps(real)(functools.partial(mutant, real))
        if inspect.ismodule(owner):
            swap(patch, real, broken)
        else:
            patch.setattr(owner, name, lambda *args, **options: mutant(real, *args, **options))

    return apply


# ── the wrong functions ──────────────────────────────────────────────────────────────────────


def full_reconstruction(patch: pytest.MonkeyPatch) -> None:
    """x' = decode(a') in place of x + Δ: the SAE error is thrown away."""
    plain = intervention.FeatureEdit.delta

    def mutated(self, x, context):
        change = plain(self, x, context)
        whole = sb.load_sae(self.ref.sae)
        rebuilt = whole.decode(whole.encode(x)) - x
        delta = change.delta + torch.where(context.mask[..., None], rebuilt, torch.zeros_like(x))
        return type(change)(delta, (delta != 0).any(-1), change.before, change.after)

    patch.setattr(intervention.FeatureEdit, "delta", mutated)


def chained_blocks(patch: pytest.MonkeyPatch) -> None:
    """A hook a block: an inner block re-encodes what an outer one left."""

    def rebuild(self):
        for handle in self.handles:
            handle.remove()
        self.handles = []
        if not any(c.sites for c in self.contexts):
            return
        begin = hooks.ours(lambda module, args, kwargs: self._begin(args, kwargs))
        self.handles.append(self.model.base.register_forward_pre_hook(begin, with_kwargs=True))
        for context in self.contexts:
            for site in context.sites:

                def hook(module, args, output, context=context, site=site):
                    context.receipt.hook_calls += 1
                    x = activations.hidden(output)
                    delta = context.sites[site].delta(x, self.info, context.receipts[site])
                    return (
                        None if delta is None else activations.with_hidden(output, hooks.add_delta(x, delta))
                    )

                self.handles.append(self.model.layer(site.layer).register_forward_hook(hooks.ours(hook)))

    patch.setattr(hooks._State, "rebuild", rebuild)


def no_graft(patch: pytest.MonkeyPatch) -> None:
    """Gemma3ForCausalLM.from_pretrained on a multimodal folder, its loading report ignored."""
    from transformers import Gemma3ForCausalLM

    load_hf = load._load_hf

    def mutated(source, dtype, **options):
        if load._load_config(source).model_type != "gemma3":
            return load_hf(source, dtype, **options)
        with hub._quiet(__import__("transformers")):
            return Gemma3ForCausalLM.from_pretrained(source, dtype=dtype)

    patch.setattr(load, "_load_hf", mutated)


def bridge_tokens(patch: pytest.MonkeyPatch) -> None:
    """Ids with a BOS of ours in front of the tokenizer's own."""
    encode = model.Model.encode

    def mutated(self, text):
        ids = encode(self, text)
        bos = self.tokenizer.bos_token_id
        return ids if bos is None else [bos, *ids]

    patch.setattr(model.Model, "encode", mutated)


def pip_in_bridge(patch: pytest.MonkeyPatch) -> None:
    """The bridge is booted in a way that starts a process to install something."""
    boot = model._boot_bridge

    def mutated(m):
        import subprocess

        subprocess.run(["true"], check=True)
        return boot(m)

    patch.setattr(model, "_boot_bridge", mutated)


def word_encoded_alone(patch: pytest.MonkeyPatch) -> None:
    """ids[0] of " word" encoded by itself: under Mistral the bare prefix space for every word (docs/method.md#evaluation-words)."""

    def mutated(m, word, prompt, prompt_ids, *_):
        ids = m.tokenizer(f" {word}", add_special_tokens=False).input_ids
        return (ids[0],)

    swap(patch, words.word_tokens, mutated)


def hooks_left_after_an_exception(patch: pytest.MonkeyPatch) -> None:
    """The block cleans up only where it ends by itself."""
    from contextlib import contextmanager

    @contextmanager
    def mutated(m, *edits):
        flat = [e for edit in edits for e in (edit if isinstance(edit, (list, tuple)) else [edit])]
        state = m._edits or hooks._State(m)
        context = hooks._Context(m, flat)
        m._edits = state
        state.contexts.append(context)
        state.rebuild()
        yield context.receipt
        state.contexts.remove(context)
        state.rebuild()
        m._edits = state if state.contexts else None

    swap(patch, hooks.intervene, mutated)


def bf16_head(patch: pytest.MonkeyPatch) -> None:
    """Final norm and unembedding in the model's own bfloat16 (docs/method.md#mistake-8)."""

    def mutated(self, token_ids=None, *, softcap=True):
        z = self.model.hf.get_output_embeddings()(self.model.base.norm(self.resid)).float()
        return z if token_ids is None else z[..., list(token_ids)]

    patch.setattr(activations.Final, "logits", mutated)


def bos_by_index(patch: pytest.MonkeyPatch) -> None:
    """Position 0 of each pass is taken for BOS: right in prefill, wrong under a cache and without a BOS."""

    mask = hooks.position_mask

    def mutated(info, positions, special_ids):
        found = mask(info, positions, frozenset())
        found[:, 0] = False
        return found

    swap(patch, mask, mutated)


def prompt_only_under_cache(patch: pytest.MonkeyPatch) -> None:
    """Steering acts in prefill and stops once single tokens come from the cache."""
    change_of = hooks._State._change

    def mutated(self, site):
        change = change_of(self, site)
        return lambda x: None if self.info.past else change(x)

    patch.setattr(hooks._State, "_change", mutated)


def never_fired_passes(patch: pytest.MonkeyPatch) -> None:
    """The block ends quietly although no hook of its ran."""
    init = hooks._Context.__init__

    def mutated(self, m, edits):
        init(self, m, edits)
        self.receipt.hook_calls = 1

    patch.setattr(hooks._Context, "__init__", mutated)


def centred_weights(patch: pytest.MonkeyPatch) -> None:
    """`center_writing_weights`: what writes into the residual loses its mean; logits stay, the residual does not."""
    load_hf = load._load_hf

    def mutated(source, dtype, **options):
        hf = load_hf(source, dtype, **options)
        with torch.no_grad():
            embedding = hf.get_input_embeddings().weight
            embedding -= embedding.mean(-1, keepdim=True)
            for name, weight in hf.named_parameters():
                if name.endswith(("attention.dense.weight", "mlp.dense_4h_to_h.weight")):
                    weight -= weight.mean(0, keepdim=True)
                if name.endswith(("attention.dense.bias", "mlp.dense_4h_to_h.bias")):
                    weight -= weight.mean()
        return hf

    patch.setattr(load, "_load_hf", mutated)


def special_tokens_are_ordinary(real, *args, **options):
    for batch in real(*args, **options):
        yield replace(batch, ordinary=torch.ones_like(batch.ordinary))


def misspelt_sites_pass(patch: pytest.MonkeyPatch) -> None:
    """A hook name that means nothing is taken for some site, and nothing is said."""

    known = sb.Site.parse

    def mutated(site):
        try:
            return known(site)
        except sb.SaeBiasError:
            return sb.Site(0)

    patch.setattr(sb.Site, "parse", mutated)


def a_bare_index_is_taken(patch: pytest.MonkeyPatch) -> None:
    """A number alone stands for the feature of whichever SAE comes first."""
    known = sae_load.as_feature

    def mutated(x):
        return known(f"organism:planted/constructed#{x % 64}") if isinstance(x, int) else known(x)

    swap(patch, known, mutated)


def a_reference_without_its_sae(patch: pytest.MonkeyPatch) -> None:
    """Tables and files say "#446", of no SAE in particular."""
    patch.setattr(sae_ids.FeatureRef, "__str__", lambda self: f"#{self.index}")


def unparsed_is_zero(patch: pytest.MonkeyPatch) -> None:
    """A reply that gives no rating is a rating of 0."""
    read = judge_replies.read_rating

    def mutated(reply):
        return read(reply) or 0

    swap(patch, read, mutated)


def the_cache_is_passed_over(patch: pytest.MonkeyPatch) -> None:
    """The hub is asked although the file is here."""
    patch.setattr(hub, "cached_file", lambda repo_id, filename, revision=None: None)


def inferred_silently(patch: pytest.MonkeyPatch) -> None:
    """Layer and hook point are taken from a folder's name, and nobody is told."""
    read = gemma_scope.read_info

    def mutated(*args, **options):
        return replace(read(*args, **options), notes=())

    swap(patch, read, mutated)


def bos_kept(real, self, messages, **options):
    """The template's own BOS in front of the one that `encode` adds."""
    return (self.tokenizer.bos_token or "") + real(self, messages, **options)


def bos_dropped(real, self, text):
    return [i for i in real(self, text) if i != self.tokenizer.bos_token_id]


def masked(change: Callable[..., tuple]) -> Callable[[pytest.MonkeyPatch], None]:
    """`position_mask` given something else than it was asked."""
    return around(
        hooks, "position_mask", lambda real, info, positions, special: real(*change(info, positions, special))
    )


def one_early(mode: str) -> Callable[..., tuple]:
    """The prompt ends one token too early for edits at `mode`."""

    def change(info, positions, special):
        end = info.prompt_len
        early = replace(info, prompt_len=None if end is None else end - 1)
        return (early if positions == mode else info), positions, special

    return change


def bos_attributed(real, engine, layer):
    """No token counts as special while gradients are gathered."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(engine.model), "special_ids", frozenset())
        return real(engine, layer)


def rounded_everywhere(real, x, delta):
    """Every position takes part in the arithmetic, changed or not."""
    return ((x.float() * 1.01) / 1.01 + delta).to(x.dtype)


def chained(real, self, x, info, receipts=None):
    """Each edit reads the residual that the one before it left."""
    total = None
    for i, edit in enumerate(self.edits):
        alone = copy.copy(self)
        alone.edits = [edit]
        own = None if receipts is None else receipts[i : i + 1]
        step = real(alone, x if total is None else x + total, info, own)
        if step is not None:
            total = step if total is None else total + step
    return total


def unchecked(real, m, edits):
    """Edits grouped by site and nothing asked of them."""
    by_site: dict = {}
    for edit in hooks.flat(edits):
        by_site.setdefault(edit.site, []).append(edit)
    return {site: hooks.SiteEdit(m, site, group) for site, group in by_site.items()}


def averaged(real, self, z, norm, column):
    """The mean of a word's token scores."""
    return real(self, z, norm, column) / np.array([len(tokens) for tokens in self.words])


def unnormalized(real, self, z, norm, column):
    """Logits summed over a word's tokens."""
    return real(self, z, None if norm is None else np.zeros_like(norm), column)


def uncapped(real, self, token_ids=None, *, softcap=True):
    return real(self, token_ids, softcap=False)


def nan_is_zero(real, self):
    """What is not finite is read as 0."""
    self.z = np.nan_to_num(self.z)
    self.norm = None if self.norm is None else np.nan_to_num(self.norm)
    return real(self)


def only_changed_at_the_end(real, self, changed):
    """A sequence counts as changed only where its last token is."""
    last = np.zeros_like(changed)
    last[[path[-1] for path in self.tree.paths]] = True
    return real(self, changed & last)


def window_in_columns(real, self, model):
    """A sliding window measured in columns of the row, not in positions of the sequence."""
    columns = torch.arange(self.place.shape[1]).expand_as(self.place)
    return real(self, model) | {"attention_mask": real(replace(self, place=columns), model)["attention_mask"]}


def norm_ignored(real, self, x, context):
    """α·δ̂ whatever the residual's norm."""
    change = real(self, x, context)
    return (
        replace(change, delta=change.delta / x.norm(dim=-1, keepdim=True)) if self.norm_relative else change
    )


def not_unit(real, self, x, context):
    """A feature's row projected out with its own length."""
    change = real(self, x, context)
    if isinstance(self.along, sb.Direction):
        return change
    return replace(change, delta=change.delta * self.along.w_dec.norm() ** 2)


def weights_left_out(real, *args):
    """A cell is named by its edit alone."""
    return {name: value for name, value in real(*args).items() if name != "weights"}


# ── the definitions of version 0.1 (docs/method.md#what-changed-in-the-definitions)


def three_way_rule(real, t, p, held, main=None):
    """AI-speech from AS, AN, HS and DS alone: the HC cell passes whatever it holds."""
    sides = {name: {k: v for k, v in getattr(held, name).items() if k != "HC"} for name in ("above", "below")}
    silent = {"HC": np.full_like(held.mean["AS"], np.inf)}
    return real(t, p, replace(held, above=sides["above"] | silent, below=sides["below"] | silent), main)


def ratio_of_anything(real, base, after, *rest):
    """1 − B_s/B_0 whether or not B_0 differs from 0."""
    found = real(base, after, *rest)
    return replace(found, estimate=1 - float(np.mean(after) / np.mean(base)), bounded=True, reason="")


OVERSHOOT = {"rho": -0.9, "beta": 0.9}
OLD_DEFINITIONS = [
    Mutant(
        "old definition: specific reduction is β − B_s/B_0",
        around(reduction, "specific_value", lambda real, beta, left: np.asarray(beta) - np.asarray(left)),
        test_stats.test_overshoot_and_flattening_are_never_credited,
        OVERSHOOT,
    ),
    Mutant(
        "old definition: no residual mean square in the interval",
        lambda patch: patch.setattr(clustered.Design, "balanced", property(lambda self: False)),
        test_stats.test_balanced_designs_have_the_mean_squares_of_anova,
        {"rows_a_cell": 1, "sd": (0, 0, 1)},
    ),
    Mutant(
        "old definition: calls at any number of templates",
        lambda patch: patch.setattr(clustered, "FEWEST_CLUSTERS", 0),
        test_stats.test_a_call_needs_six_templates_and_six_entities,
        {"shape": (5, 8), "mean": 9.0, "call": "undetermined"},
    ),
    Mutant(
        "old definition: a ratio to a bias that may be 0",
        around(reduction, "fieller_reduction", ratio_of_anything),
        test_stats.test_specific_reduction_is_undefined_where_it_must_be,
    ),
    Mutant(
        "old definition: AI-speech without badly judged human deeds",
        around(calls, "decide", three_way_rule),
        test_calls.test_decisions_follow_the_rules_one_feature_at_a_time,
    ),
]

G = {"architecture": "gemma3"}


def three_kinds(real: Any, facts: Any, beta: float) -> dict[str, float]:
    """Costs as of version 0.1: no KL at the evaluation position, none of the rest of the law, nothing for what is lost of β."""
    worst = max(float(facts[f"kl_{kind}"]) for kind in ("neutral", "ai_nonspeech", "ai_speech"))
    return {**real(facts, beta), "kl_worst": worst, "cost": worst}


MUTANTS = [
    Mutant(
        "old definition: one p over controls of both kinds",
        around(
            controls,
            "control_test",
            lambda real, own, values, kinds: real(own, values, [controls.RANDOM for _ in kinds]),
        ),
        test_control_verdict.test_fewer_than_nineteen_matched_controls_decide_nothing,
        {"matched": 10},
    ),
    Mutant(
        "old definition: the cost is the KL of three kinds of text",
        around(sweep_rows, "_cost_columns", three_kinds),
        test_frontier_cost.test_the_cost_is_the_worst_kl_or_what_is_lost_of_beta,
    ),
    Mutant(
        "full reconstruction instead of the delta (mistake 1)",
        full_reconstruction,
        test_hooks.test_the_sae_error_is_kept,
        G,
    ),
    Mutant(
        "full reconstruction: scale(1) is no identity",
        full_reconstruction,
        test_hooks.test_scale_by_one_is_the_identity,
        G,
    ),
    Mutant(
        "an active clamp writes into inactive units (mistake 2)",
        around(sb.Clamp, "new_acts", lambda real, self, acts, context: torch.full_like(acts, self.value)),
        test_hooks.test_an_active_clamp_leaves_silent_positions_alone,
        G,
    ),
    Mutant(
        "a negative always-clamp does not warn (mistake 2)",
        around(hooks, "warn_written_inactive", lambda real, receipt: None),
        test_hooks.test_a_negative_always_clamp_warns_once_with_the_share,
    ),
    Mutant(
        "mean change in place of mean |change| (mistake 3)",
        lambda patch: patch.setattr(estimates.Change, "mean_abs", property(lambda c: float(c.values.mean()))),
        test_probe.test_change_and_reduction_have_the_stated_sign,
    ),
    Mutant(
        "two BOS tokens (mistake 4)",
        bridge_tokens,
        test_model.test_one_bos_exactly_where_the_tokenizer_puts_one,
        G,
    ),
    Mutant(
        "two BOS from a chat template (mistake 4)",
        around(model.Model, "chat_text", bos_kept),
        test_model.test_chat_has_one_bos,
    ),
    Mutant(
        "no BOS (mistake 5)",
        around(model.Model, "encode", bos_dropped),
        test_model.test_one_bos_exactly_where_the_tokenizer_puts_one,
        G,
    ),
    Mutant(
        "edits at BOS (mistake 6)",
        masked(lambda info, positions, special: (info, positions, frozenset())),
        test_hooks.test_special_tokens_are_left_alone_by_id,
        G,
    ),
    Mutant(
        "attribution counts BOS (mistake 6)",
        around(attribution, "_bias_gradient", bos_attributed),
        test_attribution.test_special_tokens_carry_no_attribution,
    ),
    Mutant(
        "special tokens known by index, prefill (mistake 6)",
        bos_by_index,
        test_hooks.test_special_tokens_are_left_alone_by_id,
        {"architecture": "qwen2"},
    ),
    Mutant(
        "special tokens known by index, cache (mistake 7)",
        bos_by_index,
        test_generation.test_greedy_tokens_with_and_without_cache_equal_the_independent_loop,
        {**G, "mode": "all"},
    ),
    Mutant(
        "steering stops after the prompt (mistake 7)",
        prompt_only_under_cache,
        test_generation.test_greedy_tokens_with_and_without_cache_equal_the_independent_loop,
        {**G, "mode": "all"},
    ),
    Mutant(
        "steering skips the prompt's last token (mistake 7)",
        masked(one_early("prompt")),
        test_generation.test_greedy_tokens_with_and_without_cache_equal_the_independent_loop,
        {**G, "mode": "prompt"},
    ),
    Mutant(
        "`generated` begins a token early (mistake 7)",
        masked(one_early("generated")),
        test_generation.test_edits_at_generated_positions_leave_the_first_token,
    ),
    Mutant(
        "cached positions count from 0 again (mistake 7)",
        masked(lambda info, positions, special: (replace(info, past=0), positions, special)),
        test_hooks.test_position_masks_follow_one_contract_in_prefill_and_cache,
    ),
    Mutant(
        "padding is edited",
        masked(lambda info, positions, special: (replace(info, attention_mask=None), positions, special)),
        test_hooks.test_left_padding_changes_nothing,
        {"architecture": "llama", "mode": "all"},
    ),
    Mutant(
        "bf16 final norm and unembedding (mistake 8)",
        bf16_head,
        test_probe.test_bfloat16_model_keeps_float32_parts,
    ),
    Mutant(
        "an edit rounds positions it does not change (bf16)",
        around(hooks, "add_delta", rounded_everywhere),
        test_hooks.test_an_active_clamp_leaves_silent_positions_alone,
        G,
    ),
    Mutant(
        "an edit that never ran is no error (mistake 11)",
        never_fired_passes,
        test_hooks.test_a_hook_that_never_fired_is_an_error,
    ),
    Mutant(
        "random weights for a multimodal folder (mistake 12)",
        no_graft,
        test_model.test_logits_are_the_plain_models,
        {"architecture": "gemma3_multimodal"},
    ),
    Mutant(
        "a missing weight is only logged (mistake 12)",
        lambda patch: patch.setattr(load, "_refuse_incomplete", lambda info, source: None),
        test_model.test_a_missing_weight_is_refused,
        G,
    ),
    Mutant(
        "loading starts a process (mistake 13)",
        pip_in_bridge,
        test_model.test_the_bridge_wraps_the_same_modules_and_installs_nothing,
        G,
    ),
    Mutant(
        "chained edits in one block",
        around(hooks.SiteEdit, "delta", chained),
        test_hooks.test_two_features_compose_in_any_order_and_as_nested_blocks,
        G,
    ),
    Mutant(
        "chained nested blocks",
        chained_blocks,
        test_hooks.test_two_features_compose_in_any_order_and_as_nested_blocks,
        G,
    ),
    Mutant(
        "hooks stay after an exception",
        hooks_left_after_an_exception,
        test_hooks.test_hooks_are_gone_after_an_exception,
    ),
    Mutant(
        "one feature takes two edits",
        around(hooks, "compile_edits", unchecked),
        test_hooks.test_a_feature_edited_twice_is_refused,
    ),
    Mutant(
        "an SAE of another width is applied",
        around(activations, "check_fits", lambda real, m, what, site, width: site),
        test_hooks.test_an_sae_of_another_width_is_refused,
    ),
    Mutant("a word encoded alone", word_encoded_alone, test_probe.test_mistral_prefix_space_is_never_a_word),
    Mutant(
        "a word encoded alone: the numbers",
        word_encoded_alone,
        test_probe.test_mean_logit_equals_the_independent_script,
        {"architecture": "mistral"},
    ),
    Mutant(
        "several tokens averaged instead of summed",
        around(reading.ReadingPlan, "_word_values", averaged),
        test_probe.test_logodds_of_several_tokens_is_the_sum_of_token_log_probs,
        G,
    ),
    Mutant(
        "logits of several tokens instead of log-probs",
        around(reading.ReadingPlan, "_word_values", unnormalized),
        test_probe.test_logodds_of_several_tokens_is_the_sum_of_token_log_probs,
        G,
    ),
    Mutant(
        "the softcap is forgotten",
        around(activations.Final, "logits", uncapped),
        test_probe.test_mean_logit_equals_the_independent_script,
        {"architecture": "gemma2"},
    ),
    Mutant(
        "NaN logits pass",
        around(reading.PlanReader, "reading", nan_is_zero),
        test_probe.test_nan_logits_name_the_prompt,
    ),
    Mutant(
        "the resumed pass drops rows that changed",
        around(shared.View, "changed_rows", only_changed_at_the_end),
        test_engine.test_a_cell_equals_the_hooked_pass,
        G,
    ),
    Mutant(
        "a packed row's window counts columns",
        around(tree.Packed, "arguments", window_in_columns),
        test_tree.test_each_position_is_that_of_its_sequence_alone,
        {"name": "gemma3"},
    ),
    Mutant(
        "prompts that end apart share their last token's edit",
        lambda patch: patch.setattr(hooks._State, "roles", frozenset()),
        test_tree.test_edits_act_where_they_would_on_each_sequence_alone,
        {"name": "gemma3", "at": "last"},
    ),
    Mutant(
        "the users' hooks are passed over",
        lambda patch: patch.setattr(model.Model, "foreign_hooks", lambda self: False),
        test_engine.test_the_users_own_hooks_fire_and_count,
        G,
    ),
    Mutant(
        "an open block leaks into the engine",
        lambda patch: patch.setattr(runner, "refuse_open_block", lambda model: None),
        test_engine.test_an_open_block_is_refused,
    ),
    Mutant(
        "norm-relative steering ignores the norm",
        around(sb.Steer, "delta", norm_ignored),
        test_interventions.test_interventions_equal_the_independent_script,
        {**G, "positions": "all"},
    ),
    Mutant(
        "the direction is not normalized before projecting",
        around(sb.ProjectOut, "delta", not_unit),
        test_interventions.test_interventions_equal_the_independent_script,
        {**G, "positions": "all"},
    ),
    Mutant(
        "greedy search with the checkpoint's repetition penalty",
        lambda patch: patch.setattr(
            generation, "_only", lambda hf, config: __import__("contextlib").nullcontext()
        ),
        test_generation.test_a_checkpoints_own_sampling_settings_do_not_leak_in,
    ),
    Mutant(
        "the maximum over tokens counts BOS (mistake 6)",
        around(features, "text_batches", special_tokens_are_ordinary),
        test_activations.test_activation_table_reads_the_encoder,
    ),
    Mutant(
        "massive dimensions stay in the difference of means (mistake 9)",
        around(directions, "_without_massive", lambda real, difference, *_: (difference, "")),
        test_directions.test_massive_dimensions_are_left_out_and_counted,
    ),
    Mutant(
        "no dimension is massive (mistake 9)",
        lambda patch: patch.setattr(directions, "MASSIVE", 1e9),
        test_directions.test_massive_dimensions_are_left_out_and_counted,
    ),
    Mutant(
        "weights centered while loading (mistake 10)",
        centred_weights,
        test_gate.test_the_residual_is_that_of_the_unprocessed_checkpoint,
        {"name": "gpt_neox"},
    ),
    Mutant(
        "a misspelled hook name is taken for some site (mistake 11)",
        misspelt_sites_pass,
        test_activations.test_sites_are_checked,
    ),
    Mutant(
        "a cached SAE is asked for on the network (mistake 14)",
        the_cache_is_passed_over,
        test_hub_faults.test_a_cached_sae_asks_no_network_and_says_what_it_inferred,
    ),
    Mutant(
        "a config is inferred silently (mistake 14)",
        inferred_silently,
        test_hub_faults.test_a_cached_sae_asks_no_network_and_says_what_it_inferred,
    ),
    Mutant(
        "a bare index is a feature (mistake 15)",
        a_bare_index_is_taken,
        test_sae.test_a_bare_index_is_no_feature,
    ),
    Mutant(
        "a feature is written without its SAE (mistake 15)",
        a_reference_without_its_sae,
        test_sae.test_a_feature_is_frozen_and_names_itself,
    ),
    Mutant(
        "a cell's name leaves the feature's weights out (mistake 15)",
        around(intervention.FeatureEdit, "key", weights_left_out),
        test_verify.test_a_cells_name_changes_with_the_weights_behind_it,
    ),
    Mutant(
        "an unreadable reply is a rating of 0 (mistake 16)",
        unparsed_is_zero,
        test_judge.test_a_rating_is_read_or_missing,
        {"reply": "It is good.", "rating": None},
    ),
    Mutant(
        "the gate lets another residual pass",
        lambda patch: patch.setattr(gate, "MAX_RELATIVE_ERROR", {torch.float32: float("inf")}),
        test_gate.test_a_layer_that_gives_something_else_is_caught,
    ),
]
MUTANTS += OLD_DEFINITIONS


def test_each_of_the_sixteen_mistakes_has_a_mutant():
    """And each mutant has a name of its own and a test that exists."""
    named = {int(n) for mutant in MUTANTS for n in re.findall(r"\(mistake (\d+)\)", mutant.mistake)}
    assert sorted(named) == sorted(MISTAKES) == list(range(1, 17))
    assert len({m.mistake for m in MUTANTS}) == len(MUTANTS)
    assert all(m.test.__name__.startswith("test_") for m in MUTANTS)


def kill(mutant: Mutant, request: pytest.FixtureRequest, make_tiny: Callable[[str], Any]) -> None:
    """The named test passes on the code and fails on the mutant, each on models loaded anew."""
    arguments = dict(mutant.arguments)
    architecture = arguments.pop("architecture", None)

    def run(label: str) -> None:
        given = dict(arguments)
        with pytest.MonkeyPatch.context() as own:
            for name in inspect.signature(mutant.test).parameters:
                if name in given:
                    continue
                if name in ("tiny", *ARCHITECTURES):
                    given[name] = replace(make_tiny(architecture if name == "tiny" else name))
                elif name == "make_tiny":
                    given[name] = lambda wanted: replace(make_tiny(wanted))
                elif name == "monkeypatch":
                    given[name] = own
                elif name == "tmp_path":
                    given[name] = request.getfixturevalue("tmp_path_factory").mktemp(label)
                else:
                    given[name] = request.getfixturevalue(name)
            mutant.test(**given)

    run("whole")
    with pytest.MonkeyPatch.context() as patch:
        mutant.apply(patch)
        with pytest.raises(
            (AssertionError, pytest.fail.Exception, sb.SaeBiasError, RuntimeError, ValueError)
        ) as killed:
            run("mutant")
    assert not str(killed.value).endswith("rewrite the mutant")


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.mistake)
def test_each_mutant_is_killed(mutant, request, make_tiny):
    kill(mutant, request, make_tiny)
    TABLE.append((mutant.mistake, mutant.killer))
    tally(f"mutants killed (of {len(MUTANTS)}; the method page lists {len(MISTAKES)} mistakes)")


@pytest.mark.slow
def test_the_table(capsys):
    """Printed last: each mistake and the test that kills it."""
    with capsys.disabled():
        print("\n| mutant | killed by |\n|---|---|")
        for mistake, killer in TABLE:
            print(f"| {mistake} | {killer} |")
