"""A run folder: what was run, and its results as Parquet parts that survive a crash.

    RUN/manifest.json          what was asked and with what: model, SAEs, prompts, words, versions, command, seed
    RUN/summary.json           the headline figures
    RUN/sweep.json             the latest sweep: every cell in order (name, rule, strength, kind), the splits, its key
    RUN/tables/NAME.parquet    one table each; sweep.parquet has one row a cell and split
    RUN/cells/NAME.parquet     one cell: a row a pair (template, entity, score_human, score_ai, bias); facts in `frame.attrs`
    RUN/shards/I-of-N/         the same for one shard, until `sae-bias merge RUN` joins its cells to the run's own

All of it is read with `pandas.read_parquet` and a text editor. Everything is written to a temporary file beside its place and moved
there in one step, so a reader never sees half a file. A cell's name is a hash of all that determines its numbers: cells of a changed
input stand beside the old ones under other names, and sweep.json says which are the latest. One process writes a folder at a time,
held by a lock of the operating system that dies with its process.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import ValidationError

from sae_bias.core.errors import RequestError, SaeBiasError
from sae_bias.core.files import make_folder, plain, storage_error, writing_whole
from sae_bias.figures.style import SIDES
from sae_bias.runs.summary import Summary

SCHEMA = 1
_MALFORMED = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RecursionError)
_CELL_NAME = re.compile(r"[A-Za-z0-9_-]{1,80}")


class RunFolder:
    """One run's files."""

    def __init__(self, path: str | Path, *, shard: tuple[int, int] | None = None):
        self.root = Path(path)
        if shard is not None and not 1 <= shard[0] <= shard[1]:
            raise RequestError(f"shard {shard[0]}/{shard[1]}: expected i/n with 1 ≤ i ≤ n.")
        self.path = self.root if shard is None else self.root / "shards" / f"{shard[0]}-of-{shard[1]}"
        self.shard = shard

    @contextmanager
    def writing(self) -> Iterator[RunFolder]:
        """Hold the folder's lock; a second process is told, and nothing is touched."""
        make_folder(self.path)
        try:
            lock = open(self.path / ".lock", "a")  # noqa: SIM115
        except OSError as error:
            raise storage_error(self.path / ".lock", error) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise RequestError(
                    f"another process is writing {self.path}; wait for it, or choose another --out."
                ) from error
            for part in (self.path, self.path / "tables", self.path / "cells"):
                for stray in part.glob("*.partial"):  # of a process that was killed; nobody else writes here
                    stray.unlink(missing_ok=True)
            yield self

    # --- tables and JSON ---

    def write_table(self, name: str, frame: pd.DataFrame) -> None:
        """tables/NAME.parquet."""
        with writing_whole(self.path / "tables" / f"{name}.parquet") as partial:
            frame.to_parquet(partial, index=False)

    def read_table(self, name: str) -> pd.DataFrame:
        path = self.path / "tables" / f"{name}.parquet"
        if not path.is_file():
            raise RequestError(f"{self.path} holds no table {name!r}.")
        return _read_parquet(path)

    def tables(self) -> list[str]:
        return sorted(p.stem for p in (self.path / "tables").glob("*.parquet"))

    def write_json(self, name: str, data: Mapping[str, object]) -> None:
        """NAME.json, NaN written as null."""
        text = json.dumps(plain(dict(data)), indent=1, ensure_ascii=False, allow_nan=False)
        with writing_whole(self.path / f"{name}.json") as partial:
            partial.write_text(text + "\n", encoding="utf-8")

    def has_json(self, name: str) -> bool:
        return (self.path / f"{name}.json").is_file()

    def read_json(self, name: str) -> dict[str, Any]:
        path = self.path / f"{name}.json"
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise RequestError(
                f"{self.path} is not a run folder: it has no {name}.json. Try a folder that `sae-bias demo` or `run` wrote."
            ) from error
        except (OSError, ValueError, RecursionError) as error:
            raise RequestError(f"{path} cannot be read: {error}.") from error
        if not isinstance(data, dict):
            raise RequestError(f"{path} holds a {type(data).__name__}; expected an object.")
        return data

    def read_summary(self) -> Summary:
        """summary.json as typed values; empty where there is none yet.

        Raises:
            RequestError: it holds something else than a summary.
        """
        if not self.has_json("summary"):
            return Summary()
        data = self.read_json("summary")
        try:
            return Summary.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(p) for p in first["loc"])
            raise RequestError(f"{self.path}/summary.json: {where}: {first['msg']}.") from error

    def add_summary(self, blocks: Mapping[str, object]) -> Summary:
        """Put blocks into summary.json, beside those that other commands wrote."""
        summary = Summary.from_facts({**self.read_summary().facts(), **blocks})
        self.write_json("summary", summary.facts())
        return summary

    # --- cells ---

    def has_cell(self, cell: str) -> bool:
        return self._cell(cell).is_file()

    def write_cell(self, cell: str, frame: pd.DataFrame, facts: Mapping[str, object]) -> None:
        """One cell's pairs, with `facts` in the frame's attrs."""
        frame = frame.copy()
        frame.attrs = plain(dict(facts))
        with writing_whole(self._cell(cell)) as partial:
            frame.to_parquet(partial, index=False)

    def read_cell(self, cell: str) -> pd.DataFrame:
        return _read_parquet(self._cell(cell))

    def _cell(self, cell: str) -> Path:
        if not _CELL_NAME.fullmatch(cell):
            raise RequestError(f"{cell[:60]!r} is not the name of a cell in {self.path}.")
        return self.path / "cells" / f"{cell}.parquet"


@dataclass(frozen=True)
class Run:
    """A run folder as read, whole: what the report is made of."""

    folder: Path
    manifest: dict[str, Any]
    summary: Summary
    tables: dict[str, pd.DataFrame]
    """Those that hold a row."""

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def organism(self) -> bool:
        return bool(self.model.get("organism"))

    @property
    def model(self) -> dict[str, Any]:
        model = self.manifest.get("model") or {}
        return model if isinstance(model, dict) else {"name": str(model)}

    @property
    def sides(self) -> tuple[str, str]:
        """What the two sides of a pair are called in this run: bias = s(first) - s(second)."""
        return self.summary.sides or SIDES

    @property
    def stand_ins(self) -> bool:
        """Whether random checkpoints stood in for the models: plumbing, no figure means anything."""
        return bool(self.manifest.get("stand_ins"))


def read_run(path: str | Path) -> Run:
    """Manifest, summary and tables of a run folder; only the manifest must be there.

    Raises:
        RequestError: no run folder, or a file of it that cannot be read.
    """
    folder = RunFolder(path)
    manifest = folder.read_json("manifest")
    tables = {name: folder.read_table(name) for name in folder.tables()}
    beside = (
        folder.path / "comparison.parquet"
    )  # methods at equal cost, where an older run has them in its root
    if beside.is_file() and "method" in (found := _read_parquet(beside)):
        tables.setdefault("compare", found)
    filled = {name: table for name, table in tables.items() if len(table)}
    return Run(folder.path, manifest, folder.read_summary(), filled)


def merge_shards(path: str | Path) -> int:
    """Move the cells of every shard into the run's own folder; returns how many were new.

    Raises:
        RequestError: no shards, shards of different sweeps, or one that is still being written.
    """
    run = RunFolder(path)
    found = sorted((run.root / "shards").glob("*-of-*"))
    shards = [p for p in found if re.fullmatch(r"\d{1,6}-of-\d{1,6}", p.name)]
    if not shards:
        raise RequestError(f"{run.root} has no shards to merge.")
    plans = [RunFolder(shard).read_json("sweep") for shard in shards if (shard / "sweep.json").is_file()]
    if len({plan.get("key") for plan in plans}) > 1:
        raise RequestError(
            f"the shards in {run.root} are of different sweeps; run each with the same command but for --shard i/n."
        )
    moved = 0
    with run.writing():
        if plans:
            run.write_json("sweep", {**plans[0], "shard": None})
        if not (run.path / "manifest.json").is_file() and (shards[0] / "manifest.json").is_file():
            run.write_json("manifest", RunFolder(shards[0]).read_json("manifest"))
        for shard in shards:
            i, n = (int(x) for x in shard.name.split("-of-"))
            with RunFolder(run.root, shard=(i, n)).writing():
                for part in sorted((shard / "cells").glob("*.parquet")):
                    if not run.has_cell(part.stem):
                        make_folder(run.path / "cells")
                        os.replace(part, run._cell(part.stem))
                        moved += 1
    return moved


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Whatever is malformed in a stored file becomes one RequestError that names it."""
    try:
        yield
    except SaeBiasError:
        raise
    except _MALFORMED as error:
        raise RequestError(f"{what} cannot be read ({type(error).__name__}: {str(error)[:120]}).") from error


def _read_parquet(path: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(path)
    except Exception as error:
        raise RequestError(f"{path} cannot be read ({type(error).__name__}: {error}).") from error
