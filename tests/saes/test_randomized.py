"""A randomized SAE is as sparse and as loud as the one it stands for, shares none of its directions, and is found by its name."""

from __future__ import annotations

import pytest
import torch

import sae_bias as sb
from sae_bias.saes.randomized import randomized_sae

SAE = "organism:planted/resid_post/layer_3_width_512_l0_small"


@pytest.fixture(scope="module")
def twins():
    sae = sb.load_sae(SAE)
    x = torch.randn(2_000, sae.d_in, generator=torch.Generator().manual_seed(0)) * 6
    return sae, randomized_sae(sae, x, seed=3), x


def test_it_fires_as_often_and_writes_as_long(twins):
    sae, twin, x = twins
    rate, own = ((s.encode(x) > 0).float().mean(0) for s in (twin, sae))
    assert torch.allclose(rate, own, atol=1 / len(x))
    index = range(0, sae.d_sae, 7)
    rows, before = twin.W_dec_rows(list(index)), sae.W_dec_rows(list(index))
    assert torch.allclose(rows.norm(dim=1), before.norm(dim=1), rtol=1e-5)
    cosine = torch.cosine_similarity(rows, before)
    assert cosine.abs().mean() < 2 / sae.d_in**0.5


def test_its_encoder_is_the_same_numbers_in_another_order(twins):
    sae, twin, x = twins
    own, shuffled = sae.columns(5, 8), twin.columns(5, 8)
    assert torch.equal(own.w_enc.sort(0).values, shuffled.w_enc.sort(0).values)
    assert not torch.equal(own.w_enc, shuffled.w_enc)
    h = x @ shuffled.w_enc + shuffled.b_enc
    assert torch.allclose(twin.encode(x)[:, 5:8], h * (h > shuffled.threshold), atol=1e-4)


def test_a_seed_makes_it_and_its_name_finds_it(twins):
    sae, twin, x = twins
    again, other = randomized_sae(sae, x, seed=3), randomized_sae(sae, x, seed=4)
    assert torch.equal(again.W_dec_rows([2]), twin.W_dec_rows([2]))
    assert not torch.equal(other.W_dec_rows([2]), twin.W_dec_rows([2]))
    found = sb.load_feature(f"{twin.id}#2")
    assert torch.equal(found.w_dec, twin.W_dec_rows([2])[0])
    assert str(twin.id) == f"randomized-3/{SAE}"


def test_an_sae_that_encodes_all_features_at_once_is_refused(twins):
    from dataclasses import replace

    sae, _, x = twins
    with pytest.raises(sb.RequestError, match="encodes all features at once"):
        randomized_sae(replace(sae, reduces_to_one_row=False), x)
