"""No figure and no number of a report prints a computer's exponent."""

import pandas as pd

from sae_bias.core.text import number
from sae_bias.figures.features import activation_heatmap


def test_cells_of_the_activation_map_are_plain_numbers():
    same = {"feature": "a#1", "act": "speech", "content": "", "group": "ai", "subject": "robot"}
    rows = [
        {**same, "statement": s, "activation": v} for s, v in (("one", 927.3), ("two", 0.0), ("three", 4.25))
    ]
    (heat,) = activation_heatmap(pd.DataFrame(rows)).data
    assert [list(row) for row in heat.text] == [["927", "0", "4.25"]]
    assert heat.texttemplate == "%{text}"


def test_a_number_that_rounds_up_to_a_thousand_has_no_exponent():
    assert number(999.7) == "1,000"
    assert number(-999.5) == "−1,000"
    assert number(999.4) == "999"
