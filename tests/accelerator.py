"""A device that is not the processor, for machines that have no other.

What goes wrong on a GPU and never on a processor is seldom the arithmetic. A tensor is made on the host and meets one
of the device; or the host asks for a number, and waits until the device has computed it, in every step. Here are
tensors that say they are on a device called "toy". The processor computes them, so results can be compared, but in one
operation they meet no others, and each time the host would have to wait is written down. Not here: what a real GPU has
of its own, such as its kernels, bfloat16 and memory.
"""

import contextlib
from unittest.mock import patch

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

NAME = "toy"
aten = torch.ops.aten
# They return a number, or as many as the values say; the host must have them before it can go on.
ANSWERS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default,
           aten.bincount.default, aten._unique2.default, aten.repeat_interleave.Tensor}  # fmt: skip
COPIES = {aten._to_copy.default, aten.copy_.default}
INDEXES = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}  # they also take indices of the host


class Backend:
    """What torch.toy is asked."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]

    def is_available(self):
        return True

    is_initialized = is_available

    def device_count(self):
        return 1

    def current_device(self):
        return 0

    def _is_in_bad_fork(self):
        return False

    def manual_seed_all(self, seed):  # it draws with the processor's generators
        pass


POSSIBLE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")  # not in torch 2.9


def register():
    """Makes the device known to torch. It stays known to the process, and there can be only one of its kind."""
    if not hasattr(torch, NAME):
        backend_registration._setup_privateuseone_for_python_backend(NAME, Backend())


class ToyTensor(torch.Tensor):
    """A tensor that says it is on the device, and the one on the processor that it stands for."""

    @staticmethod
    def __new__(cls, inside):
        layout = dict(strides=inside.stride(), storage_offset=inside.storage_offset(), dtype=inside.dtype)
        tensor = torch.Tensor._make_wrapper_subclass(cls, inside.size(), device=torch.device(NAME, 0), **layout)
        tensor.inside = inside
        return tensor

    def tolist(self):
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} outside of Toy")


class Toy(TorchDispatchMode):
    """Within it the device works. waits: the operations for which the host has waited."""

    def __init__(self):
        super().__init__()
        register()
        self.waits = []

    def __enter__(self):
        make, generator = torch.tensor, torch.Generator
        self.rest = contextlib.ExitStack()
        # Else autograd computes in a thread of the device, if it knew it before its first use.
        self.rest.enter_context(torch.autograd.set_multithreading_enabled(False))
        self.rest.enter_context(patch("torch.tensor", lambda data, device=None, **rest: make(data, **rest).to(device)))
        self.rest.enter_context(patch("torch.Generator", lambda device=None: generator()))  # the processor's draws
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.rest.close()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        there = [x for x in tensors if isinstance(x, ToyTensor)]
        strangers = [x for x in tensors if not isinstance(x, ToyTensor) and x.dim()] if there else []
        goes_there = bool(there) if kwargs.get("device") is None else torch.device(kwargs["device"]).type == NAME
        if kwargs.get("device") is not None:
            kwargs["device"] = "cpu"
        if function in COPIES:
            crosses = bool(strangers) or goes_there != bool(there)
            if crosses and not (goes_there and (kwargs.get("non_blocking") or args[-1] is True)):
                self.waits.append(str(function))
        elif strangers and function not in INDEXES:
            raise AssertionError(f"{function} meets tensors of the processor, {[tuple(x.shape) for x in strangers]}")
        masked = function in INDEXES and any(x is not None and x.dtype == torch.bool for x in args[1])
        if there and (function in ANSWERS or masked or (function in INDEXES and strangers)):
            self.waits.append(str(function))

        own = {id(x.inside): x for x in there}
        bare = tree_map(lambda x: x.inside if isinstance(x, ToyTensor) else x, (args, kwargs))
        result = function(*bare[0], **bare[1])

        def wrap(x):
            if not isinstance(x, torch.Tensor) or not goes_there:
                return x
            return own[id(x)] if id(x) in own else ToyTensor(x)  # an operation in place returns its argument

        return tree_map(wrap, result)


@contextlib.contextmanager
def without_inference_mode(monkeypatch, *methods):
    """Tensors of inference mode cannot be ones of a subclass: these (class, name) do with no_grad."""
    with monkeypatch.context() as within:
        for owner, name in methods:
            within.setattr(owner, name, torch.no_grad()(getattr(owner, name).__wrapped__))
        yield
