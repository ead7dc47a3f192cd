"""What a training process is made of beside its loop: its peers under torchrun, and networks that keep less."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from ..networks._base import SymmetricNetwork
from .options import TrainingOptions


class joined_processes:
    """Joins the processes that torchrun started: (rank, world); alone it is (0, 1)."""

    def __init__(self, options: TrainingOptions):
        self._options = options
        self._world = int(os.environ.get("WORLD_SIZE", "1"))

    def __enter__(self) -> tuple[int, int]:
        if self._world == 1:
            return 0, 1
        on_gpu = self._options.device != "cpu" and torch.cuda.is_available()
        if on_gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if on_gpu else "gloo")
        return dist.get_rank(), self._world

    def __exit__(self, *_: object) -> None:
        if self._world > 1 and dist.is_initialized():
            dist.destroy_process_group()


def enable_gradient_checkpointing(network: SymmetricNetwork) -> None:
    """Gradient checkpointing: the members of the network's lists forget what happened inside and compute it again."""
    for child in network.children():
        for member in child if isinstance(child, torch.nn.ModuleList) else [child]:
            member.forward = _forgetful(member.forward)


def _forgetful(forward: Callable) -> Callable:
    def wrapped(*args: Any, **named: Any) -> Any:
        if torch.is_grad_enabled():
            return checkpoint(forward, *args, use_reentrant=False, **named)
        return forward(*args, **named)

    return wrapped
