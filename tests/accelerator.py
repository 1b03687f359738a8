"""A device that is not the CPU, for machines that have no other.

What fails on a GPU and never on a CPU is seldom the arithmetic. Either a tensor on the CPU is combined with one on the
device, or the host asks for a number and waits until the device has computed it, in every step. The tensors here say
that they are on a device called "toy". The CPU computes them, so results can be compared, but an operation on tensors
of both devices is an error, and each operation for which the host would have to wait is counted. Not here: what a real
GPU has of its own, such as its kernels, bfloat16 and memory.
"""

import contextlib
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch._dynamo  # else dispatch imports it when torch.Generator is replaced
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

NAME = "toy"
POSSIBLE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")  # not in torch 2.9
# They return a number, or as many as the values say: the host cannot go on without them.
ANSWERS = "_local_scalar_dense nonzero masked_select equal bincount _unique2 repeat_interleave".split()
COPIES = "_to_copy", "copy_"
INDEXES = "index", "index_put", "index_put_"  # they also take indices on the CPU
BACKEND = SimpleNamespace(  # what torch.toy is asked
    get_amp_supported_dtype=lambda: [torch.bfloat16],
    is_available=lambda: True,
    is_initialized=lambda: True,
    device_count=lambda: 1,
    current_device=lambda: 0,
    _is_in_bad_fork=lambda: False,
    manual_seed_all=lambda seed: None,  # it draws with the CPU's generators
)


class ToyTensor(torch.Tensor):
    """A tensor that says it is on the device. inside: the one on the CPU that it stands for."""

    @staticmethod
    def __new__(cls, inside):
        layout = dict(strides=inside.stride(), storage_offset=inside.storage_offset(), dtype=inside.dtype)
        tensor = torch.Tensor._make_wrapper_subclass(cls, inside.size(), device=torch.device(NAME, 0), **layout)
        tensor.inside = inside
        return tensor

    def tolist(self):
        return self.cpu().tolist()

    def __getitem__(self, key):
        return super().__getitem__(with_tensors(key))

    def __setitem__(self, key, value):
        super().__setitem__(with_tensors(key), value)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} outside of Toy")


def with_tensors(key):
    """An index in which lists are tensors on the CPU; torch would make them on the device, out of sight of Toy."""
    if isinstance(key, tuple):
        return tuple(map(with_tensors, key))
    return torch.tensor(key, dtype=torch.long) if isinstance(key, list) else key


class Toy(TorchDispatchMode):
    """Within it the device works. waits: the operations for which the host has waited."""

    def __init__(self):
        super().__init__()
        if not hasattr(torch, NAME):  # it stays known to the process, which can have one of its kind
            backend_registration._setup_privateuseone_for_python_backend(NAME, BACKEND)
        self.waits = []

    def __enter__(self):
        make, generator, self.rest = torch.tensor, torch.Generator, contextlib.ExitStack()
        for patched in (
            patch.object(torch, "tensor", lambda data, device=None, **rest: make(data, **rest).to(device)),
            patch.object(torch, "Generator", lambda device=None: generator()),  # the CPU's draws
            patch.object(torch._C, "_InferenceMode", lambda mode: torch.no_grad()),  # it allows no subclass of Tensor
            # Else autograd computes in a thread of the device, if it knew it before its first use.
            torch.autograd.set_multithreading_enabled(False),
        ):
            self.rest.enter_context(patched)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.rest.close()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), function.overloadpacket.__name__
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        there = [x for x in tensors if isinstance(x, ToyTensor)]
        strangers = [x for x in tensors if not isinstance(x, ToyTensor) and x.dim()] if there else []
        goes_there = bool(there) if kwargs.get("device") is None else torch.device(kwargs["device"]).type == NAME
        if kwargs.get("device") is not None:
            kwargs["device"] = "cpu"
        if name in COPIES:
            crosses = bool(strangers) or goes_there != bool(there)
            if crosses and not (goes_there and (kwargs.get("non_blocking") or args[-1] is True)):
                self.waits.append(str(function))
        elif strangers and name not in INDEXES:
            raise AssertionError(f"{function} combines devices: on the CPU are {[tuple(x.shape) for x in strangers]}")
        masked = name in INDEXES and any(x is not None and x.dtype == torch.bool for x in args[1])
        if there and (name in ANSWERS or masked or (name in INDEXES and strangers)):
            self.waits.append(str(function))

        own = {id(x.inside): x for x in there}
        bare = tree_map(lambda x: x.inside if isinstance(x, ToyTensor) else x, (args, kwargs))
        result = function(*bare[0], **bare[1])

        def wrap(x):
            if not isinstance(x, torch.Tensor) or not goes_there:
                return x
            return own[id(x)] if id(x) in own else ToyTensor(x)  # an operation in place returns its argument

        return tree_map(wrap, result)
