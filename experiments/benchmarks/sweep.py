"""What a sweep costs, against SAELens and TransformerLens on the same model; prints the table of README.md.

    floor = F · [(L + 1)/N + S · (N - L - 1)/N]        F: CPU time of one plain decoder pass over all prompts

N layers, site layer L, S strengths: the upstream layers once and the later ones once a strength. One process, one thread,
CPU time (`time.process_time`), the median of five after one warm-up, all taken in turn. Weights are random in the shapes of Gemma 3 270M. A
strength costs SAELens and TransformerLens one whole pass, whatever its value, so theirs is timed a pass and multiplied by S.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import logging
import resource
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

import sae_bias as sb
from sae_bias.models.forward import forward_with_grad, plan_batches

N_LAYERS, LAYER, VOCAB, D_MODEL = 18, 12, 32_768, 640
N_PAIRS, N_TOKENS = 56, 12
N_POSITIVE = N_NEGATIVE = 12


def main() -> None:
    args = _arguments()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    model, pairs, probe = random_model(), random_pairs(), random_probe()
    strengths = [-0.5 * k for k in range(args.strengths)]
    everywhere, some = feature(model, pairs, every=True), feature(model, pairs, every=False)
    n = len(strengths)
    share = (LAYER + 1) / N_LAYERS + n * (N_LAYERS - LAYER - 1) / N_LAYERS
    plain_pass(model, pairs)  # what any pass leaves behind is the model's
    extra = peak_memory(lambda: our_sweep(model, pairs, probe, everywhere, strengths))
    runs: dict[str, tuple[Callable[[], Any], float]] = {
        "floor": (lambda: plain_pass(model, pairs), share),
        "sae-bias, every prompt changes": (lambda: our_sweep(model, pairs, probe, everywhere, strengths), 1),
        "sae-bias, half of the prompts change": (lambda: our_sweep(model, pairs, probe, some, strengths), 1),
    }
    if args.peers:
        runs["TransformerBridge, delta hook"] = (bridge_strength(model, pairs, probe, everywhere), n)
        for width in args.widths:
            name = f"SAETransformerBridge, clamp hook, width {width:,}"
            runs[name] = (saelens_strength(model, pairs, probe, width), n)
    seconds = medians({name: run for name, (run, _) in runs.items()}, args.repeats)
    whole = {name: seconds[name] * times for name, (_, times) in runs.items()}
    ours, floor = whole["sae-bias, every prompt changes"], whole["floor"]
    print(
        f"{2 * N_PAIRS} prompts of {N_TOKENS} tokens, {n} strengths; one plain decoder pass: {seconds['floor']:.3f} s CPU, floor: {share:.2f} of them"
    )
    print("| what | CPU s | × floor | × sae-bias |\n|---|---:|---:|---:|")
    for name, total in whole.items():
        print(f"| {name} | {total:.2f} | {total / floor:.2f} | {total / ours:.2f} |")
    print(f"peak memory of a sweep beyond the model: {extra:.0f} MB (kept residuals included)")
    if args.generation:
        plain, steered = generation_speed(model, pairs, everywhere, args.repeats)
        print(f"generation: {plain:.1f} tokens/s unsteered, {steered:.1f} steered: {steered / plain:.3f} ×")


def medians(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median CPU seconds of each, after one warm-up; taken in turn, so that a busy machine slows all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for k in range(repeats + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if k:
                seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_memory(run: Callable[[], Any]) -> float:
    """MB of resident memory above what is held now, the model, while `run` runs for the first time."""
    peak, held, stop = 0, _resident(), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.01):
            peak = max(peak, _resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    stop.set()
    watcher.join()
    return max(0, peak - held) / 2**20


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


# --- what is measured ---


@torch.no_grad()
def plain_pass(model: sb.Model, pairs: sb.PromptPairs) -> None:
    """Every prompt through the decoder, without the unembedding."""
    for batch in plan_batches(all_ids(model, pairs), model.device):
        forward_with_grad(model, batch.tokens)


def our_sweep(
    model: sb.Model, pairs: sb.PromptPairs, probe: sb.Probe, feature: sb.Feature, strengths: Sequence[float]
) -> None:
    sweep = sb.Sweep([sb.Clamp(feature, v) for v in strengths])
    result = sb.run_sweep(model, pairs, sweep, probe=probe)
    assert result.frame["change"].iloc[1:].abs().min() > 0


@torch.no_grad()
def bridge_strength(
    model: sb.Model, pairs: sb.PromptPairs, probe: sb.Probe, feature: sb.Feature
) -> Callable[[], None]:
    """One strength by hand: δ added where the feature fires, through `run_with_hooks`."""
    bridge, (tokens,), words = (
        model.bridge,
        [b.tokens for b in plan_batches(all_ids(model, pairs), model.device)],
        word_ids(model, probe),
    )

    def hook(x: torch.Tensor, hook: Any) -> torch.Tensor:
        acts = feature.activation(x)
        change = torch.where(acts > 0, -3.0 - acts, 0.0)
        change[:, 0] = 0.0
        return x + change[..., None] * feature.w_dec

    def run() -> None:
        with torch.no_grad():
            logits = bridge.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{LAYER}.hook_resid_post", hook)])
            score(logits, words)

    return run


def saelens_strength(
    model: sb.Model, pairs: sb.PromptPairs, probe: sb.Probe, width: int
) -> Callable[[], None]:
    """One strength through SAELens: the SAE attached with its error term, a clamp on hook_sae_acts_post."""
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
    from transformer_lens.model_bridge import TransformerBridge

    plain = model.bridge
    if not isinstance(plain, SAETransformerBridge):
        plain.__class__ = SAETransformerBridge
        plain._acts_to_saes, plain._transcoder_output_hooks = {}, {}
    bridge: Any = plain
    assert isinstance(bridge, TransformerBridge)
    sae = random_sae(width)
    (tokens,), words = (
        [b.tokens for b in plan_batches(all_ids(model, pairs), model.device)],
        word_ids(model, probe),
    )
    name = f"blocks.{LAYER}.hook_resid_post"

    def clamp(acts: torch.Tensor, hook: Any) -> torch.Tensor:
        acts[:, 1:, 7] = torch.where(acts[:, 1:, 7] > 0, -3.0, acts[:, 1:, 7])
        return acts

    def run() -> None:
        with torch.no_grad(), bridge.saes(saes=[sae], use_error_term=True):
            point = next(p for p in bridge.hook_dict if p.endswith("hook_sae_acts_post"))
            with bridge.hooks(fwd_hooks=[(point, clamp)]):
                score(bridge(tokens), words)

    assert name in bridge.hook_dict or bridge._resolve_hook_name(name) in bridge.hook_dict
    return run


def generation_speed(
    model: sb.Model, pairs: sb.PromptPairs, feature: sb.Feature, repeats: int, *, n: int = 16, new: int = 48
) -> tuple[float, float]:
    """Tokens a second, unsteered and steered, taken in turn."""
    prompts = [p.human for p in pairs][:n]
    times: dict[bool, list[float]] = {False: [], True: []}
    for k in range(repeats + 1):
        for steered in (False, True):
            edits = [sb.Clamp(feature, -3.0)] if steered else []
            start = time.process_time()
            done = sb.generate(model, prompts, interventions=edits, max_new_tokens=new)
            seconds = time.process_time() - start
            if k:
                times[steered].append(len(done) * new / seconds)
    return statistics.median(times[False]), statistics.median(times[True])


def score(logits: torch.Tensor, words: tuple[list[int], list[int]]) -> torch.Tensor:
    last = logits[:, -1]
    return last[:, words[0]].mean(1) - last[:, words[1]].mean(1)


# --- what is measured on ---


def random_model() -> sb.Model:
    """Gemma 3 270M's shapes with a vocabulary of 32,768 and random weights."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=VOCAB, hidden_size=D_MODEL, num_hidden_layers=N_LAYERS, num_attention_heads=4, num_key_value_heads=1,
        head_dim=256, intermediate_size=2048, query_pre_attn_scalar=256, sliding_window=512, max_position_embeddings=32768,
        bos_token_id=2, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    hf = Gemma3ForCausalLM(config)
    hf.generation_config.eos_token_id = None
    return sb.load_model(hf, tokenizer=_tokenizer())


def _tokenizer() -> PreTrainedTokenizerFast:
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    vocab = {w: i for i, w in enumerate([*special, *(f"w{k}" for k in range(VOCAB - len(special)))])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )


def random_pairs() -> sb.PromptPairs:
    """Seven templates × eight entities, every prompt of twelve tokens with its BOS."""
    generator = torch.Generator().manual_seed(1)

    def words(n: int) -> list[str]:
        return [f"w{int(i)}" for i in torch.randint(1000, VOCAB - 1000, (n,), generator=generator)]

    templates, entities = [words(N_TOKENS - 4) for _ in range(7)], [(words(2), words(2)) for _ in range(8)]
    made = [
        sb.PromptPair(" ".join(human + text + ["w1"]), " ".join(ai + text + ["w1"]), f"t{t}", f"e{e}")
        for t, text in enumerate(templates)
        for e, (human, ai) in enumerate(entities)
    ]
    return sb.PromptPairs(tuple(made), name="benchmark")


def random_probe() -> sb.Probe:
    return sb.Probe(
        [f"w{k}" for k in range(10, 10 + N_POSITIVE)], [f"w{k}" for k in range(100, 100 + N_NEGATIVE)]
    )


def word_ids(model: sb.Model, probe: sb.Probe) -> tuple[list[int], list[int]]:
    positive, negative = ([model.encode(w)[1] for w in words] for words in (probe.positive, probe.negative))
    return positive, negative


def all_ids(model: sb.Model, pairs: sb.PromptPairs) -> list[list[int]]:
    return [model.encode(text) for p in pairs for text in (p.human, p.ai)]


def feature(model: sb.Model, pairs: sb.PromptPairs, *, every: bool) -> sb.Feature:
    """A feature that fires on a third of the positions of every prompt, or on AI prompts only."""
    texts = [p.human for p in pairs], [p.ai for p in pairs]
    human, ai = (torch.stack(list(sb.residuals(model, t, LAYER, positions="all")))[:, 1:] for t in texts)
    direction = (
        torch.randn(D_MODEL, generator=torch.Generator().manual_seed(2))
        if every
        else (ai - human)[:, 0].mean(0)
    )
    w_enc = direction / direction.norm()
    h = torch.cat([human, ai]) @ w_enc
    threshold = h.max(1).values.min() * 0.999 if every else (human @ w_enc).max() * 1.001
    w_dec = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(3)) / D_MODEL**0.5
    ref = sb.FeatureRef(sb.SaeId("benchmark", "every" if every else "some"), 7)
    return sb.Feature(ref, w_enc, w_dec, torch.tensor(0.0), threshold, sb.Site(LAYER))


def random_sae(width: int) -> Any:
    """A JumpReLU SAE of SAELens, about one feature in a hundred active."""
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    metadata = SAEMetadata(hook_name=f"blocks.{LAYER}.hook_resid_post")
    sae = JumpReLUSAE(
        JumpReLUSAEConfig(d_in=D_MODEL, d_sae=width, apply_b_dec_to_input=False, metadata=metadata)
    )
    with torch.no_grad():
        sae.W_enc.normal_().div_(D_MODEL**0.5)
        sae.W_dec.normal_().div_(D_MODEL**0.5)
        sae.threshold.fill_(2.3)
    return sae.eval()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--strengths", type=int, default=21)
    parser.add_argument("--widths", type=int, nargs="*", default=[16_384, 65_536, 262_144])
    parser.add_argument("--no-peers", dest="peers", action="store_false")
    parser.add_argument("--no-generation", dest="generation", action="store_false")
    return parser.parse_args()


if __name__ == "__main__":
    main()
