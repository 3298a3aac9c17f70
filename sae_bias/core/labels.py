"""What columns of tables are called on paper and in the terminal: one name for one column.

columns_of("sae; n_pairs; ci_low; ci_high; kl_off: KL_off")
# {"sae": "SAE", "n_pairs": "pairs", "ci_low": "from", "ci_high": "to", "kl_off": "KL_off"}
"""

LABELS = {
    "ci_low": "from",
    "ci_high": "to",
    "p_value": "p",
    "n_pairs": "pairs",
    "auroc": "AUROC",
    "beta": "β",
    "p_fwer": "family-wise p",
    "q_bh": "q",
    "sae": "SAE",
    "reduction": "removed",
    "removed_nats": "nats removed",
    "specific_reduction": "specific",
    "human_shift": "human moved",
    "ai_shift": "AI moved",
    "share_of_bias": "share of the bias",
    "share_templates_positive": "templates above 0",
    "change_low": "change from",
    "change_high": "change to",
    "mean_abs_change": "mean |change|",
    "n_templates": "templates",
    "n_entities": "entities",
    "d_z": "d_z",
}
"""Columns that are called the same everywhere; others are called by their own name, without underscores."""


def columns_of(spec: str) -> dict[str, str]:
    """Columns and their labels, in order: `name`, or `name: label` where it is called otherwise here; `;` between them."""
    found = {}
    for part in spec.split("; "):
        name, _, label = part.partition(": ")
        found[name] = label or LABELS.get(name, name.replace("_", " "))
    return found
