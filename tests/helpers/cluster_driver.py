"""A sweep on a cluster in a process of its own, for tests that kill it: python cluster_driver.py MODEL SAE OUT ADDRESS."""

from __future__ import annotations

import sys


def main(model: str, sae: str, out: str, address: str) -> None:
    from architectures import NEGATIVE, PAIRS, POSITIVE
    from killed_sweep import sweep_of

    import sae_bias as sb
    from sae_bias.integrations.ray import Cluster

    pairs = sb.PromptPairs(tuple(sb.PromptPair(human, ai, t, e) for t, e, human, ai in PAIRS), name="tiny")
    probe = sb.Probe(POSITIVE, NEGATIVE)
    executor = Cluster(address).run
    sb.run_sweep(sb.load_model(model), pairs, sweep_of(sae), probe=probe, out=out, executor=executor)
    print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:5])
