"""A user's torch default of float64 changes no figure: weights, activations and statistics keep their own types."""

import numpy as np
import pytest
import torch

import sae_bias as sb


@pytest.fixture
def float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def figures(tiny, pairs, probe):
    ranking = sb.rank_features(tiny.model, str(tiny.sae_folder), pairs, by="attribution", probe=probe).frame
    with sb.intervene(tiny.model, sb.Clamp(tiny.feature(3), np.float32(2.0))):
        clamped = sb.run_probe(tiny.model, pairs, probe).bias
    return ranking[["auroc", "attribution"]].to_numpy(), clamped


def test_figures_are_those_of_float32(gemma3, pairs, probe, request):
    expected = figures(gemma3, pairs, probe)
    request.getfixturevalue("float64")
    found = figures(gemma3, pairs, probe)
    np.testing.assert_array_equal(found[0], expected[0])
    assert found[1] == expected[1]
