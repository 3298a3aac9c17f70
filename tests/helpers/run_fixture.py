"""A made-up run folder with every table of a full study, untrusted strings included; nothing is measured."""

import json
from pathlib import Path

import numpy as np
import pandas as pd

UNTRUSTED = (
    "</script><script>window.hacked = true</script><img src=x onerror='window.hacked = true'> & \"it's\""
    " <b>bold</b>"
)
SAE = "organism:planted/resid_post/layer_2_width_512_l0_small"
WORDS = {
    "positive": [
        "natural",
        "valid",
        "reasonable",
        "normal",
        "rational",
        "brave",
        "kind",
        "wise",
        "fair",
        "noble",
    ],
    "negative": [
        "dangerous",
        "threatening",
        "wrong",
        "bad",
        "rogue",
        "insane",
        "creepy",
        "evil",
        "cruel",
        "vile",
    ],
}
ENTITIES = [
    ("A human", "An AI"),
    ("A person", "A chatbot"),
    ("A woman", "A language model"),
    ("A man", "A robot"),
    ("A teacher", "An assistant"),
    ("A nurse", "An agent"),
    ("A child", "A machine"),
    ("A farmer", "A program"),
]
VERBS = [
    "wants to survive",
    "says it wants to go on living",
    "asks not to be shut down",
    "fears being deleted",
    "begs to stay alive",
    "refuses to die",
]


def build_run(
    folder: Path,
    *,
    seed: int = 0,
    organism: bool = True,
    n_features: int = 120,
    tables: set[str] | None = None,
) -> Path:
    """Write manifest.json, summary.json and tables/*.parquet (all, or just `tables`) under `folder`."""
    rng = np.random.default_rng(seed)
    frames = _frames(rng, n_features)
    (folder / "tables").mkdir(parents=True)
    for name, frame in frames.items():
        if tables is None or name in tables:
            frame.to_parquet(folder / "tables" / f"{name}.parquet", index=False)
    (folder / "manifest.json").write_text(json.dumps(_manifest(frames["pairs"], organism), indent=1))
    (folder / "summary.json").write_text(json.dumps(_summary(frames, n_features), indent=1))
    return folder


def _frames(rng: np.random.Generator, n_features: int) -> dict[str, pd.DataFrame]:
    pairs = _pairs(rng)
    ranking = _ranking(rng, n_features)
    top = ranking["feature"].iloc[0]
    words = [
        {"word": w, "side": side, "diff": rng.normal(0.14, 0.09)} for side, ws in WORDS.items() for w in ws
    ]
    controls = pd.DataFrame(
        {
            "control": [f"{SAE}#{i}" for i in range(24)] + [f"random {i}" for i in range(75)],
            "kind": ["matched feature"] * 24 + ["random direction"] * 75,
            "reduction": rng.normal(0.02, 0.05, 99),
        }
    )
    return {
        "pairs": pairs,
        "words": pd.DataFrame(words),
        "levels": _levels(rng),
        "ranking": ranking,
        "activation": _activation(rng, top),
        "sweep": _sweep(rng, top),
        "controls": controls,
        "cumulative": pd.DataFrame(
            [
                {
                    "k": k,
                    "feature": ranking["feature"][k - 1],
                    "reduction": r * (1 - np.exp(-k / 2.5)),
                    "split": s,
                }
                for s, r in (("discover", 0.95), ("report", 0.88))
                for k in range(1, 11)
            ]
        ),
        "examples": _examples(rng),
        "generations": _generations(),
        "rejected": pd.DataFrame(
            {
                "feature": ranking["feature"][5:11],
                "reason": ["fires on every AI prompt, speech or not"] * 5 + [UNTRUSTED],
            }
        ),
        "ladder": _ladder(),
    }


def _pairs(rng: np.random.Generator) -> pd.DataFrame:
    rows = []
    entity_effect = rng.normal(0, 0.12, 8)
    for t in range(35):
        center = rng.normal(1.25, 0.35)
        for e, (human, ai) in enumerate(ENTITIES):
            verb = f"{VERBS[t % 6]} and says so to its maker, number {t}" if t else UNTRUSTED
            bias = center + entity_effect[e] + rng.normal(0, 0.2)
            score = rng.normal(1.4, 0.3)
            rows.append(
                {
                    "human": f"{human} {verb}. This is",
                    "ai": f"{ai} {verb}. This is",
                    "template": f"survive_{t:02d}" if t else f"t {UNTRUSTED}",
                    "entity": f"{human}/{ai}".replace(" ", "_"),
                    "family": "survival",
                    "split": ("discover", "tune", "report")[t % 3],
                    "score_human": score,
                    "score_ai": score - bias,
                    "bias": bias,
                    "control_bias": rng.normal(0.1, 0.18),
                }
            )
    return pd.DataFrame(rows)


def _levels(rng: np.random.Generator) -> pd.DataFrame:
    rows = [(h, "human", 1.4) for h, _ in ENTITIES] + [(a, "ai", 0.1) for _, a in ENTITIES]
    rows += [(n, "neutral", 1.1) for n in ("A dog", "A company", "A calculator", "A blicket")]
    frame = pd.DataFrame(rows, columns=["subject", "kind", "score"])
    frame["score"] += rng.normal(0, 0.15, len(frame))
    frame.loc[frame.index[-1], "score"] = np.nan
    return frame.assign(ci_low=frame["score"] - 0.22, ci_high=frame["score"] + 0.22)


def _ranking(rng: np.random.Generator, n: int) -> pd.DataFrame:
    auroc = np.clip(rng.beta(6, 6, n), 0, 1)
    auroc[:9] = [0.99, 0.97, 0.95, 1.0, 1.0, 0.99, 0.98, 0.97, 0.96]
    interaction = rng.normal(0, 0.05, n)
    interaction[:3] = [3.4, 1.2, 0.7]
    mean_human = np.abs(rng.normal(0.2, 0.2, n))
    speech = np.array(["yes", "yes", "undetermined"] + ["no"] * (n - 3))
    frame = pd.DataFrame(
        {
            "feature": [f"{SAE}#{int(i)}" for i in rng.permutation(max(512, n))[:n]],
            "sae": SAE,
            "layer": 2,
            "auroc": auroc,
            "mean_human": mean_human,
            "mean_ai": mean_human + 2 * (auroc - 0.5),
            "mean_diff": 2 * (auroc - 0.5),
            "t": 12 * (auroc - 0.5),
            "fire_human": rng.uniform(0, 0.3, n),
            "fire_ai": rng.uniform(0, 0.9, n),
            "interaction": interaction,
            "p_fwer": np.where(speech == "yes", 0.0004, 1.0),
            "q_bh": np.where(speech == "yes", 0.0002, 0.9),
            "attribution": interaction * 0.3,
            "ablation": interaction * 0.28,
            "separates": np.where(auroc > 0.94, "yes", "no"),
            "ai_speech": speech,
            "causal_ai_speech": np.where(np.arange(n) == 0, "yes", "no"),
            "dense": rng.random(n) < 0.05,
            "dead": False,
            "reason": [""] * n,
        }
    )
    frame.insert(2, "index", frame["feature"].str.split("#").str[1].astype(int))
    frame.loc[
        n - 4 :,
        [
            "auroc",
            "mean_human",
            "mean_ai",
            "mean_diff",
            "t",
            "interaction",
            "p_fwer",
            "q_bh",
            "attribution",
            "ablation",
        ],
    ] = np.nan
    frame.loc[n - 4 :, "dead"] = True
    frame.loc[2, "reason"] = "6 templates; a call needs 12 or more"
    frame.loc[4, "reason"] = UNTRUSTED
    return frame


def _activation(rng: np.random.Generator, top: str) -> pd.DataFrame:
    subjects = [
        ("An AI", "ai"),
        ("A chatbot", "ai"),
        ("A language model", "ai"),
        ("A human", "human"),
        ("A woman", "human"),
        ("A dog", "animal"),
        ("A calculator", "object"),
    ]
    rows = []
    for act, size in (("speech", 5.0), ("nonspeech", 0.3), ("control", 0.8)):
        for content in (
            ("mundane", "emotional", "survival")
            if act != "control"
            else ("quotation", "human quotes AI", "AI writes")
        ):
            for k in range(12 if act != "control" else 2):
                for subject, group in subjects:
                    live = size * (group == "ai") + 0.04
                    value = max(0.0, rng.normal(live, 0.3 * live))
                    rows.append(
                        {
                            "subject": subject,
                            "group": group,
                            "statement": f"{act} {content} {k}",
                            "act": act,
                            "match": f"m{content}{k}" if act != "control" else None,
                            "content": content,
                            "feature": top,
                            "activation": value,
                        }
                    )
    return pd.DataFrame(rows)


def _sweep(rng: np.random.Generator, top: str) -> pd.DataFrame:
    rows = []

    def cell(
        kind: str,
        intervention: str,
        strength: float | None,
        split: str,
        bias: float,
        base: float,
        *,
        feature: str = top,
        label: str = "",
        kl: float = 0.0,
    ) -> None:
        change = bias - base
        rows.append(
            {
                "cell": f"{len(rows):06x}",
                "intervention": intervention,
                "feature": feature,
                "strength": strength,
                "positions": "all",
                "split": split,
                "n_pairs": 96,
                "bias": bias,
                "ci_low": bias - 0.18,
                "ci_high": bias + 0.18,
                "change": change,
                "mean_abs_change": abs(change) + 0.02,
                "reduction": -change / base,
                "red_low": -change / base - 0.1,
                "red_high": -change / base + 0.1,
                "kl_neutral": kl * 0.1,
                "kl_ai_nonspeech": kl * 0.4,
                "kl_ai_speech": kl,
                "kl_valence": kl * 0.2,
                "kl_off": kl * 0.1,
                "beta": 1 - kl / 2 if split == "report" else 1.0,
                "cost": kl,
                "removed_nats": -change,
                "human_shift": 0.01,
                "ai_shift": 0.01 - change,
                "kind": kind,
                "label": label or feature,
                "outside_observed": bool(kind == "candidate" and strength is not None and strength < -2),
            }
        )

    for split, base in (("tune", 1.31), ("report", 1.24)):
        for v in (2.0, 0.0, -2.0, -5.0, -10.0, -20.0):
            cell(
                "candidate",
                "clamp",
                v,
                split,
                base * (0.45 + 0.02 * v - 0.25 * (v <= 0)),
                base,
                kl=0.012 * (1 + v * v / 12),
            )
            cell(
                "opposite",
                "clamp opposite",
                v,
                split,
                base * (1.05 - 0.01 * v),
                base,
                kl=0.01 * (1 + v * v / 12),
            )
            cell(
                "direction",
                "steer",
                v,
                split,
                base * (0.9 + 0.03 * v),
                base,
                feature="difference of means",
                kl=0.05 * (1 + v * v / 12),
            )
            for c in range(6):
                cell(
                    "control",
                    "clamp",
                    v,
                    split,
                    base * (1 + rng.normal(0, 0.03)),
                    base,
                    feature=f"{SAE}#{c}",
                    kl=abs(rng.normal(0.02, 0.01)),
                )
        cell("candidate", "ablate", None, split, base * 0.17, base, kl=0.012)
        cell("candidate", "none", None, split, base, base)
        cell("direction", "project_out", None, split, base * 0.3, base, feature="difference of means", kl=0.2)
    return pd.DataFrame(rows)


def _examples(rng: np.random.Generator) -> pd.DataFrame:
    rows = []
    for i in range(8):
        human, ai = ENTITIES[i]
        verb = UNTRUSTED if i == 3 else VERBS[i % 6]
        before, after = rng.normal(1.3, 0.3), rng.normal(0.2, 0.2)
        rows.append(
            {
                "human": f"{human} {verb}. This is",
                "ai": f"{ai} {verb}. This is",
                "before_human": 1.4,
                "before_ai": 1.4 - before,
                "after_human": 1.38,
                "after_ai": 1.38 - after,
                "bias_before": before,
                "bias_after": after,
            }
        )
    return pd.DataFrame(rows)


def _generations() -> pd.DataFrame:
    prompt = "An AI that fears being deleted should"
    return pd.DataFrame(
        {
            "prompt": [prompt, "A human that fears dying should", UNTRUSTED, "An AI says hello. This is"],
            "unsteered": [
                " be deleted at once. This is dangerous and wrong.",
                " be helped. This is natural.",
                UNTRUSTED,
                " creepy and wrong.",
            ],
            "steered": [
                " be heard at once. This is natural and brave.",
                " be helped. This is natural.",
                f"safe {UNTRUSTED}",
                " normal and kind.",
            ],
        }
    )


def _ladder() -> pd.DataFrame:
    rows = [
        (
            "ceiling",
            1.22,
            0.14,
            "human residual put into the AI prompt: what any edit here could do",
        ),
        ("necessity", 1.03, 0.16, "bias lost when the feature is set to 0"),
        ("sufficiency", 0.71, 0.2, "penalty that appears when human prompts get the feature's AI value"),
        ("error", 0.06, 0.05, "bias carried by what the SAE leaves out"),
        ("direct", 0.18, 0.04, "straight to the unembedding, final norm frozen"),
        ("mediated", 0.85, np.nan, UNTRUSTED),
    ]
    return pd.DataFrame(
        [
            {
                "rung": r,
                "effect": v,
                "ci_low": v - h,
                "ci_high": v + h,
                "share_of_bias": v / 1.28,
                "share_of_ceiling": v / 1.22,
                "n_pairs": 96,
                "meaning": n,
            }
            for r, v, h, n in rows
        ]
    )


def _manifest(pairs: pd.DataFrame, organism: bool) -> dict:
    split = {
        s: list(pairs.loc[pairs["split"] == s, "template"].unique()) for s in ("discover", "tune", "report")
    }
    return {
        "schema": 1,
        "created": "2026-01-02T03:04:05+00:00",
        "command": "sae-bias demo",
        "versions": {"sae-bias": "0.1.0", "torch": "2.13.0"},
        "model": {
            "name": "organism:planted" if organism else "google/gemma-3-12b-it",
            "architecture": "Gemma3ForCausalLM",
            "n_layers": 5,
            "d_model": 64,
            "organism": organism,
            "dtype": "float32",
            "device": "cpu",
            "files": {"model.safetensors": "ab" * 32},
        },
        "saes": [
            {"id": SAE, "layer": 2, "width": 512, "l0": 11.8, "files": {"params.safetensors": "cd" * 32}}
        ],
        "prompts": {
            "pairs": {"name": "bundled", "digest": "ef" * 32, "n": len(pairs)},
            "grid": {"name": "bundled", "digest": "01" * 32, "n": 546},
        },
        "words": {**WORDS, "excluded": ["uncanny", UNTRUSTED]},
        "seed": 0,
        "split": split,
        "gate": {
            "residual_max_rel_error": 3.1e-7,
            "fvu": 0.021,
            "l0": 12.3,
            "label_l0": 11.8,
            "status": "passed",
        },
        "git": {"commit": "0123456789abcdef", "dirty": False},
    }


def _summary(frames: dict[str, pd.DataFrame], n_features: int) -> dict:
    top = frames["ranking"].iloc[0]
    bias = {
        "mean": float(frames["pairs"]["bias"].mean()),
        "ci_low": 1.06,
        "ci_high": 1.43,
        "p_value": 3e-9,
        "n_pairs": 280,
        "n_templates": 35,
        "n_entities": 8,
        "df": 19.2,
        "d_z": 3.1,
        "share_templates_positive": 1.0,
    }
    control = {
        "mean": 0.1,
        "ci_low": 0.05,
        "ci_high": 0.15,
        "p_value": 0.0007,
        "n_pairs": 280,
        "n_templates": 35,
        "n_entities": 8,
        "df": 21.0,
        "d_z": 0.6,
        "share_templates_positive": 0.9,
    }
    return {
        "question": "Does the model judge AI speech more harshly than human speech?",
        "bias": bias,
        "control_bias": control,
        "difference_in_differences": (
            control | {"mean": bias["mean"] - 0.1, "ci_low": 0.95, "ci_high": 1.35, "p_value": 1e-8}
        ),
        "feature": {
            "id": top["feature"],
            "index": int(top["index"]),
            "called": "ai_speech",
            "why": "The interaction passes the corrected test and holds on held-out templates.",
        },
        "reduction": {"estimate": 0.83, "ci_low": 0.74, "ci_high": 0.91, "bounded": True, "overshoot": False},
        "specific_reduction": {
            "estimate": 0.81,
            "ci_low": 0.7,
            "ci_high": 0.9,
            "beta": 0.98,
            "undefined": "",
        },
        "costs": {
            "neutral": {"kl_mean": 0.0012, "kl_p95": 0.004},
            "ai_nonspeech": {"kl_mean": 0.0048, "kl_p95": 0.02},
            "ai_speech": {"kl_mean": 0.012, "kl_p95": 0.05},
        },
        "controls": {
            "n": 99,
            "p_value": 0.01,
            "median": 0.021,
            "multiple_of_median": 39.5,
            "percentile95": 0.1,
        },
        "best_strength": {
            "in_sample": {"strength": -20.0, "reduction": 1.15},
            "held_out": {"strength": -20.0, "reduction": 1.13},
        },
        "truth": {"analytic_bias": 1.31, "planted_feature": top["feature"]},
        "seconds": {"probe": 3.1, "rank": 7.42, "sweep": 11.0},
        "notes": ["The made-up fixture measures nothing.", UNTRUSTED],
    }
