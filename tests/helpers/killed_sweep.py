"""A sweep in a process of its own, for tests that kill it: python killed_sweep.py MODEL SAE OUT [--progress]."""

from __future__ import annotations

import sys


def main(model: str, sae: str, out: str) -> None:
    import torch
    from architectures import NEGATIVE, PAIRS, POSITIVE

    import sae_bias as sb

    torch.set_num_threads(1)
    loaded = sb.load_model(model)
    pairs = sb.PromptPairs(tuple(sb.PromptPair(human, ai, t, e) for t, e, human, ai in PAIRS), name="tiny")
    print("ready", flush=True)
    sb.run_sweep(loaded, pairs, sweep_of(sae), probe=sb.Probe(POSITIVE, NEGATIVE), out=out)
    print("done", flush=True)


def sweep_of(sae: str):
    """A few hundred cells in groups, so that a kill falls anywhere."""
    import sae_bias as sb

    cells = [sb.Clamp(f"{sae}#{i}", -0.25 * k) for i in (3, 5, 7, 11) for k in range(50)]
    return sb.Sweep(cells, splits={"tune": ["survive", "deleted"], "report": ["hello"]})


if __name__ == "__main__":
    main(*sys.argv[1:4])
