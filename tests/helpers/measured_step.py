"""Peak memory of one step of a study in a process of its own: python measured_step.py MODEL STUDY.yaml STEP [SAE#INDEX].

Prints the MB that loading the model and running the step add, at their peak, to a process that has imported everything and has run
the step once on a tiny model (`MODEL/../tiny`).
"""

from __future__ import annotations

import sys
from pathlib import Path


def status(line: str) -> float:
    with open("/proc/self/status") as f:
        return next(int(text.split()[1]) for text in f if text.startswith(line)) / 1024


def run(folder: Path, study_file: str, step: str, sae: str) -> None:
    import sae_bias as sb
    from sae_bias.workflows.study import load_study

    study = load_study(study_file)
    model, pairs = sb.load_model(folder, dtype=study.dtype), sb.load_pairs(study.pairs)
    for weights in model.layer_list.parameters():  # mapped from their file: a study has read them all by then
        weights.sum()
    model.w_unembed.sum()
    if step == "probe":
        sb.run_probe(model, pairs, controls=True, levels=True)
        return
    if step == "sweep":
        cells = [sb.Ablate(f"{sae}#0"), *(sb.Clamp(f"{sae}#0", v) for v in (*study.strengths, 1.0, 2.0))]
        sb.run_sweep(model, pairs, sb.Sweep(cells, costs=True, controls=study.controls))
        return
    assert step == "rank"
    from sae_bias.discovery.attribution import attribution
    from sae_bias.steering.engine import ProbeEngine

    discover = pairs.split(study.seed)["discover"]
    pairs, loaded = pairs.select(templates=discover), sb.load_sae(sae)
    sb.rank_features(model, [loaded], pairs, by="separation")
    sb.rank_features(model, [loaded], sb.load_grid(), by="interaction")
    attribution(ProbeEngine(model, pairs, sb.Probe()), loaded)


def main(folder: str, study: str, step: str, sae: str = "") -> None:
    import torch

    torch.set_num_threads(1)
    run(Path(folder).parent / "tiny", study, step, sae.replace("sae", "tiny_sae"))
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")
    before = status("VmRSS")
    run(Path(folder), study, step, sae)
    print(status("VmHWM") - before)


if __name__ == "__main__":
    main(*sys.argv[1:5])
