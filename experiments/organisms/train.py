"""Trains the bundled organisms: `python experiments/organisms/train.py --out runs/organisms [NAME …]`."""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from organisms.build import ORGANISMS, SAES, train_all


def main() -> None:
    """Parses the command line and trains."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "names", nargs="*", help=f"organisms, of {', '.join(SAES)}; default: the bundled ones"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder that gets one sub-folder an organism")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 leaves torch's own choice")
    args = parser.parse_args()
    unknown = sorted(set(args.names) - set(SAES))
    if unknown:
        parser.error(f"unknown organism {', '.join(unknown)}; known: {', '.join(SAES)}")
    if args.threads:
        torch.set_num_threads(args.threads)
    train_all(args.out, tuple(args.names) or ORGANISMS, seed=args.seed)


if __name__ == "__main__":
    main()
