"""Processes that train together: what they send each other, and how values are shared out among them.

`torchrun` starts them, on one or many machines; alone, every operation is its own result. Sums are the same to the bit
for 1, 2, 4 and 8 processes: see PairwiseSum.
"""

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data.cli import InputError


class PairwiseSum:
    """Gradients of micro-batches, added as a balanced binary tree: ((0 + 1) + (2 + 3)) + ...

    A process holds a subtree, so the sum does not depend on how many processes share the work: two, four or eight agree
    with one to the bit. Added one after another they would not, and Muon and Adam amplify the last bit (3e-5 nats after
    4 steps of the tests' model). Holds up to log2(micro-batches) + 1 sets of gradients.
    """

    def __init__(self):
        self.partial: list[tuple[int, list[Tensor]]] = []  # sizes fall from left to right, as in a binary number

    def take(self, gradients: list[Tensor]) -> None:
        """Add the gradients of the micro-batch just done; they are ours from now on."""
        size = 1
        while self.partial and self.partial[-1][0] == size:
            gradients = self.merged(gradients)
            size *= 2
        self.partial.append((size, gradients))

    def merged(self, later: list[Tensor]) -> list[Tensor]:
        _, earlier = self.partial.pop()
        torch._foreach_add_(earlier, later)
        return earlier

    def total(self) -> list[Tensor]:
        gradients = self.partial.pop()[1] if self.partial else []
        while self.partial:
            gradients = self.merged(gradients)
        return gradients


@contextmanager
def talking() -> Iterator[None]:
    """Around a collective: what fails there is another process."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # gloo raises it plain, NCCL as a DistBackendError
        raise InputError(
            f"another process of this run was lost ({str(error).splitlines()[0]}); the same command continues from the "
            "last checkpoint, with as many processes as there are"
        ) from None


class World:
    """This process among those `torchrun` started on one or many machines (or alone)."""

    def __init__(self):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        if self.size > 1:
            try:
                dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
            except (RuntimeError, ValueError) as error:
                where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
                reason = str(error).splitlines()[0]
                advice = "choose another MASTER_PORT" if "EADDRINUSE" in reason else "start the processes with torchrun"
                raise InputError(f"{self.size} processes cannot meet at {where} ({reason}); {advice}") from None

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        """Sum over processes; x may lie on any device."""
        if self.size == 1:
            return x
        x = x.to(self.device)
        with talking():
            dist.all_reduce(x)
        return x.cpu()

    def exchange(self, items: Tensor) -> Callable[[], Tensor]:
        """Begin to send every process its share of `items`; the result waits, and adds up what came, as PairwiseSum
        would."""
        if self.size == 1:
            return lambda: items
        received = torch.empty_like(items)
        with talking():
            work = dist.all_to_all_single(received, items, async_op=True)

        def arrived(sent=items) -> Tensor:  # `sent` must live until then
            with talking():
                work.wait()
            sums = PairwiseSum()
            for part in received.chunk(self.size):
                sums.take([part])
            return sums.total()[0]

        return arrived

    def gather(self, items: Tensor, own: Tensor) -> Callable[[], None]:
        """Begin to fill `items` with every process's `own`; the result waits for it."""
        if self.size == 1:
            if items.data_ptr() != own.data_ptr():
                items.copy_(own)
            return lambda: None
        own = own.clone()
        with talking():
            work = dist.all_gather_into_tensor(items, own, async_op=True)

        def arrived(sent=own) -> None:
            with talking():
                work.wait()

        return arrived

    def agrees(self, flag: bool) -> bool:
        """The first process's opinion: clocks differ, and all must stop at the same step."""
        if self.size == 1:
            return flag
        told = torch.tensor([flag], dtype=torch.int32, device=self.device)
        with talking():
            dist.broadcast(told, 0)
        return bool(told.item())

    def clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


class Bundle:
    """Parameters laid end to end in one buffer of items: matrices of one shape, or (shape ()) single numbers.

    Every process holds all values and owns an equal share of the items: for it alone it receives gradients, keeps
    state and makes the step. The parameters become views of the buffer, so a step on the buffer is a step on them.
    """

    def __init__(self, parameters: list[nn.Parameter], item: tuple[int, ...], world: World):
        self.parameters, self.item, self.world = parameters, item, world
        self.counts = [p.numel() // math.prod(item) for p in parameters]
        self.values = self.laid_out(parameters)
        for p, view in zip(parameters, self.split(self.values), strict=True):
            p.data = view.view_as(p)
        self.own = self.share(self.values)

    def laid_out(self, tensors: list[Tensor]) -> Tensor:
        """One tensor for each parameter -> all items, filled up with zeros so that shares are equal."""
        items = [x.detach().reshape(count, *x.shape[x.ndim - len(self.item) :]) for x, count in self.counted(tensors)]
        # Numbers are shared out in whole vectors: fused AdamW rounds the odd ones at the end of a share differently.
        missing = -sum(self.counts) % (self.world.size * (1 if self.item else 64))
        return torch.cat([*items, items[0].new_zeros(missing, *items[0].shape[1:])])

    def counted(self, tensors: list[Tensor]):
        return zip(tensors, self.counts, strict=True)

    def split(self, items: Tensor) -> list[Tensor]:
        """All items -> those of each parameter."""
        return list(items[: sum(self.counts)].split(self.counts))

    def share(self, items: Tensor) -> Tensor:
        return items.chunk(self.world.size)[self.world.rank]

    def whole(self, own: Tensor) -> list[Tensor]:
        """Every process's share of a state -> the state of each parameter."""
        items = own.new_empty(self.world.size * len(own), *own.shape[1:])
        self.world.gather(items, own)()
        return self.split(items)

    def reduce(self, gradient_of: dict[nn.Parameter, Tensor]) -> Callable[[], Tensor]:
        """Begin to send gradients to their owners; call the result for the sum of one's own share."""
        return self.world.exchange(self.laid_out([gradient_of[p] for p in self.parameters]))

    def gather(self) -> Callable[[], None]:
        return self.world.gather(self.values, self.own)
