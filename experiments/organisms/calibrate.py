"""Calibration with organisms and SAEs of further seeds: `python experiments/organisms/calibrate.py --seeds 3 --out runs/calibration`.

Trains about half an hour a seed on one free core. What is trained or measured stays in OUT/organisms and is never done twice, so an
interrupted run resumes. The marks of the bundled organisms are measured too (`sae-bias calibrate` alone measures only those). Exit codes
are those of sae-bias: 4 says that a mark is missed.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from organisms.calibrate_trained import calibrate_trained
from sae_bias.cli.calibrate import QUESTION, present
from sae_bias.cli.context import Console
from sae_bias.core.errors import SaeBiasError
from sae_bias.validation.calibrate import Calibration, Draws
from sae_bias.validation.calibrate import calibrate as bundled


def main(given: list[str] | None = None) -> int:
    """Measure, print and write; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for organisms, tables and report.html"
    )
    parser.add_argument(
        "--seeds", type=int, default=3, help="how many further seeds; the pass marks ask for 3"
    )
    parser.add_argument("--draws", type=int, default=2000, help="studies and grids drawn; at least 1,000")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args(given)
    draws, seeds = Draws.of(args.draws), range(1, args.seeds + 1)
    try:
        with Console(args.json, False) as console:
            near = bundled(draws=draws, seed=args.seed, progress=console.progress)
            far = calibrate_trained(
                seeds, args.out / "organisms", draws=draws, seed=args.seed, progress=console.progress
            )
            found = Calibration(near.marks + far.marks, near.tables | far.tables, near.notes + far.notes)
            present(found, QUESTION, out=args.out, seed=args.seed, console=console)
    except SaeBiasError as error:
        print(f"calibrate: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
