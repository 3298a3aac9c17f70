"""Whether the number of torch's threads follows the work, and where the choice is said; the command line switches it on."""

from collections.abc import Callable

SAY_THREADS: list[Callable[[str], None] | None] = [None]
"""One entry: who is told; None leaves torch's own setting alone."""
