"""How many threads torch uses on a CPU, from the size of the model: on small ones a second thread only waits.

Measured on two cores: calibration takes 119 s of CPU time on one thread and over 1,100 s on two beside other work. The command line
switches this on; in Python torch's own setting stays. OMP_NUM_THREADS decides where it is set.
"""

from __future__ import annotations

import os

import torch

from sae_bias.core.threads import SAY_THREADS

SMALL = 30_000_000
"""Parameters up to which one thread is used."""
_most = 0


def fit(n_parameters: int, device: torch.device) -> None:
    """Set the number of threads for a model of this size, and say it where it changes."""
    global _most
    say = SAY_THREADS[0]
    if say is None or device.type != "cpu" or "OMP_NUM_THREADS" in os.environ:
        return
    _most = max(_most, torch.get_num_threads())
    wanted = 1 if n_parameters <= SMALL else _most
    if wanted != torch.get_num_threads():
        torch.set_num_threads(wanted)
        size = "small" if wanted == 1 else "large"
        say(f"{wanted} of {_most} threads: the model is {size} (OMP_NUM_THREADS decides where it is set).")
