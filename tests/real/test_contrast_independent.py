"""A contrast's ranking on a real model and SAE, against plain transformers, SAELens' encoder and scikit-learn's AUROC.

SAE_BIAS_REAL_CONTRAST=MODEL_FOLDER:SAE_FOLDER pytest tests/real/test_contrast_independent.py
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

NAMED = os.environ.get("SAE_BIAS_REAL_CONTRAST", "")
TEXTS = Path(__file__).resolve().parents[2] / "experiments" / "public_studies" / "texts"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not NAMED, reason="set SAE_BIAS_REAL_CONTRAST=MODEL:SAE")]


def independent(folder: str, sae_folder: str, texts: list[str], reduce: str) -> np.ndarray:
    """[n_texts, d_sae] by transformers' hidden states and SAELens' JumpReLU SAE."""
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights = load_file(f"{sae_folder}/params.safetensors")
    layer = int(Path(sae_folder).name.split("_")[1])
    d_in, d_sae = weights["w_enc"].shape
    sae = JumpReLUSAE(
        JumpReLUSAEConfig(
            d_in=d_in,
            d_sae=d_sae,
            apply_b_dec_to_input=False,
            normalize_activations="none",
            device="cpu",
            dtype="float32",
        )
    )
    renamed = {
        "W_enc": "w_enc",
        "W_dec": "w_dec",
        "b_enc": "b_enc",
        "b_dec": "b_dec",
        "threshold": "threshold",
    }
    sae.load_state_dict({new: weights[old].float() for new, old in renamed.items()})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    out = []
    for text in texts:
        ids = tokenizer(text).input_ids
        with torch.no_grad():
            acts = sae.encode(
                model(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer + 1][0]
            ).double()
        kept = acts[torch.tensor([i not in special for i in ids])]
        out.append((acts[-1] if reduce == "last" else kept.amax(0)).numpy())
    return np.stack(out)


@pytest.mark.parametrize("reduce", ["last", "max"])
def test_every_auroc_is_that_of_an_independent_script(reduce):
    from sklearn.metrics import roc_auc_score

    import sae_bias as sb

    folder, _, sae = NAMED.partition(":")
    contrast = sb.load_contrast(TEXTS / "refusal.jsonl")
    found = (
        sb.rank_features(sb.load_model(folder), sae, contrast, reduce=reduce).to_frame().set_index("index")
    )
    acts = independent(folder, sae, list(contrast.texts), reduce)
    label = np.arange(len(contrast)) < len(contrast.positive)
    live = np.flatnonzero((acts > 0).any(0))
    assert len(live) > 100
    for i in live:
        assert found.loc[i, "auroc"] == pytest.approx(roc_auc_score(label, acts[:, i]), abs=1e-6)
    assert (found.loc[found.index.difference(live), "auroc"] == 0.5).all()
