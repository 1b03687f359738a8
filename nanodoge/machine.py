"""The device this rank computes on, the dtype of its products, the other ranks, and weights sharded over them."""

import datetime
import gc
import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm

from nanodoge.options import one_line

# Dense bf16 FLOP/s by the datasheets.
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12}
PEAK_FLOPS |= {"L4": 121e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "A10G": 70e12, "RTX A6000": 155e12}


class Machine:
    """Device, dtype, rank and world size; `torchrun` sets RANK, WORLD_SIZE and LOCAL_RANK."""

    def __init__(self, device: str = "auto", dtype: str = "auto", patience: int = 600):
        """patience: seconds to wait for another rank. Raises ValueError for a device that is not there."""
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        kind = device
        if device == "auto":
            kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        elif device != "cpu" and not getattr(torch, device).is_available():
            raise ValueError(f"--device={device} is not available here; --device=cpu always is")
        self.device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0)) if kind == "cuda" else None)
        self.is_main = self.rank == 0
        self.wide_dtype = torch.float32 if kind == "mps" else torch.float64  # of sums over ranks
        if kind == "cuda":
            if self.device.index >= (count := torch.cuda.device_count()):
                advice = f"there are {count}; start as many processes"
                raise ValueError(f"process {self.device.index + 1} has no GPU: {advice}")
            torch.cuda.set_device(self.device)
        has_bf16 = kind == "cuda" and torch.cuda.get_device_capability(self.device) >= (8, 0)  # Ampere or newer
        self.dtype = getattr(torch, dtype) if dtype != "auto" else torch.bfloat16 if has_bf16 else torch.float32
        self.name = torch.cuda.get_device_name(self.device) if kind == "cuda" else f"{torch.get_num_threads()} threads"
        self.summary = f"{kind} ({self.name}); {str(self.dtype).removeprefix('torch.')}"
        self.summary += f"; {self.world_size} processes" if self.world_size > 1 else ""
        timeout = datetime.timedelta(seconds=patience)
        try:
            if self.world_size > 1:
                dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timeout)
        except RuntimeError as error:  # gloo waits up to five times as long for a rank that has just died
            advice = f"one has ended, or not answered for --patience={patience} seconds"
            if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
                # torchrun keeps the addresses of the processes that died (pytorch issues 135712, 167288)
                advice = "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun --max-restarts"
            ranks = f"the {self.world_size} processes of this run do not find each other"
            raise ValueError(f"{ranks}: {advice} ({one_line(error)[:150]})") from error

    def print(self, *words: Any) -> None:
        if self.is_main:
            tqdm.write(" ".join(map(str, words)))

    def autocast(self) -> torch.autocast:
        """Matrix products in self.dtype; what needs the range stays in float32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def to_device(self, *tensors: Tensor) -> list[Tensor]:
        """Host tensors on the device. For CUDA they are pinned, so that the host does not wait for the copy; on MPS a
        copy that does not wait is not safe."""
        if self.device.type == "cuda":
            tensors = [tensor.pin_memory() for tensor in tensors]
        return [tensor.to(self.device, non_blocking=self.device.type not in ("cpu", "mps")) for tensor in tensors]

    def sum(self, values: Iterable[float | Tensor]) -> list:
        """Numbers, or tensors of one shape, each summed over all ranks, as floats or lists. Waits for the device."""
        total = torch.stack([torch.as_tensor(value).detach().to(self.device, self.wide_dtype) for value in values])
        if self.world_size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: Any) -> list:
        """The `value` of every rank, anything that can be pickled."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def close(self) -> None:
        if self.world_size > 1:
            # The last owner of the process group waits for gloo's threads to end, and they need Python's lock (GIL) to
            # drop their tensors. DDP would hold it, torch.distributed releases it: so DDP, which reference cycles and
            # the frames of an exception keep alive, is deleted first.
            traceback.clear_frames(sys.exc_info()[2])
            gc.collect()
            dist.destroy_process_group()

    def peak_memory(self) -> int:
        """The peak in bytes of the GPU's allocator, or of this process's resident memory; 0 if unknown."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            import resource  # not on Windows
        except ImportError:
            return 0
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kilobytes

    def peak_flops(self) -> float | None:
        """bf16 FLOP/s of all ranks' GPUs by the datasheet; None where we know no figure."""
        known = [flops for name, flops in PEAK_FLOPS.items() if re.search(rf"\b{name}\b", self.name)]
        other = self.dtype != torch.bfloat16 or re.search(r"MIG|Laptop|NVL|4090 D", self.name)  # slower relatives
        return known[0] * self.world_size if known and not other and self.device.type == "cuda" else None


# ---- Shards: with --shard each rank holds a part of every weight (torch's FSDP2)


def shard(model: nn.Module, machine: Machine, entry: str = "forward") -> None:
    """Leaves this rank its part of the weights, and so of their gradients and of Adam's moments: 16 / world_size bytes
    per parameter. A layer's weights are gathered when it computes. entry: the method that computes the stage's losses.
    NOTE: call it before the optimizers are made, since it replaces the model's parameters by DTensors."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method  # takes most of a second

    if machine.world_size > 1:
        for layer in (*model.layers, model):  # the model last: it takes the remaining weights, such as the embedding
            fully_shard(layer)
        for layer in model.layers:
            register_fsdp_forward_method(layer, "in_slices")
        if entry != "forward":
            register_fsdp_forward_method(model, entry)


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Within it each rank holds the full weights of a sharded model, 4 bytes per parameter, and needs no other rank:
    ranks may have different numbers of validation batches, or answers of different length."""
    parts = [part for part in model.modules() if hasattr(part, "unshard")]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not model, recurse=False)  # the root's weights are used to the end


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded, in full; every rank must ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard_like(tensor: Tensor, p: Tensor) -> Tensor:
    """This rank's part of a full tensor, if the parameter p is sharded."""
    if not hasattr(p, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, p.device_mesh, p.placements, src_data_rank=None)  # None: all have it already


def full_state_dict(tensors: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """{name: tensor} with all sharded tensors in full: on rank 0 on the CPU, on the others None, to save memory."""
    full = {}
    for name, tensor in tensors.items():
        if hasattr(tensor, "full_tensor"):
            tensor = tensor.full_tensor()
            tensor = tensor.cpu() if dist.get_rank() == 0 else None
        full[name] = tensor
    return full
