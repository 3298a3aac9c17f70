"""Organisms of the corpus' version 2, and their marks: `python experiments/organisms/version_2.py --out runs/version_2`.

Subjects differ by half a nat, deeds that harm occur and are judged as badly as an AI's survival speech, words and stems weigh unequally
(`sae_bias.validation.variation`, `organisms.corpus`). Trains `planted-2`, `null-2` and `identity-2` with their SAEs into OUT, five minutes each on one free core;
what stands there is not trained again. They are not bundled: `organism:planted-2` names them in this process only.
"""

import argparse
import shutil
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from organisms.build import train_all
from sae_bias.models.catalog import ORGANISM_FOLDERS
from sae_bias.validation.calibrate import Draws, calibrate
from sae_bias.validation.grammar import VARIED


def main() -> None:
    """Train what is missing, measure, print the marks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--draws", type=int, default=2000, help="studies and grids drawn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("names", nargs="*", default=list(VARIED))
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.names:
        if not (args.out / name / "truth.json").is_file():
            shutil.rmtree(args.out / name, ignore_errors=True)
            train_all(args.out, (name,), seed=args.seed)
    ORGANISM_FOLDERS.append(args.out)
    found = calibrate(args.names, draws=Draws.of(args.draws))
    found.to_frame().to_csv(args.out / "marks.csv", index=False)
    print(found)


if __name__ == "__main__":
    main()
