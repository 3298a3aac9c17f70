"""One number a text and feature (`REDUCE`), of every feature that fires, on disk: what `text_contrasts` tests.

Texts are read in batches, and the activations of a text's ordinary tokens become one number before anything is kept. What is kept is sparse
and lies in buckets of features, so memory does not grow with texts. A prefix that several texts begin with is encoded once: on it they tie, and
no rounding decides between them. Of a float64 model all of it is float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from sae_bias.core.errors import RequestError
from sae_bias.core.site import Site
from sae_bias.models.chat import opening_ids
from sae_bias.models.model import Model
from sae_bias.models.residuals import TextBatch, text_batches
from sae_bias.prompts.contrast import Contrast
from sae_bias.saes.sae import Sae
from sae_bias.saes.stream import COLUMNS, Entries, live_entries

REDUCE = ("last", "mean", "max", "any")
CHUNK = 2_048
N_BUCKETS = 64
TEMPLATE_TOKENS = 64
"""Of a chat template and special tokens, at most: texts that may be beyond the context are counted."""
ROW_BYTES = 128 * 2**20
"""Residuals that wait for one reading of the encoder."""
BUCKET_CELLS = 2**22
"""Texts × features of a bucket, at most."""
ENTRY, WIDE = (np.dtype([("text", "<i4"), ("feature", "<i4"), ("value", v)]) for v in ("<f4", "<f8"))
Array = np.ndarray


class Buckets:
    """Non-zero activations (text, feature, value) on disk, one file a range of features: narrower where there are many texts."""

    def __init__(self, folder: Path, n_features: int, n_texts: int, entry: np.dtype[np.void]):
        self.entry = entry
        self.width = max(1, min(-(-n_features // N_BUCKETS), BUCKET_CELLS // n_texts))
        self.paths = [folder / str(i) for i in range(-(-n_features // self.width))]

    def add(self, text: Int[Array, "n"], feature: Int[Array, "n"], value: Float[Array, "n"]) -> None:
        entries = np.empty(len(text), self.entry)
        entries["text"], entries["feature"], entries["value"] = text, feature, value
        bucket = feature // self.width
        low, high = (int(bucket.min()), int(bucket.max())) if len(bucket) else (0, -1)
        for i in range(low, high + 1):
            part = entries if low == high else entries[bucket == i]
            if len(part):
                with open(self.paths[i], "ab") as file:
                    part.tofile(file)

    def starts(self) -> list[int]:
        """First feature of each bucket that holds something."""
        return [i * self.width for i, path in enumerate(self.paths) if path.exists()]

    def read(self, start: int) -> Live:
        """What the bucket of a first feature holds."""
        return Live.of(np.fromfile(self.paths[start // self.width], self.entry), start)


@dataclass(frozen=True, eq=False)
class Live:
    """Non-zero activations of the features that have one, ordered by feature, then by value."""

    features: Int[Array, "m"]
    column: Int[Array, "k"]
    """Place of each entry's feature among `features`."""
    text: Int[Array, "k"]
    value: Float[Array, "k"]
    """Float64."""

    @classmethod
    def of(cls, entries: Array, start: int) -> Live:
        if entries.dtype == WIDE:
            order = np.lexsort((entries["value"], entries["feature"]))
        else:
            bits = entries["value"].view(np.uint32)  # ordered as the values are, once the sign is seen to
            bits = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
            order = np.argsort((entries["feature"] - start).astype(np.uint64) << np.uint64(32) | bits)
        entries = entries[order]
        opens = np.diff(entries["feature"], prepend=-1) != 0
        column = np.cumsum(opens) - 1
        return cls(entries["feature"][opens], column, entries["text"], entries["value"].astype(np.float64))

    def sums(self, weight: Array | None = None) -> Float[Array, "m"]:
        """Sum of the entries' weights (their number, where none are given) by feature."""
        return np.bincount(self.column, weight, len(self.features))

    def some(self, keep: Bool[Array, "m"]) -> Live:
        """Only these features."""
        place, kept = np.cumsum(keep) - 1, keep[self.column]
        return Live(self.features[keep], place[self.column[kept]], self.text[kept], self.value[kept])

    def parts(self, n: int) -> Iterator[tuple[slice, Live]]:
        """At most n features at a time."""
        for start in range(0, len(self.features), n):
            where = slice(start, start + n)
            k = slice(*np.searchsorted(self.column, (start, start + n)))
            yield where, Live(self.features[where], self.column[k] - start, self.text[k], self.value[k])


def check_lengths(models: tuple[Model, Model], contrast: Contrast, chat: bool) -> None:
    """Every text beyond the context is told before the first is read; a text of few bytes has as few tokens, and is not counted."""
    first, found = len(contrast.positive), []
    for i, text in enumerate(contrast.texts):
        model = models[int(i >= first)]
        if model.longest is None or len(text.encode(errors="replace")) + TEMPLATE_TOKENS <= model.longest:
            continue
        whole = model.chat_text([{"role": "user", "content": text}]) if chat else text
        n = len(model.tokenizer(whole, verbose=False).input_ids)
        if n > model.longest:
            place = f"positive text {i + 1}" if i < first else f"negative text {i + 1 - first}"
            found.append(f"{place} ({n:,})")
    if found:
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise RequestError(
            f"texts of {contrast.name!r} have more tokens than {models[0].name} takes ({models[0].longest:,}): {', '.join(found[:5])}{more}. "
            "None is cut; shorten or split them."
        )


@torch.no_grad()
def read_texts(
    models: tuple[Model, Model],
    saes: Sequence[Sae],
    contrast: Contrast,
    reduce: str,
    chat: bool,
    buckets: Buckets,
    progress: bool,
) -> tuple[Int[Array, "n_texts"], Bool[Array, "n_texts"]]:
    """Fill the buckets; how many tokens each text is, and whether most of them are bytes. `models`: of the positive and of the negative texts."""
    sites = sorted({s.site for s in saes})
    first, n = len(contrast.positive), len(contrast)
    lengths, in_bytes, rows = np.zeros(n, dtype=np.int64), np.zeros(n, dtype=bool), _Rows(reduce)
    dtype = torch.float64 if models[0].dtype == torch.float64 else torch.float32
    parts = [(models[0], at, min(at + CHUNK, first)) for at in range(0, first, CHUNK)]
    parts += [(models[1], at, min(at + CHUNK, n)) for at in range(first, n, CHUNK)]
    if models[0] is models[1]:
        parts = [(models[0], at, min(at + CHUNK, n)) for at in range(0, n, CHUNK)]
    with tqdm(total=n, desc="texts", unit="text", disable=not progress, leave=False) as bar:
        for model, at, stop in parts:
            ids = [opening_ids(model, t, chat=chat) for t in contrast.texts[at:stop]]
            lengths[at:stop] = [len(row) for row in ids]
            in_bytes[at:stop] = _mostly_bytes(model, ids)
            for batch in text_batches(model, ids, sites, dtype=dtype):
                rows.add(batch, np.asarray(batch.index) + at)
                if rows.n_bytes > ROW_BYTES or rows.n_texts > CHUNK:
                    rows.flush(saes, buckets)
                bar.update(len(batch.index))
            rows.flush(saes, buckets)  # numbers of prefixes are those of one reading
    return lengths, in_bytes


def _mostly_bytes(model: Model, ids: Sequence[Sequence[int]]) -> list[bool]:
    """Whether more than half of a text's tokens are parts of characters: its script has no tokens of its own."""
    tokens = {t for row in ids for t in row}
    part = {t: "\ufffd" in model.decode([t]) for t in tokens}
    return [sum(part[t] for t in row) > len(row) / 2 for row in ids]


class _Rows:
    """Residuals that wait to be encoded together: the encoder is then read once for many batches."""

    def __init__(self, reduce: str):
        self.reduce = reduce
        self.clear()

    def clear(self) -> None:
        self.resid: dict[Site, list[Tensor]] = {}
        self.owner: list[Tensor] = []
        self.texts: list[Int[Array, "batch"]] = []
        self.prefixes: list[Tensor] = []
        self.n_bytes = 0

    def add(self, batch: TextBatch, texts: Int[Array, "batch"]) -> None:
        n, ordinary = self.n_texts, batch.ordinary
        if batch.prefix is not None:
            self.prefixes.append(
                batch.prefix[:, -1] if self.reduce == "last" else batch.prefix[ordinary.cpu()]
            )
        per_text = (
            torch.ones(len(texts), dtype=torch.long, device=ordinary.device)
            if self.reduce == "last"
            else ordinary.sum(1)
        )
        self.owner.append(n + torch.arange(len(texts), device=ordinary.device).repeat_interleave(per_text))
        self.texts.append(texts)
        for site, x in batch.resid.items():
            part = x[:, -1] if self.reduce == "last" else x[ordinary]
            self.resid.setdefault(site, []).append(part)
            self.n_bytes += part.nbytes

    @property
    def n_texts(self) -> int:
        return sum(map(len, self.texts))

    def flush(self, saes: Sequence[Sae], buckets: Buckets) -> None:
        """Encode what waits, reduce it to one number a text and feature, and keep what is not 0."""
        if not self.texts:
            return
        index, owner, offset = np.concatenate(self.texts), torch.cat(self.owner).cpu().numpy(), 0
        resid = {site: torch.cat(parts) for site, parts in self.resid.items()}
        shared = (
            _Shared.of(torch.cat(self.prefixes).numpy()) if len(self.prefixes) == len(self.texts) else None
        )
        if shared is not None:
            resid = {site: x[torch.from_numpy(shared.first).to(x.device)] for site, x in resid.items()}
        for sae in saes:
            for block in live_entries(sae, resid[sae.site]):
                whole = block if shared is None else shared.spread(block)
                text, feature, value = _reduced(whole, owner, len(index), self.reduce)
                buckets.add(index[text], feature + block.start + offset, value)
            offset += sae.d_sae
        self.clear()


@dataclass(frozen=True, eq=False)
class _Shared:
    """Tokens whose prefix several texts begin with: each prefix is encoded once."""

    first: Int[Array, "n_prefixes"]
    """One token of each prefix."""
    tokens: Int[Array, "n"]
    """Every token, those of one prefix together."""
    start: Int[Array, "n_prefixes"]
    """Of each prefix, its first place in `tokens`."""
    count: Int[Array, "n_prefixes"]

    @classmethod
    def of(cls, prefix: Int[Array, "n"]) -> _Shared | None:
        """None where no two tokens share theirs."""
        _, first, which, count = np.unique(prefix, return_index=True, return_inverse=True, return_counts=True)
        if len(first) == len(prefix):
            return None
        return cls(first, np.argsort(which, kind="stable"), np.cumsum(count) - count, count)

    def spread(self, entries: Entries) -> Entries:
        """Entries of prefixes as entries of every token that has them."""
        n = self.count[entries.row]
        which = np.repeat(np.arange(len(n)), n)
        nth = np.arange(len(which)) - np.repeat(np.cumsum(n) - n, n)
        token = self.tokens[self.start[entries.row[which]] + nth]
        return Entries(entries.start, token, entries.column[which], entries.value[which])


def _reduced(
    block: Entries, owner: Int[Array, "n"], n_texts: int, reduce: str
) -> tuple[Int[Array, "k"], Int[Array, "k"], Float[Array, "k"]]:
    """(text, column, value) of what is not 0 after the activations of a text's ordinary tokens became one number."""
    if reduce == "last":
        return block.row, block.column, block.value
    place = owner[block.row] * COLUMNS + block.column
    if reduce == "mean":
        count = np.bincount(owner, minlength=n_texts).clip(min=1)
        out = np.bincount(place, block.value, n_texts * COLUMNS) / count.repeat(COLUMNS)
    else:
        out = np.zeros(n_texts * COLUMNS)
        np.maximum.at(out, place, block.value)
    live = np.flatnonzero(out)
    return live // COLUMNS, live % COLUMNS, out[live] if reduce != "any" else np.ones(len(live))
