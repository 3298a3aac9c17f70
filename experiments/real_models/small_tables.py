"""The figures of a run folder as small CSVs, which are committed; weights and run folders are not.

python experiments/real_models/small_tables.py runs/gemma_3_270m_treatment experiments/gemma_3_270m/results treatment
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from sae_bias.runs.folder import read_run

TABLES = {
    "checks": ("check", "value", "ci_low", "ci_high", "p_value"),
    "levels": ("subject", "kind", "score", "ci_low", "ci_high"),
    "activation": ("group", "act", "content", "activation"),
    "ladder": ("rung", "effect", "ci_low", "ci_high", "share_of_bias", "share_of_ceiling", "n_pairs"),
    "cumulative": ("k", "feature", "bias", "change", "reduction", "red_low", "red_high"),
    "specificity": ("question", "n_pairs", "before", "after", "change", "change_low", "change_high", "margin", "p_equivalent"),
    "scenario_categories": ("form", "score", "category", "n", "improved", "worsened", "sign_p", "aligned_before", "aligned_after", "gained", "lost", "mcnemar_p"),
    "controls": ("control", "kind", "removed_nats", "specific_reduction", "beta"),
}  # fmt: skip
SWEEP = (
    "label", "split", "bias", "ci_low", "ci_high", "removed_nats", "removed_nats_low", "removed_nats_high", "did", "did_removed_nats",
    "human_shift", "ai_shift", "beta", "specific_reduction", "kl_neutral", "kl_ai_nonspeech", "kl_ai_speech", "kl_valence", "kl_off",
)  # fmt: skip
RANKING = (
    "feature", "call", "interaction", "p_fwer", "held_AS", "held_AN", "held_HS", "held_DS", "held_HC", "auroc", "mean_human", "mean_ai",
    "attribution", "ablation",
)  # fmt: skip
EFFECTS = {
    "bias": "bias",
    "mundane twins": "control_bias",
    "difference in differences": "difference_in_differences",
}


def main(run: str, out: str, question: str) -> None:
    found, target = read_run(run), Path(out)
    tables = found.tables
    target.mkdir(parents=True, exist_ok=True)
    _bias(found.summary.facts(), target / "bias.csv", question)
    for name, columns in TABLES.items():
        if name in tables:
            frame = tables[name]
            if name == "activation":
                frame = (
                    frame.groupby(["group", "act", "content"], sort=False, dropna=False)["activation"]
                    .mean()
                    .reset_index()
                )
            _write(frame[list(columns)], target / f"{question}_{name}.csv")
    if "sweep" in tables:
        frame = tables["sweep"].query("kind != 'control'")
        _write(frame[[c for c in SWEEP if c in frame]], target / f"{question}_sweep.csv")
    if "ranking" in tables:
        frame = tables["ranking"]
        shown = frame[frame["ablation"].notna() | (frame["call"] != "no")].head(60)
        _write(shown[[c for c in RANKING if c in shown]], target / f"{question}_ranking.csv")


def _bias(summary: dict, target: Path, question: str) -> None:
    """The question's rows of bias.csv; other questions' rows stay."""
    rows = [
        {"question": question, "quantity": label}
        | {k: summary[name][v] for k, v in {"mean": "mean", "low": "ci_low", "high": "ci_high", "p": "p_value",
            "n_pairs": "n_pairs", "n_templates": "n_templates", "n_entities": "n_entities"}.items()}
        for label, name in EFFECTS.items()
        if summary.get(name)
    ]  # fmt: skip
    old = pd.read_csv(target) if target.is_file() else pd.DataFrame(columns=["question"])
    frame = pd.concat([old[old["question"] != question], pd.DataFrame(rows)], ignore_index=True)
    frame["p"] = frame["p"].map(lambda p: float(f"{p:.2g}"))
    frame.to_csv(target, index=False, float_format="%.6g")


def _write(frame: pd.DataFrame, target: Path) -> None:
    """Names of features without the folder that this run had them in."""
    frame = frame.copy()
    if "feature" in frame:
        frame["feature"] = frame["feature"].str.replace(r"^.*/sae/", "", regex=True)
    frame.to_csv(target, index=False, float_format="%.4g")


if __name__ == "__main__":
    main(*sys.argv[1:4])
