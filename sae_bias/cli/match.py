"""`sae-bias match`: the counterpart of a feature in another model."""

from sae_bias.cli.context import Run, command, picked, rows
from sae_bias.core.errors import RequestError
from sae_bias.core.labels import columns_of

COLUMNS = columns_of(
    "feature; rho: ρ; p_fwer; mutual; class: on in; same_class; removed: bias removed; removed_low: from; "
    "removed_high: to; same_sign"
)


@command(
    "match",
    "sae-bias match organism:planted/constructed#0 organism:planted-gemma2 organism:planted-gemma2/SAE",
    "sae-bias match SAE_FOLDER#446 google/gemma-2-9b gemma-scope-9b-pt-res/layer_20/width_16k/average_l0_68 --of google/gemma-3-12b-pt --causal",
    takes=("grid", "pairs", "words", "seed", "device", "device_map", "dtype"),
)
def match(
    run: Run, feature: str, model: str, sae: list[str], of: str | None = None, causal: bool = False
) -> None:
    """Find the feature of another model that does what this one does.

    Compared are the activations on one bank of prompts: mutual nearest neighbors, a permutation null over every feature scanned,
    the same class in the 2 × 2. "Functionally similar" is the most that can be said.

    Args:
        FEATURE: The feature to find again.
        MODEL: The model to find it in.
        SAE...: SAEs of that model; one family.
        --of MODEL: The feature's own model; by default the one its SAE names.
        --causal: Also ablate both features: their effects must agree in sign.
    """
    from sae_bias.discovery.matching import match_features
    from sae_bias.saes.load import as_feature, load_sae

    grid, wanted = run.grid, as_feature(feature)
    pairs = run.pairs if causal or run.given["pairs"] is not None else None
    release = str(wanted.ref.sae.release)
    own_sae, saes = load_sae(wanted.ref.sae), [load_sae(name) for name in sae]
    own = of or (release if release.startswith("organism:") else own_sae.model_name)
    if own is None:
        raise RequestError(f"which model is {feature} of? Its SAE does not say; give --of MODEL.")
    first = run.load(own)
    second = run.model = first if own == model else run.load(model)
    run.check(first, [own_sae])
    run.check(second, saes)
    found = match_features(
        wanted, first, second, saes, grid, pairs=pairs, probe=None if pairs is None else run.probe, seed=run.seed, progress=run.progress
    )  # fmt: skip
    best = None if found.best is None else str(found.best)
    figures = {"feature": str(found.feature), "of": own, "best": best, "verdict": found.verdict}
    run.save({"matches": found.to_frame()}, {"match": figures}, pairs=pairs, grid=grid, saes=saes)
    run.say(f"{found.feature} of {own}, on in {found.profile_class}: {found.verdict}")
    run.note_gate()
    run.table("The most similar features", found.to_frame(), COLUMNS)
    more = picked(found, "margin n_prompts family_size") | {"class": found.profile_class}
    run.done({**figures, **more, "candidates": rows(found.to_frame())})
