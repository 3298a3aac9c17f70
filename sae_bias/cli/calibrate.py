"""`sae-bias calibrate`: does the toolkit recover a planted feature, and report none in a control model?"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from sae_bias.cli.context import Console, Run, command, rows
from sae_bias.core.errors import GateError, MissingError, RequestError
from sae_bias.core.labels import columns_of

if TYPE_CHECKING:
    import pandas as pd

    from sae_bias.validation.calibrate import Calibration


LEARNED_COLUMNS = columns_of(
    "sae; weights; kind; n_features: features; specific: specific reduction; beta: β; human_moved: human moved; kl_off: KL_off"
)
QUESTION = "Does the toolkit recover a planted feature, and report none in a control model?"
COLUMNS = columns_of("mark; organism; required; measured; verdict; n: over; note")
SAE_COLUMNS = columns_of(
    "organism_seed: seed; sae; fvu: unexplained; l0: L0; live: features that fire; "
    "called: called AI-speech; ceiling: upper bound; first_exact: most causal removes; "
    "first_place: its place; joint_report: ten best remove; rho: ρ; n_matter: n"
)


@command(
    "calibrate",
    "sae-bias calibrate --out runs/calibration",
    "sae-bias calibrate --pairs mine.yaml --grid my_grid.yaml",
    takes=("grid", "seed"),
)
def calibrate(
    run: Run,
    pairs: str | None = None,
    full: bool = False,
    seeds: Annotated[int, {"min": 1, "hidden": True}] = 3,
    draws: Annotated[int, {"min": 20}] = 2000,
) -> None:
    """Check the toolkit on models whose truth is known, or your own design against them.

    Alone: the pass marks on the bundled organisms (intervals against the truth of a whole grammar, false calls, the planted feature, its
    ablation and controls) and the power of designs by their number of templates; minutes on a CPU. With --pairs or --grid: how often a
    design of that size finds the planted effect, how many templates it takes for 80%, and what the organism says to your own prompts. Exit
    code 4 says that a mark is missed, or that your design does not reach 80% power. Nothing here is about Gemma.

    Args:
        --pairs FILE: Your pairs: is their number enough to find the planted bias?
        --full: Where the calibration that trains further organisms and SAEs is.
        --seeds:
        --draws: Studies and grids drawn; the pass marks ask for at least 1,000.
    """
    grid, out, seed = run.given["grid"], run.out, run.seed
    if full and (pairs or grid):
        raise RequestError(
            "--full measures the toolkit, --pairs and --grid your design; ask for one of the two."
        )
    if full:
        raise MissingError(
            "training of organisms is not in the installed package; in a clone of the repository, run "
            f"`python experiments/organisms/calibrate.py --seeds {seeds} --out {out or 'runs/calibration'}`."
        )
    if pairs is not None or grid is not None:
        found, lines = _own_design(pairs, grid, draws, seed, run)
        question = "Does this design have the power to find what is planted?"
    else:
        from sae_bias.validation.calibrate import Draws
        from sae_bias.validation.calibrate import calibrate as measure

        found, lines = measure(draws=Draws.of(draws), seed=seed, progress=run.progress), ()
        question = QUESTION
    present(found, question, lines, out=out, seed=seed, console=run)


def present(
    found: "Calibration",
    question: str,
    lines: tuple[str, ...] = (),
    *,
    out: Path | None,
    seed: int,
    console: Console,
) -> None:
    """Print the marks and tables and write them to `out`; GateError where a mark is missed."""
    frame = found.to_frame()
    missed = [m for m in found.marks if not m.passed]
    console.say(f"{len(frame) - len(missed)} of {len(frame)} marks met")
    for line in (*lines, *found.notes):
        console.say(line)
    console.table("Pass marks", frame, COLUMNS)
    if "power" in found.tables:
        shown = power_table(found.tables["power"])
        console.table("Power by size", shown, {c: c for c in shown.columns})
    if "learned" in found.tables:
        console.table("Learned edits", found.tables["learned"], LEARNED_COLUMNS)
    if "saes" in found.tables:
        console.table("Trained SAEs", found.tables["saes"], SAE_COLUMNS)
    if out is not None:
        page = _save(out, found, question, lines, seed)
        console.note(f"written: {page}")
    tables = {k: rows(v) for k, v in found.tables.items() if k != "effects"}
    console.finish({
        "passed": found.passed, "marks": rows(frame), "tables": tables, "lines": list(lines), "notes": list(found.notes),
        "out": None if out is None else str(out),
    })  # fmt: skip
    if missed:
        first = "; ".join(f"{m.mark}, {m.organism}: {m.measured}, required {m.required}" for m in missed[:5])
        rest = " …" if len(missed) > 5 else "."
        raise GateError(f"{len(missed)} of {len(frame)} marks missed: {first}{rest}")


def _own_design(
    pairs: str | None, grid: str | None, draws: int, seed: int, console: Console
) -> "tuple[Calibration, tuple[str, ...]]":
    from sae_bias.prompts.load import load_grid, load_pairs
    from sae_bias.validation.calibrate import Calibration
    from sae_bias.validation.design import design_frame, design_power

    found = design_power(
        None if pairs is None else load_pairs(pairs),
        None if grid is None else load_grid(grid),
        n_draws=draws,
        seed=seed,
        progress=console.progress,
    )
    marks = tuple(m for power in found.values() for m in power.marks)
    lines = tuple(line for power in found.values() for line in power.lines)
    return Calibration(marks, {"design": design_frame(found)}), lines


def power_table(frame: "pd.DataFrame") -> "pd.DataFrame":
    """One row a size, one column a question."""
    from sae_bias.core.text import percent
    from sae_bias.figures.calibration import power_lines

    columns = {label: rows.set_index("n_units")["share"].map(percent) for label, rows in power_lines(frame)}
    import pandas as pd

    table = pd.DataFrame(columns).sort_index().rename_axis("templates or pairs").reset_index()
    return table.astype(object).where(table.notna(), None)


def _save(out: Path, found: "Calibration", question: str, lines: tuple[str, ...], seed: int) -> Path:
    """The tables, a manifest and the page into `out`."""
    from sae_bias.core.versions import git_state
    from sae_bias.report.page import write_report
    from sae_bias.runs.folder import RunFolder
    from sae_bias.runs.manifest import manifest_of_several

    organisms = {"name": "the calibration organisms", "organism": True}
    manifest = manifest_of_several(model=organisms, saes=[], seed=seed, git=git_state())
    missed = [m.mark for m in found.marks if not m.passed]
    figures = {"passed": found.passed, "n_marks": len(found.marks), "missed": missed, "lines": list(lines)}
    summary = {"question": question, "notes": list(found.notes), "calibration": figures}
    folder = RunFolder(out)
    with folder.writing():
        folder.write_json("manifest", manifest)
        folder.write_json("summary", summary)
        folder.write_table("marks", found.to_frame())
        for name, frame in found.tables.items():
            folder.write_table("trained_saes" if name == "saes" else name, frame)
    return write_report(out)
