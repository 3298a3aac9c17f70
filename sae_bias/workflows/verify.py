"""Re-computing a run from its folder alone: what agrees, within which tolerance, and what differs.

Three kinds of checks, from the copies that stand in the folder:

- hashes: the model's and the SAEs' files, the prompts and the words against what the manifest says of them;
- the folder against itself: each row of the sweep's table against the cells it is made of, each mean against its pairs (pairs of no
  split are in no table: they are compared where their cell is measured again);
- measured again: the probe of every pair, and a sample of cells (or all) with their costs, on the model as it is now.

A cell is the scores of each prompt, so it is compared prompt by prompt: the largest |now - then| over max(1, |then|). Rounding
depends on precision, device and on what is batched together, so the tolerance is the precision's, ten times as wide on another
device. Figures of costs and of the valence banks are compared in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from sae_bias.core.errors import RequestError, SaeBiasError
from sae_bias.core.files import digest
from sae_bias.core.versions import definitions_of, versions
from sae_bias.models.fingerprint import model_digest, model_files
from sae_bias.models.load import load_model
from sae_bias.models.model import Model
from sae_bias.probe.run import run_probe
from sae_bias.probe.words import Probe
from sae_bias.prompts.pairs import PromptPairs
from sae_bias.runs.copies import edit_from_facts, grid_from_copy, pairs_from_copy, probe_from_facts
from sae_bias.runs.folder import RunFolder, reading
from sae_bias.saes.load import load_sae
from sae_bias.saes.sae import sae_facts
from sae_bias.workflows import verify_checks as checks
from sae_bias.workflows.cells import Cell, Sweep
from sae_bias.workflows.sweep import FORMAT, collect, read_sweep, run_sweep
from sae_bias.workflows.verify_checks import AGREES, DIFFERS, UNCHECKED, Check, measured, need_columns

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
"""Largest difference allowed between two measurements of one number, by precision."""
OTHER_DEVICE = 10.0
SAMPLE = 8
SCORES = ("score_human", "score_ai", "bias")


@dataclass(frozen=True)
class Verification:
    """Every check of one run folder."""

    path: Path
    checks: list[Check] = field(repr=False)
    n_cells: int
    """Cells that were measured again."""
    of_cells: int

    @property
    def agrees(self) -> bool:
        """Whether nothing that was checked differs."""
        return not self.differing

    @property
    def differing(self) -> list[Check]:
        return [c for c in self.checks if c.status == DIFFERS]

    def to_frame(self) -> pd.DataFrame:
        """One row a check."""
        return pd.DataFrame([vars(c) for c in self.checks])


def verify_run(
    path: str | Path,
    *,
    cells: int | None = SAMPLE,
    model: str | None = None,
    device: str | None = None,
    progress: bool = False,
) -> Verification:
    """Check a run folder against itself, its inputs' hashes, and the model measured again.

    Args:
        cells: how many cells of a sweep to measure again (the base and the first candidate always); None for all.
        model: where the model is now, if not under the name in the manifest.
        device: where to run; the manifest's own by default.

    Raises:
        RequestError: no run folder, or one whose files cannot be read.
        MissingError: the model or an SAE is not available.
    """
    if cells is not None and cells < 0:
        raise RequestError(f"{cells} cells: expected a number from 0.")
    return _Verifier(RunFolder(path), cells, model, device, progress).run()


class _Verifier:
    def __init__(
        self, folder: RunFolder, n_cells: int | None, model: str | None, device: str | None, progress: bool
    ):
        self.folder, self.wanted, self.progress = folder, n_cells, progress
        if not folder.path.is_dir():
            raise RequestError(f"there is no run folder {folder.path}.")
        self.manifest = folder.read_json("manifest")
        places = [p.parent for p in sorted(folder.path.rglob("sweep.json"))]
        self.sweeps = [RunFolder(p) for p in places if "shards" not in p.relative_to(folder.path).parts]
        self.given_model, self.given_device = model, device
        self.checks: list[Check] = []
        self.n_cells = self.of_cells = 0
        self.same_device = 0.0

    def run(self) -> Verification:
        facts = checks.as_mapping(self.manifest.get("model"), f"{self.folder.path}/manifest.json: its model")
        if not isinstance(facts.get("digest"), str):
            raise RequestError(
                f"{self.folder.path}/manifest.json names no measured model; give the folder of one model, such as RUN/models/NAME."
            )
        self.pairs = self.read_prompts(self.folder, self.manifest)
        self.model = self.load(facts)
        own = self.same_device = TOLERANCE.get(str(facts.get("dtype")), TOLERANCE["float32"])
        self.tolerance = own if facts.get("device") == self.model.device.type else own * OTHER_DEVICE
        with reading(f"{self.folder.path}/manifest.json"):
            self.checks += [*self.environment(), *self.model_files(facts), *self.saes(), *self.words()]
        if "pairs" in self.folder.tables():
            self.checks += self.base_table()
        self.checks += checks.definitions_note(definitions_of(self.manifest))
        for folder in self.sweeps:
            self.checks += self.sweep(folder)
        return Verification(self.folder.path, self.checks, self.n_cells, self.of_cells)

    # --- hashes ---

    def read_prompts(self, folder: RunFolder, manifest: Mapping[str, Any]) -> PromptPairs | None:
        """The stored copies of the prompts, checked against their hashes; the pairs among them."""
        where = f"{folder.path}/manifest.json"
        copies = checks.as_mapping(manifest.get("copies"), f"{where}: its copies")
        known = checks.as_mapping(manifest.get("prompts"), f"{where}: its prompts")
        found: dict[str, Any] = {}
        for kind, read in (("pairs", pairs_from_copy), ("grid", grid_from_copy)):
            if not known.get(kind):
                continue
            what = f"{self.name_of(folder)}prompts: {kind}"
            expected = str(checks.as_mapping(known[kind], f"{where}: its {kind}").get("digest"))
            if kind not in copies:
                self.checks.append(Check(what, UNCHECKED, "the folder holds no copy (an older sae-bias)"))
                continue
            found[kind] = read(copies[kind], where)
            own = found[kind].digest
            good = Check(what, AGREES, f"{len(found[kind])} prompts, sha256 {expected[:12]}")
            bad = Check(what, DIFFERS, f"the copy has sha256 {own[:12]}, the manifest says {expected[:12]}")
            self.checks.append(good if own == expected else bad)
        return found.get("pairs")

    def name_of(self, folder: RunFolder) -> str:
        """What a sweep's checks are called: nothing for the run's own, the subfolder for another."""
        inside = folder.path.relative_to(self.folder.path).as_posix()
        return "" if inside == "." else f"{inside}: "

    def words(self) -> list[Check]:
        words = self.manifest.get("words")
        if not isinstance(words, dict) or not words.get("positive") or "digest" not in words:
            return []
        now = digest(words["positive"], words.get("negative"))
        if now != words["digest"]:
            return [Check("words", DIFFERS, f"hash {now}, not {words['digest']}")]
        n = len(words["positive"]) + len(words.get("negative") or [])
        return [Check("words", AGREES, f"{n} words, sha256 {now}")]

    def model_files(self, facts: Mapping[str, Any]) -> list[Check]:
        """Each file of the model; where it was an object in memory, nothing is known of its files."""
        what, then = f"model {self.model.name}", facts.get("files") or {}
        if then:
            return [checks.compare_files(what, then, model_files(self.model))]
        if facts.get("digest") == model_digest(self.model):
            return [Check(what, AGREES, "the same hash")]
        return [Check(what, UNCHECKED, "it was an object in memory; its scores tell")]

    def saes(self) -> list[Check]:
        """The file of each SAE in the manifests of the run and of its sweep."""
        manifests = [self.manifest, *(m for f in self.sweeps if (m := _own_manifest(f)) is not None)]
        known = {str(s.get("id")): s for m in manifests for s in m.get("saes") or [] if isinstance(s, dict)}
        return [
            checks.compare_files(f"SAE {name}", facts["files"], sae_facts(load_sae(name))["files"])
            if facts.get("files")
            else Check(f"SAE {name}", UNCHECKED, "it was an object in memory")
            for name, facts in known.items()
        ]

    def environment(self) -> list[Check]:
        """Versions and device that are others than the run's: told, because figures may differ by rounding."""
        then, now = self.manifest.get("versions") or {}, versions()
        other = [f"{k} {then[k]} → {now.get(k)}" for k in then if now.get(k) != then[k]]
        device = (self.manifest.get("model") or {}).get("device")
        if device != self.model.device.type:
            other.append(f"device {device} → {self.model.device.type}")
        return [Check("environment", checks.NOTE, "; ".join(other))] if other else []

    # --- measured again ---

    def load(self, facts: Mapping[str, Any]) -> Model:
        """The model in the precision of the run, on its device where there is one."""
        device = self.given_device or str(facts.get("device") or "auto")
        if self.given_device is None and device == "cuda" and not torch.cuda.is_available():
            device = "auto"
        name = self.given_model or str(facts.get("name"))
        model = load_model(name, device=device, dtype=str(facts.get("dtype") or "auto"))
        model.pin_chat(facts.get("chat") or {})
        return model

    def base_table(self) -> list[Check]:
        """tables/pairs: every pair's scores, and the summary's mean over them."""
        table = self.folder.read_table("pairs")
        where = f"{self.folder.path}/tables/pairs.parquet"
        need_columns(table, SCORES, where)
        bias, found = self.folder.read_summary().bias, []
        if bias is not None and bias.mean is not None:  # the headline's mean against the pairs it is over
            then, now = bias.mean, float(table["bias"].mean())
            told = f"{then:.6g} stored, {now:.6g} from its table"
            part = np.array([now]), np.array([then]), lambda i: told
            found = [checks.compare("summary: bias", [part], checks.TABLE_TOLERANCE, f"{then:+.4f}")]
        if self.pairs is None or self.manifest.get("probe") is None:
            return [*found, Check("probe", UNCHECKED, "the folder does not say how it was probed")]
        probe = probe_from_facts(self.manifest["probe"], f"{self.folder.path}/manifest.json")
        again = run_probe(self.model, self.pairs, probe, controls=False, levels=False)
        values = {"score_human": again.score_human, "score_ai": again.score_ai, "bias": again.pair_bias}
        return [self.compare("probe: every pair's scores", table, values), *found]

    def sweep(self, folder: RunFolder) -> list[Check]:
        """The sweep's table against its cells, and some cells against the model."""
        facts, own, name = read_sweep(folder), _own_manifest(folder), self.name_of(folder)
        listed, where = facts["cells"], f"{folder.path}/sweep.json"
        pairs, cells = self.pairs, f"{name or 'sweep: '}cells"
        if own is not None and folder.path != self.folder.path:
            if (own.get("model") or {}).get("digest") != (self.manifest.get("model") or {}).get("digest"):
                return [Check(cells, UNCHECKED, "it is of another model; verify that folder separately")]
            pairs = self.read_prompts(folder, own)
        self.of_cells += len(listed)
        if all(folder.has_cell(str(c["cell"])) for c in listed):
            found = self.sweep_table(folder)
        else:
            unfinished = "the sweep is not finished; the same command goes on"
            found = [Check(f"{name or 'sweep: '}table", UNCHECKED, unfinished)]
        if pairs is None or not isinstance(facts.get("probe"), dict):
            return [
                *found,
                Check(f"{name}cells", UNCHECKED, "the folder holds no copies (an older sae-bias)"),
            ]
        probe = probe_from_facts(facts["probe"], where)
        return [*found, *self.cells(folder, facts, pairs, probe)]

    def sweep_table(self, folder: RunFolder) -> list[Check]:
        name, made = self.name_of(folder) or "sweep: ", collect(folder.path)
        version, stored = definitions_of(_own_manifest(folder) or self.manifest), folder.read_table("sweep")
        return [
            checks.compare_tables(f"{name}table made again from its cells", made.frame, stored, version),
            checks.compare_within(f"{name}bias of every pair = score_human - score_ai", made.cells),
        ]

    def cells(
        self, folder: RunFolder, facts: Mapping[str, Any], pairs: PromptPairs, probe: Probe
    ) -> Iterator[Check]:
        """A sample of cells measured again, with costs where the sweep had them."""
        chosen = [c for c in checks.sample(facts["cells"], self.wanted) if folder.has_cell(str(c["cell"]))]
        directions = facts["directions"] if isinstance(facts.get("directions"), dict) else {}
        rebuilt: list[tuple[Mapping[str, Any], Cell]] = []
        for stored in chosen:
            try:
                edits = tuple(edit_from_facts(e, directions, self.model) for e in stored.get("edits") or [])
                rebuilt.append((stored, Cell(edits, str(stored.get("kind")), str(stored.get("label")))))
            except SaeBiasError as error:
                yield Check(checks.cell_name(stored), UNCHECKED, f"its edit cannot be made again: {error}")
        if not rebuilt:
            return
        sweep = Sweep([cell for _, cell in rebuilt if cell.edits], costs=bool(facts.get("costs")))
        again = run_sweep(self.model, pairs, sweep, probe=probe, progress=self.progress)
        base, *names = again.frame["cell"]  # one split: a row a cell, the base, which is always run, first
        for stored, cell in rebuilt:
            name = names.pop(0) if cell.edits else base
            self.n_cells += 1
            then = folder.read_cell(str(stored["cell"]))
            yield self.compare_cell(stored, then, again.cells[name], name, facts.get("format") == FORMAT)

    def compare_cell(
        self, stored: Mapping[str, Any], then: pd.DataFrame, now: pd.DataFrame, name: str, same_format: bool
    ) -> Check:
        """One cell; its name, a hash of its inputs, is compared where both were made by the same format."""
        what = checks.cell_name(stored)
        need_columns(then, SCORES, what)
        check = self.compare(
            what, then, {c: now[c].to_numpy() for c in SCORES}, checks.kept_numbers(then, now)
        )
        here = self.given_model is None and self.tolerance == self.same_device
        if here and same_format and check.status == AGREES and name != stored["cell"]:
            return Check(
                what, DIFFERS, "its scores agree, but its inputs have another hash: model, prompts, words or SAE changed",
                check.difference, check.tolerance,
            )  # fmt: skip
        return check

    def compare(
        self, what: str, then: pd.DataFrame, now: Mapping[str, np.ndarray], kept: Sequence[checks.Part] = ()
    ) -> Check:
        """Stored columns against fresh ones, pair by pair; `kept`: further numbers."""
        parts = [
            measured(checks.numbers(then[c]), values, lambda i, c=c: f"{c} of {checks.pair_name(then, i)}")
            for c, values in now.items()
        ]
        return checks.compare(what, [*parts, *kept], self.tolerance, f"{len(then)} pairs")


def _own_manifest(folder: RunFolder) -> dict[str, Any] | None:
    return folder.read_json("manifest") if (folder.path / "manifest.json").is_file() else None
