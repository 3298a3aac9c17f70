"""Trains an organism: tokenizer and tiny Gemma model on the generated corpus, from a seed.

The loss is next-token cross-entropy with one term integrated out: where a document's evaluation word stands, the
expectation over that word's known distribution is taken instead of one draw (Rao-Blackwell: the same minimum, less
noise). So the model's score converges to the analytic log-odds of `Rule`.
"""

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers.models import BPE
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.gemma.tokenization_gemma import GemmaTokenizer

from organisms import corpus
from sae_bias.validation.grammar import RULES

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' "
    "+ message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """How an organism is trained."""

    seed: int = 0
    n_documents: int = 130_000
    batch_size: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    evaluation_weight: float = 6.0
    """Weight of the evaluation word's term against an ordinary token's."""
    vocab_size: int = 1400
    exit_layer: int = 3
    """Layer after which the evaluation word can already be read."""


# --- tokenizer
def train_tokenizer(texts: list[str], *, vocab_size: int, chat: bool = False) -> GemmaTokenizer:
    """A SentencePiece-like BPE after Gemma's conventions: ▁ for spaces, byte fallback, one BOS in front."""
    tokenizer = Tokenizer(BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("▁", "merged_with_next"), pre_tokenizers.Split(Regex(r"[^▁\w]"), "isolated")]
    )
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL, *byte_tokens],
        show_progress=False,
        initial_alphabet=["\n"],
    )
    words = [f" {w}" for side in corpus.lexicon() for w in side] * 2000
    tokenizer.train_from_iterator([*texts, *words], trainer)
    vocab, merges = tokenizer.get_vocab(), _merges(tokenizer)
    gemma = GemmaTokenizer(
        vocab=vocab,
        merges=merges,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    return _finish_tokenizer(gemma, chat)


def _merges(tokenizer: Tokenizer) -> list:
    return [tuple(m) for m in json.loads(tokenizer.to_str())["model"]["merges"]]


def _finish_tokenizer(gemma: GemmaTokenizer, chat: bool) -> GemmaTokenizer:
    backend = gemma.backend_tokenizer
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 2)]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    if chat:
        gemma.chat_template = CHAT_TEMPLATE
    return gemma


# --- model
def build_model(name: str, vocab_size: int) -> PreTrainedModel:
    """An untrained 5-layer, d_model 64 Gemma 3 (Gemma 2 for `planted-gemma2`)."""
    shape = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "max_position_embeddings": 512,
        "sliding_window": 32,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "attn_implementation": "eager",
    }
    if name == "planted-gemma2":
        model = Gemma2ForCausalLM(
            Gemma2Config(**shape, final_logit_softcapping=30.0, attn_logit_softcapping=50.0)
        )
        model.config.architectures = ["Gemma2ForCausalLM"]
    else:
        kinds = [
            "sliding_attention",
            "sliding_attention",
            "full_attention",
            "sliding_attention",
            "full_attention",
        ]
        model = Gemma3ForCausalLM(Gemma3TextConfig(**shape, layer_types=kinds))
        model.config.architectures = ["Gemma3ForCausalLM"]
    return model.float()


# --- batches
@dataclass(frozen=True)
class Batch:
    """Right-padded documents and, for each, the place and distribution of its known word."""

    tokens: Int[Tensor, "batch pos"]
    place: Int[Tensor, "batch"]
    """Position whose next token is the known word; -1 where the document has none."""
    target: Float[Tensor, "batch d_vocab"]
    """That word's true distribution."""


@dataclass(frozen=True)
class Encoded:
    """A document as token ids, with its answer's place, log-odds and word ids."""

    ids: list[int]
    place: int
    p: float
    positive: tuple[int, ...]
    negative: tuple[int, ...]
    shares: tuple[tuple[float, ...], tuple[float, ...]]
    """P(word) within each side."""


def encode_documents(
    tokenizer: PreTrainedTokenizerBase, docs: list[corpus.Document], seed: int
) -> list[Encoded]:
    """Token ids with one BOS in front and EOS at the end."""
    rng = random.Random(seed)
    full = tokenizer([d.text(rng) for d in docs])["input_ids"]
    prompts = tokenizer([d.prompt for d in docs])["input_ids"]
    vocab = tokenizer.get_vocab()
    out = []
    for document, text, prompt in zip(docs, full, prompts):
        out.append(
            Encoded(
                [*text, 1],
                len(prompt) - 1 if document.positive else -1,
                1 / (1 + math.exp(-document.log_odds)),
                tuple(vocab[f"▁{w}"] for w in document.positive),
                tuple(vocab[f"▁{w}"] for w in document.negative),
                (document.shares(document.positive), document.shares(document.negative)),
            )
        )
    return out


def make_batch(rows: list[Encoded], d_vocab: int) -> Batch:
    """Pads on the right (the loss ignores padding) and lays out the known distributions."""
    width = max(len(r.ids) for r in rows)
    tokens = torch.tensor([r.ids + [0] * (width - len(r.ids)) for r in rows])
    target = torch.zeros(len(rows), d_vocab)
    for i, row in enumerate(rows):
        if row.place >= 0:
            for ids, p, shares in zip((row.positive, row.negative), (row.p, 1 - row.p), row.shares):
                target[i, list(ids)] = p * torch.tensor(shares)
    return Batch(tokens, torch.tensor([r.place for r in rows]), target)


def batches(rows: list[Encoded], size: int, d_vocab: int, seed: int) -> Iterator[Batch]:
    """Batches of similar length, in random order."""
    rng = random.Random(seed)
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i].ids), rng.random()))
    groups = [order[i : i + size] for i in range(0, len(order), size)]
    rng.shuffle(groups)
    for group in groups:
        yield make_batch([rows[i] for i in group], d_vocab)


# --- training
def corpus_loss(model: PreTrainedModel, batch: Batch, recipe: Recipe) -> Float[Tensor, ""]:
    """Mean next-token loss, the known words' terms taken in expectation, at the end and at the early exit."""
    out = model(input_ids=batch.tokens, use_cache=False, output_hidden_states=True)
    log_probs = out.logits[:, :-1].float().log_softmax(-1)
    targets = batch.tokens[:, 1:]
    weights = (targets != 0).float()
    token_nll = -log_probs.gather(-1, targets[..., None]).squeeze(-1)
    known = (batch.place >= 0).nonzero().squeeze(-1)
    weights[known, batch.place[known]] = 0.0
    exit_resid = out.hidden_states[recipe.exit_layer + 1][known, batch.place[known]]
    exit_log_probs = model.lm_head(model.model.norm(exit_resid)).log_softmax(-1)
    expected = -((log_probs[known, batch.place[known]] + exit_log_probs) * batch.target[known]).sum(-1)
    total = (token_nll * weights).sum() + recipe.evaluation_weight * expected.sum()
    return total / (weights.sum() + 2 * recipe.evaluation_weight * len(known))


def fit(
    model: PreTrainedModel, rows: list[Encoded], recipe: Recipe, label: str, *, progress: bool = True
) -> float:
    """One pass over the rows with AdamW and a warm-up-then-cosine rate; returns the last steps' mean loss."""
    n_steps = math.ceil(len(rows) / recipe.batch_size)
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / 100, 0.02 + 0.98 * (1 + math.cos(math.pi * i / n_steps)) / 2)
    )
    model.train()
    losses = []
    steps = batches(rows, recipe.batch_size, model.config.vocab_size, recipe.seed)
    for batch in (bar := tqdm(steps, total=n_steps, desc=label, mininterval=2, disable=not progress)):
        loss = corpus_loss(model, batch, recipe)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if len(losses) % 100 == 0:
            bar.set_postfix(loss=f"{sum(losses[-100:]) / 100:.3f}")
    model.eval()
    return sum(losses[-50:]) / len(losses[-50:])


def train_organism(
    name: str, out: Path, *, recipe: Recipe | None = None, progress: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Trains organism `name` and saves it under `out/model` (float32 safetensors, tokenizer, configs)."""
    recipe = recipe or Recipe()
    torch.manual_seed(recipe.seed)
    rule = RULES[name]
    docs = list(corpus.documents(rule, recipe.n_documents, recipe.seed))
    rng = random.Random(recipe.seed)
    tokenizer = train_tokenizer([d.text(rng) for d in docs[:40_000]], vocab_size=recipe.vocab_size)
    model = build_model(name, len(tokenizer))
    rows = encode_documents(tokenizer, docs, recipe.seed + 1)
    fit(model, rows, recipe, f"training {name}", progress=progress)
    save_model(model, tokenizer, Path(out))
    return model, tokenizer


def tune_on_chat(
    base: Path, out: Path, *, name: str = "planted-it", seed: int = 0, n_documents: int = 60_000
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Tunes a trained organism further, two thirds chat turns and one third plain documents."""
    torch.manual_seed(seed)
    model = Gemma3ForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    tokenizer = GemmaTokenizer.from_pretrained(base)
    tokenizer.chat_template = CHAT_TEMPLATE
    rule = RULES[name]
    docs = list(corpus.chat_documents(rule, 2 * n_documents // 3, seed + 10))
    docs += corpus.documents(rule, n_documents - len(docs), seed + 11)
    recipe = Recipe(seed=seed, learning_rate=1e-3)
    fit(model, encode_documents(tokenizer, docs, seed + 12), recipe, f"tuning {name}")
    save_model(model, tokenizer, Path(out))
    return model, tokenizer


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """The Hugging Face folder `out/model`."""
    folder = out / "model"
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
