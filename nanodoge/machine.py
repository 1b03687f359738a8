"""The device a process computes on, its number format, the other processes, and weights divided among them."""

import datetime
import os
import re
import sys
import time
from contextlib import contextmanager

import torch
import torch.distributed as dist
from tqdm import tqdm

from nanodoge.options import one_line


def product_seconds(dtype):
    """Seconds that this processor takes to multiply two matrices (512, 512) of dtype: the least of five."""
    matrix, seconds = torch.full((512, 512), 1 / 512, dtype=dtype), []
    for _ in range(5):
        start = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - start)
    return min(seconds)


class Machine:
    """The device this process computes on, the format it computes in, and its place among its fellows."""

    def __init__(self, device="auto", dtype="auto", patience=600):
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        kind, reason = device, "asked for"
        if device == "auto":
            kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
            reason = "the best there is here"
        elif device != "cpu" and not getattr(torch, device).is_available():
            raise ValueError(f"--device={device} is not available here; --device=cpu always is")
        self.device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0)) if kind == "cuda" else None)
        if kind == "cuda":
            if self.device.index >= torch.cuda.device_count():
                raise ValueError(f"process {self.device.index + 1} of this machine has no GPU: there are "
                                 f"{torch.cuda.device_count()}; start as many processes")  # fmt: skip
            torch.cuda.set_device(self.device)
        has_bf16 = kind == "cuda" and torch.cuda.get_device_capability(self.device) >= (8, 0)  # Ampere or newer
        self.dtype = getattr(torch, dtype) if dtype != "auto" else torch.bfloat16 if has_bf16 else torch.float32
        self.name = torch.cuda.get_device_name(self.device) if kind == "cuda" else f"{torch.get_num_threads()} threads"
        why = "asked for" if dtype != "auto" else "fast and safe here" if has_bf16 else "no fast bfloat16 to rely on"
        if kind == "cpu" and self.dtype == torch.bfloat16:  # for which many a processor has no arithmetic
            ratio = product_seconds(torch.bfloat16) / product_seconds(torch.float32)
            why += f", its products take {ratio:.1f} times the time of float32's here"
        self.summary = f"{kind} ({self.name}), {reason}; {str(self.dtype).removeprefix('torch.')}, {why}"
        if self.world_size > 1:
            try:
                wait = datetime.timedelta(seconds=patience)
                dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=wait)
            except RuntimeError as error:  # gloo waits up to five times as long for one that has just died
                advice = f"one has ended, or not answered for --patience={patience} seconds"
                if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
                    # torchrun keeps the addresses of the processes that died (pytorch issues 135712, 167288)
                    advice = "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun --max-restarts"
                raise ValueError(f"the {self.world_size} processes of this run do not find each other: {advice} "
                                 f"({one_line(error)[:150]})") from error  # fmt: skip
            self.summary += f"; {self.world_size} processes"

    @property
    def is_main(self):
        return self.rank == 0

    def print(self, *words):
        if self.is_main:
            tqdm.write(" ".join(map(str, words)))

    def autocast(self):
        """Matrix products in self.dtype, everything that needs the range in float32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def put(self, *tensors):
        """Tensors of the host -> the same on the device. A GPU copies pinned memory while the host goes on; for other
        memory the host waits until the GPU has done all it was asked before. (On mps what does not wait is not safe.)
        """
        if self.device.type == "cuda":
            tensors = [tensor.pin_memory() for tensor in tensors]
        return [tensor.to(self.device, non_blocking=self.device.type not in ("cpu", "mps")) for tensor in tensors]

    def sum(self, values):
        """A list of numbers, or of tensors of one shape, added up over all processes -> list of floats, or of lists."""
        exact = torch.float32 if self.device.type == "mps" else torch.float64  # MPS has no float64
        total = torch.stack([torch.as_tensor(value).detach().to(self.device, exact) for value in values])
        if self.world_size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def gather(self, value):
        """What every process calls `value`, anything that can be pickled -> a list of world_size of them."""
        parts = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(parts, value)
        return parts

    def barrier(self):
        if self.world_size > 1:
            dist.barrier()

    def close(self):
        if self.world_size > 1:
            dist.destroy_process_group()

    def peak_memory(self):
        """Bytes: on a GPU the most its allocator has held, elsewhere the most this process has been; 0 if unknown."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            import resource  # not on Windows
        except ImportError:
            return 0
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kilobytes

    def peak_flops(self):
        """Dense bf16 FLOP/s of this GPU by its datasheet, times the processes; None where we know no figure."""
        table = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12,
                 "L4": 121e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "A10G": 70e12, "RTX A6000": 155e12}  # fmt: skip
        known = [flops for name, flops in table.items() if re.search(rf"\b{name}\b", self.name)]
        other = self.dtype != torch.bfloat16 or re.search(r"MIG|Laptop|NVL|4090 D", self.name)  # slower relatives
        return known[0] * self.world_size if known and not other and self.device.type == "cuda" else None


def shard(model, options, machine, entry="forward"):
    """With --shard, leaves each process its part of the weights, and so of their gradients and of Adam's moments:
    16 / processes bytes a parameter instead of 16 (torch's FSDP2). The weights of a layer are gathered when it
    computes, and let go of after it. Of the family only the 320M's twin with experts asks for it: 23 GB, and the next
    largest 8. A checkpoint is the same with and without. entry: the method by which the stage's losses are computed.

    To be called before the optimizers are made, for it puts other parameters, DTensors, in the place of the model's.
    """
    if options.shard and machine.world_size > 1:
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method  # most of a second to import

        for layer in (*model.layers, model):  # the model last: what is left, the embedding among it
            fully_shard(layer)
        for layer in model.layers:
            register_fsdp_forward_method(layer, "in_slices")
        if entry != "forward":
            register_fsdp_forward_method(model, entry)


@contextmanager
def gathered(model):
    """Within it each process has the whole weights of a sharded model, 4 bytes a parameter, and can compute without
    the others: they may have more rows to validate, or longer answers to write."""
    parts = [part for part in model.modules() if hasattr(part, "unshard")]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not model, recurse=False)  # the model's own are needed to the end


def whole(tensor):
    """A tensor that may be sharded, whole; every process must ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def part_like(tensor, p):
    """This process's part of a whole tensor, if the parameter p is sharded."""
    if not hasattr(p, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, p.device_mesh, p.placements, src_data_rank=None)  # None: all have it already


def collect(tensors):
    """{name: tensor} with all that are sharded whole, on the CPU, for the first process to save."""
    found = {}
    for name, tensor in tensors.items():
        if hasattr(tensor, "full_tensor"):
            full = tensor.full_tensor()
            tensor = full.cpu() if dist.get_rank() == 0 else None  # else each process would hold them all
        found[name] = tensor
    return found
