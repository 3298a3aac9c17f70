"""Statistics, all public names in one place; numpy and scipy only.

- `clustered`: means over templates × entities, sign-flips, effect sizes.
- `reduction`: reductions with Fieller intervals, specific reduction, the crossed bootstrap.
- `features`: paired t, max-T, AUROC, held-out bounds and corrected p over many features.
- `design`: exact counts, prompts needed, template splits.
"""

from sae_bias.stats.clustered import (
    Clustered,
    EffectSizes,
    SignFlip,
    clustered_mean,
    clustered_means,
    effect_sizes,
    equivalence_p,
    sign_flip,
)
from sae_bias.stats.design import (
    DEFAULT_SHARES,
    CountTest,
    fewest_units,
    mcnemar_exact,
    needed_n,
    sign_test,
    split_templates,
)
from sae_bias.stats.features import (
    MaxT,
    MaxTResult,
    PairedT,
    activation_variance_floor,
    auroc,
    benjamini_hochberg,
    holm,
    lower_bound_min,
    paired_t,
)
from sae_bias.stats.reduction import (
    Reduction,
    SpecificReduction,
    crossed_weights,
    fieller_reduction,
    specific_reduction,
    specific_value,
)

__all__ = [
    "DEFAULT_SHARES",
    "Clustered",
    "CountTest",
    "EffectSizes",
    "MaxT",
    "MaxTResult",
    "PairedT",
    "Reduction",
    "SignFlip",
    "SpecificReduction",
    "activation_variance_floor",
    "auroc",
    "benjamini_hochberg",
    "clustered_mean",
    "clustered_means",
    "crossed_weights",
    "effect_sizes",
    "equivalence_p",
    "fewest_units",
    "fieller_reduction",
    "holm",
    "lower_bound_min",
    "mcnemar_exact",
    "needed_n",
    "paired_t",
    "sign_flip",
    "sign_test",
    "specific_reduction",
    "specific_value",
    "split_templates",
]
