"""Work shared out over processes of this machine: forked from one that holds the model, so that its weights are there once."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import torch

from sae_bias.core.errors import MissingError, RequestError
from sae_bias.models.model import Model

T = TypeVar("T")
R = TypeVar("R")
_WORK: list[tuple[Callable[[Any], Any], Sequence[Any]]] = []
"""In a worker process: what is done, and the items it is done to."""


def share_out(model: Model, work: Callable[[T], R], items: Sequence[T], n: int) -> Iterator[tuple[int, R]]:
    """(number of an item, what `work` makes of it) as each is done, by n processes of one thread; in this process where n is 1.

    Raises:
        RequestError: the model is not on the CPU, or the system cannot fork.
        MissingError: a process was lost, such as for want of memory; what was given back is kept.
    """
    if n == 1 or len(items) < 2:
        yield from enumerate(map(work, items))
        return
    if model.device.type != "cpu" or "fork" not in multiprocessing.get_all_start_methods():
        raise RequestError(
            f"--workers needs a model on the CPU and a system that forks, and this one is on {model.device}; leave it out, or give --cluster."
        )
    forked = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(n, mp_context=forked, initializer=_begin, initargs=(work, items)) as pool:
        waiting = {pool.submit(_one, i): i for i in range(len(items))}
        try:
            for done in as_completed(waiting):
                yield waiting[done], done.result()
        except BrokenProcessPool as error:
            raise MissingError(
                f"one of the {n} worker processes was lost, such as for want of memory; what is finished is kept: give fewer --workers and "
                "run the same command again."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _begin(work: Callable[[Any], Any], items: Sequence[Any]) -> None:
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    _WORK.append((work, items))


def _one(i: int) -> Any:
    work, items = _WORK[0]
    return work(items[i])
