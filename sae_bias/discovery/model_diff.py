"""What an SAE of one model sees differently in another model of the same architecture (base against instruct, before against after).

Both models read the same texts through one SAE; each text is a pair with itself. Figures are those of a contrast, the model's own reading
above the baseline's: AUROC, mean difference, paired t with sign-flips of whole texts, max-T and Benjamini-Hochberg. An SAE was trained on one
of the two: how well it still reconstructs the other is the gate's figure, and belongs beside every row.
"""

from __future__ import annotations

from collections.abc import Sequence

from sae_bias.core.errors import RequestError
from sae_bias.discovery.ranking import Ranking, load_saes, of_contrast
from sae_bias.discovery.text_contrasts import scan_contrast
from sae_bias.models.model import Model
from sae_bias.prompts.contrast import SameTexts
from sae_bias.saes.ids import SaeId
from sae_bias.saes.sae import Sae


def model_diff(
    model: Model,
    baseline: Model,
    sae: Sae | SaeId | str | Sequence[Sae | SaeId | str],
    texts: Sequence[str],
    *,
    reduce: str = "mean",
    chat: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> Ranking:
    """Features by how much more they fire in `model` than in `baseline` on the same texts.

    Args:
        reduce, chat: as in `rank_features` of a contrast; both models must tokenize the texts alike.

    Raises:
        RequestError: models of different widths or tokens, an SAE that fits neither.
    """
    texts = list(texts)
    for text in texts[:100]:
        if model.encode(text) != baseline.encode(text):
            raise RequestError(
                f"{model.name} and {baseline.name} tokenize {text[:60]!r} differently; they cannot be compared token by token."
            )
    saes = load_saes(model, sae)
    load_saes(baseline, saes)
    scan = scan_contrast(
        model, saes, SameTexts(texts, f"{model.name} against {baseline.name}"), reduce=reduce, chat=chat, baseline=baseline, seed=seed, progress=progress,
    )  # fmt: skip
    return of_contrast(scan, saes)
