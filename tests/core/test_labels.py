"""One name for one column, in the report and in the terminal."""

from sae_bias.core.labels import columns_of


def test_columns_keep_their_order_and_say_only_what_differs():
    found = columns_of("sae; n_pairs; outside_observed; kl_off_p95: KL_off, 95th percentile; ci_low; ci_high")
    assert list(found.items()) == [
        ("sae", "SAE"),
        ("n_pairs", "pairs"),
        ("outside_observed", "outside observed"),
        ("kl_off_p95", "KL_off, 95th percentile"),
        ("ci_low", "from"),
        ("ci_high", "to"),
    ]
