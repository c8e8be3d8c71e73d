"""Several processes as one: what they say to each other when ``torchrun`` has started them.

Every process ("rank") holds the same networks and takes its share of each batch. What they average (gradients, losses,
the feedback) makes each step that of one process with the whole batch. Alone, every function here returns what it was
given.
"""

import contextlib
import datetime
import itertools
import os
import platform
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch import nn

from utils import Failure, ResourceError, UsageError

PATIENCE = datetime.timedelta(hours=24)  # one rank may read a large folder alone; torchrun sees a dead one at once


def launched() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank() -> int:
    return int(os.environ["RANK"]) if launched() else 0


def world() -> int:
    """The number of processes."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def own() -> tuple[int, ...]:
    """What tells this rank's random draws from those of the others; nothing for the first."""
    return (rank(),) if rank() else ()


def restarted() -> bool:
    """Whether torchrun started the job anew after a process of it died: known to the agent whose process that was."""
    return any_rank(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0)


def agents() -> list[tuple[str, int, float]]:
    """The processes of torchrun that have started the ranks, one a machine: what this job has that no other ever had,
    and keeps when it is restarted. Each is (machine, process, when it was started); none without torchrun."""
    if not launched():
        return []
    agent = psutil.Process(os.getppid())
    mine = (platform.node(), agent.pid, agent.create_time())
    everyones = [mine] * world()
    if world() > 1:
        dist.all_gather_object(everyones, mine)
    return sorted(set(everyones))


_store: dist.Store | None = None  # what the ranks can all look into, as long as they are joined


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Within the block the ranks can hear each other.

    Raises:
        Left: another rank has failed, and said why.
        ResourceError: another rank has gone without a word.
    """
    global _store
    if world() == 1:
        yield
        return
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)
    store, _, _ = next(dist.rendezvous("env://", timeout=PATIENCE))
    store = dist.PrefixStore(_agreed_token(store), store)
    backend = dist.get_default_backend_for_device(device)
    dist.init_process_group(backend, store=store, rank=rank(), world_size=world(), timeout=PATIENCE)
    _store = store
    try:
        yield
    except Failure as failure:
        store.set("failed", str(failure.exit_code))
        raise
    except RuntimeError as error:
        if not any(word in str(error) for word in ("Connection", "gloo", "CCL", "Broken pipe")):
            raise
        with contextlib.suppress(RuntimeError):  # the store has gone as well
            if store.check(["failed"]):
                raise Left(int(store.get("failed"))) from error
        raise ResourceError(
            f"process {rank()} of {world()} lost another one, which was killed or failed; its own message says why"
        ) from error
    finally:
        _store = None
        dist.destroy_process_group()


def _agreed_token(store: dist.Store) -> str:
    """A text that the ranks of this start of the job have in common, and those of none before it: the agents keep their
    store over restarts, with the addresses of processes that died and all else that they have left there."""
    mine = uuid.uuid4().hex
    if rank():
        store.set(f"rank {rank()} is", mine)
        token = store.get(f"for {mine}").decode()
        store.add(f"heard {token}", 1)
        return token
    told: set[bytes] = set()
    while store.add(f"heard {mine}", 0) < world() - 1:
        for other in range(1, world()):
            name = f"rank {other} is"
            if store.check([name]) and (said := store.get(name)) not in told:  # by this start or one before it
                told.add(said)
                store.set(f"for {said.decode()}", mine)
        time.sleep(0.02)
    return mine


def local_device(device: torch.device) -> torch.device:
    """This rank's own accelerator.

    Raises:
        UsageError: there is none for every rank of this machine.
    """
    if not launched() or device.type == "cpu" or device.index is not None:
        return device
    place, count = int(os.environ["LOCAL_RANK"]), torch.accelerator.device_count()
    if place >= count:
        raise UsageError(f"--device {device.type}: torchrun started more processes here than the {count} there are")
    return torch.device(device.type, place)


@contextlib.contextmanager
def one_first() -> Iterator[None]:
    """One rank of each machine passes through the block before the others, who then find what it has left on disk."""
    first = world() == 1 or os.environ["LOCAL_RANK"] == "0"
    if not first:
        dist.barrier()
    yield
    if first and world() > 1:
        dist.barrier()


def average(tensors: Sequence[torch.Tensor]) -> None:
    """Replace tensors of one type and device by their means over the ranks."""
    if world() == 1:
        return
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    flat /= world()
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.detach().copy_(mean.view_as(tensor))


def taken(what: str) -> Iterator[int]:
    """The numbers from 0, each for the rank that asks first."""
    if world() == 1:
        yield from itertools.count()
    assert _store is not None
    while True:
        yield _store.add(what, 1) - 1


def wait_for_all() -> None:
    """Come back when every rank is here."""
    any_rank(False)


def any_rank(flag: bool) -> bool:
    """Whether it is so for at least one rank."""
    if world() == 1:
        return flag
    votes = torch.tensor(float(flag), device=_where_heard())
    dist.all_reduce(votes)
    return bool(votes > 0)


def _where_heard() -> torch.device:
    """Where a tensor must be for the others to hear it."""
    accelerator = torch.accelerator.current_accelerator()
    return torch.device("cpu") if accelerator is None or dist.get_backend() == "gloo" else accelerator


class Left(Exception):
    """Another rank has ended, and said why."""

    def __init__(self, exit_code: int) -> None:
        self.exit_code = exit_code


@contextlib.contextmanager
def failure_told() -> Iterator[None]:
    """Around what the first rank alone does and the others wait for in :func:`leave_with_the_first`."""
    try:
        yield
    except Failure as failure:
        tell(failure.exit_code)
        raise
    tell(0)


def leave_with_the_first() -> None:
    """Wait for what the first rank does.

    Raises:
        Left: it failed.
    """
    if code := tell(0):
        raise Left(code)


def tell(value: int) -> int:
    """What the first rank says, heard by all."""
    if world() == 1:
        return value
    said = torch.tensor(value, device=_where_heard())
    dist.broadcast(said, 0)
    return int(said)


def as_the_first(values: torch.Tensor) -> torch.Tensor:
    """What the first rank has in place of these values, which rounding may have made others here; on the CPU."""
    if world() == 1:
        return values
    said = values.to(_where_heard()).contiguous()
    dist.broadcast(said, 0)
    return said.cpu()


def share(rows: np.ndarray) -> np.ndarray:
    """This rank's part of a step's rows."""
    size = len(rows) // world()
    return rows[rank() * size : (rank() + 1) * size]


def gathered(
    compute: Callable[[np.ndarray], Sequence[torch.Tensor]], rows: np.ndarray, device: torch.device
) -> list[torch.Tensor]:
    """``compute(rows)``, tensors on the CPU with one row for each of ``rows``: every rank computes its part of them, no
    row twice, and gets all."""
    if world() == 1:
        return list(compute(rows))
    parts = np.array_split(np.arange(len(rows)), world())
    mine = parts[rank()]
    computed = list(compute(rows[mine] if len(mine) else rows[:1]))
    results = []
    for own in computed:
        whole = own.new_zeros(len(rows), *own.shape[1:])
        if len(mine):
            whole[torch.from_numpy(mine)] = own
        whole = whole.to(device)
        dist.all_reduce(whole)
        results.append(whole.cpu())
    return results


class _Sum(torch.autograd.Function):
    """The sum over the ranks, whose gradient is the sum of theirs (as often as it is differentiated)."""

    @staticmethod
    def forward(ctx: object, tensor: torch.Tensor) -> torch.Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
        return _Sum.apply(gradient)


class SyncedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the batches of all ranks, on any device (PyTorch's own works on accelerators alone), and what
    timm's holds beside it: dropout and activation."""

    # Of one that tracks statistics
    running_mean: torch.Tensor
    running_var: torch.Tensor
    num_batches_tracked: torch.Tensor
    # Of one of timm's
    drop: nn.Module
    act: nn.Module

    def _check_input_dim(self, x: torch.Tensor) -> None:
        """Any: [B, C] or [B, C, ...]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self._normalized(x) if self.training else super().forward(x)
        return self.act(self.drop(y)) if hasattr(self, "act") else y

    def _normalized(self, x: torch.Tensor) -> torch.Tensor:
        given, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))
        dims = [0, *range(2, x.dim())]
        column = (-1, *[1] * (x.dim() - 2))  # [C, 1, ...]
        n = x.numel() // x.shape[1] * world()
        mean = _Sum.apply(x.mean(dims)) / world()
        square = _Sum.apply((x - mean.view(column)).square().mean(dims)) / world()  # the biased variance
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked += 1
                factor = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean, factor)
                self.running_var.lerp_(square * n / (n - 1), factor)
        scale = torch.rsqrt(square + self.eps)
        if self.affine:
            scale = scale * self.weight
        y = (x - mean.view(column)) * scale.view(column)
        return (y + self.bias.view(column) if self.affine else y).to(given)


def synced(model: nn.Module, device: torch.device) -> nn.Module:
    """The network with every batch norm over all ranks' batches.

    Raises:
        UsageError: it has a batch norm of another kind.
    """
    if world() == 1:
        return model
    known: list[type] = [nn.BatchNorm1d, nn.BatchNorm2d]
    if "timm" in sys.modules:  # which takes seconds to import; else the network has nothing of it
        from timm.layers import BatchNormAct2d

        known.append(BatchNormAct2d)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if type(module) not in known:
                raise UsageError(f"{type(module).__name__} cannot be shared among processes: use --trainable head")
            if device.type == "cpu":
                module.__class__ = SyncedBatchNorm
    if device.type == "cpu":
        return model
    from timm.layers import convert_sync_batchnorm

    return convert_sync_batchnorm(model)  # PyTorch's own would drop activations
