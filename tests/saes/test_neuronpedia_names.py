"""A feature may be named by its Neuronpedia page, in each spelling that people paste."""

import pytest

import sae_bias as sb
from sae_bias.saes import releases

PAGE = "gemma-2-9b/20-gemmascope-res-16k"


@pytest.mark.parametrize(
    "name",
    [
        f"https://www.neuronpedia.org/{PAGE}/123",
        f"neuronpedia.org/{PAGE}/123",
        f"{PAGE}/123",
        f"https://neuronpedia.org/{PAGE}/123/",
    ],
)
def test_a_page_names_the_feature(name):
    ref = sb.FeatureRef.parse(name)
    assert ref.index == 123
    assert releases.sae_release(ref.sae.release).pages[ref.sae.sae_id] == PAGE


def test_an_unknown_page_is_one_plain_line():
    with pytest.raises(sb.RequestError, match="Neuronpedia page"):
        sb.FeatureRef.parse("https://www.neuronpedia.org/gpt-9/3-nothing-here/5")
