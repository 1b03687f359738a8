"""The decode step in C++, nanodoge/step.cpp: it is compiled once on a machine, in a few seconds.

    decoder = CppDecoder(model, torch.int8)          # in place of nanodoge.decode.Decoder: the fastest on a CPU
    logits = decoder(token, cache)

It needs a C++ compiler: g++, clang++, or the one that the environment variable CXX names. Here are the build, and the
weights as step.cpp reads them. Shapes as there.
"""

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from ctypes import POINTER, byref, c_float, c_int, c_void_p
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from model import CDMoE, Doge, RMSNorm
from nanodoge.attention import Cache
from nanodoge.decode import one_thread, pack
from nanodoge.options import one_line

SOURCE = Path(__file__).with_name("step.cpp")
# The last four let a sum be computed in any order, hence by vectors. -ffast-math does, too, but it also makes the whole
# process round tiny numbers to 0.
FLAGS = "-std=c++17 -O3 -shared -fPIC -fno-math-errno -fno-signed-zeros -fno-trapping-math -fassociative-math"
MORE_FLAGS = ["-march=native -fopenmp", "-march=native", "-mcpu=native", ""]  # Apple's clang has no OpenMP: one thread
BLOCK = 256  # as in step.cpp


def find_compiler() -> str | None:
    """The command of a C++ compiler, None if there is none."""
    return next(filter(shutil.which, [os.environ.get("CXX", ""), "g++", "clang++"]), None)


@functools.cache
def library() -> ctypes.CDLL:
    """step.cpp as machine code for this CPU, kept in the user's cache. Raises ValueError if it cannot be compiled."""
    if not (command := find_compiler()):
        raise ValueError("--backend=cpp needs a C++ compiler: g++, clang++, or what CXX names (--backend=torch, none)")
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"(?m)^(flags|Features).*", info.read_text()) if info.exists() else None
    parts = [SOURCE.read_text(encoding="utf-8"), command, FLAGS, cpu[0] if cpu else platform.processor()]
    name = f"step-{hashlib.sha256(' '.join(parts).encode()).hexdigest()[:16]}.so"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "nanodoge")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.mkdtemp(dir=folder)
    except OSError:  # a home that cannot be written: compiled for this process alone
        folder = temporary = Path(tempfile.mkdtemp())
    if not (folder / name).exists():
        print(f"[{command} compiles {SOURCE.name}: some seconds, once]", file=sys.stderr)
        made = Path(temporary, "made.so")
        for more in MORE_FLAGS:
            call = [command, *FLAGS.split(), *more.split(), str(SOURCE), "-o", str(made)]
            done = subprocess.run(call, capture_output=True, text=True)
            if done.returncode == 0:
                with open(made, "rb+") as file:
                    os.fsync(file.fileno())
                os.replace(made, folder / name)  # whole at once: another process may be looking for it
                break
    loaded = ctypes.CDLL(str(folder / name)) if (folder / name).exists() else None
    shutil.rmtree(temporary)
    if not loaded:
        reason = f"{command} cannot compile {SOURCE.name}: {one_line(done.stderr or f'status {done.returncode}')}"
        raise ValueError(f"--backend=cpp: {reason} (--backend=torch needs no compiler)")
    loaded.step.restype = ctypes.c_bool
    return loaded


# ---- The structs of step.cpp: the same fields in the same order. A pointer is the address of a tensor's memory.


def struct(name: str, **fields) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


def pointers(names: str) -> dict:
    return dict.fromkeys(names.split(), c_void_p)


def integers(names: str) -> dict:
    return dict.fromkeys(names.split(), c_int)


Matrix = struct("Matrix", **pointers("values scale sums"), **integers("rows columns"))
MATRICES = dict.fromkeys("qkv out gate_up down router".split(), Matrix)
VECTORS = pointers("norm1 norm2 residual1 residual2 dt A heads")
Layer = struct("Layer", **VECTORS, **MATRICES, **pointers("down_embed up_embed"))
SIZES = integers("layers C M H K D keys top_k qk_norm")
Model = struct("Model", **SIZES, eps=c_float, layer=POINTER(Layer), **pointers("embedding norm"), head=Matrix)
Slots = struct("Slots", **pointers("k v s position"))
TOKENS = integers("n N wanted stride") | pointers("id row place frequencies")
Tokens = struct("Tokens", **TOKENS, slots=POINTER(Slots))


class CppDecoder:
    """Decoder of nanodoge/decode.py, by step.cpp. dtype: float32, bfloat16 or int8, of the matrices.

    decoder(token (B,), cache) -> logits (B, V) fp32, valid until the next call, and the cache holds the token.
    """

    compiled, sampling = False, staticmethod(one_thread)

    def __init__(self, model: Doge, dtype: torch.dtype = torch.float32):
        weight, c = model.embed_tokens.weight, model.config
        if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError("--backend=cpp computes on a CPU, in float32 or bfloat16: --device=cpu")
        self.library, self.dtype, self.kept = library(), dtype, []
        self.dtype_of_model = weight.dtype
        sizes = dict(layers=c.num_hidden_layers, C=c.hidden_size, M=c.intermediate_size, H=c.num_attention_heads)
        sizes |= dict(K=c.num_key_value_heads, D=c.head_dim, qk_norm=c.qk_norm, eps=c.rms_norm_eps)
        if c.is_moe:
            sizes |= dict(keys=model.layers[0].mlp.num_keys, top_k=c.num_experts_per_tok)
        self.layers = (Layer * c.num_hidden_layers)(*map(self.layer, model.layers))
        ends = dict(norm=self.keep(model.norm.weight.float()), head=self.matrix(model.output_weight))
        self.model = Model(**sizes, layer=self.layers, embedding=self.keep(weight), **ends)
        self.reads = 256 if dtype == torch.int8 else 64  # tokens of a prompt that it reads faster than the model
        self.bound = None  # the cache that `tokens` is of

    def keep(self, x: Tensor) -> int:
        """The address of a tensor that is not freed before the decoder."""
        self.kept.append(x.detach().contiguous())
        return self.kept[-1].data_ptr()

    def matrix(self, *weights: Tensor, dtype: torch.dtype | None = None) -> Matrix:
        """The rows of all weights (out, in), one after another."""
        weight, dtype = torch.cat([w.detach().float() for w in weights]), dtype or self.dtype
        rows, columns = weight.shape
        if dtype != torch.int8:
            return Matrix(values=self.keep(weight.to(dtype)), rows=rows, columns=columns)
        values, scale = pack(weight, dtype, torch.float32)
        sums = torch.stack([part.sum(1, dtype=torch.int32) for part in values.split(BLOCK, dim=1)], dim=1)
        return Matrix(self.keep(values), self.keep(scale), self.keep(sums), rows, columns)

    def layer(self, block: nn.Module) -> Layer:
        a, mlp = block.self_attn, block.mlp
        K, D = len(a.A), a.head_dim
        H, ones = a.q_proj.out_features // D, torch.ones(D)
        q, k = (n.weight.float() if isinstance(n, RMSNorm) else ones for n in (a.q_norm, a.k_norm))  # else Identity
        heads = torch.cat([(q * D**-0.5).expand(H, D), k.expand(K, D)])
        vectors = dict(norm1=block.input_layernorm.weight, norm2=block.post_attention_layernorm.weight, heads=heads)
        vectors |= dict(residual1=block.input_residual, residual2=block.post_attention_residual)
        fields = {name: self.keep(x.float()) for name, x in (vectors | dict(dt=a.dt_proj.weight, A=a.A)).items()}
        fields |= dict(qkv=self.matrix(a.q_proj.weight, a.k_proj.weight, a.v_proj.weight))
        fields |= dict(out=self.matrix(a.o_proj.weight), down=self.matrix(mlp.down_proj.weight))
        fields |= dict(gate_up=self.matrix(mlp.gate_proj.weight, mlp.up_proj.weight))
        if isinstance(mlp, CDMoE):
            fields |= dict(router=self.matrix(mlp.router_gate.weight, dtype=torch.float32))
            fields |= {name: self.keep(getattr(mlp, name).weight) for name in ("down_embed", "up_embed")}
        return Layer(**fields)

    def room(self, length: int) -> int:
        return length

    def bind(self, cache: Cache) -> None:
        """Makes `tokens` of one token for each row of a cache, and `logits` for them."""
        memory, dtype = [x for slots in cache.layers for x in slots], self.dtype_of_model
        assert all(x.is_contiguous() for x in memory) and cache.layers[0].k.dtype == dtype, "step.cpp trusts addresses"
        B, _, N, D = cache.layers[0].k.shape
        self.slots = (Slots * len(cache.layers))(*(Slots(*(x.data_ptr() for x in slots)) for slots in cache.layers))
        self.frequencies = cache.frequencies.view(-1, D)[:, D // 2 :].contiguous()  # (B or 1, D / 2)
        self.rows, self.logits = torch.arange(B), torch.empty(B, self.model.head.rows)
        stride = D // 2 if len(self.frequencies) > 1 else 0
        addresses = dict(row=self.rows.data_ptr(), place=cache.length.data_ptr(), slots=self.slots)
        self.tokens = Tokens(n=B, N=N, wanted=B, stride=stride, frequencies=self.frequencies.data_ptr(), **addresses)
        self.bound = cache

    def step(self, token: Tensor) -> Tensor:
        """Adds `tokens`, with these ids, to the cache -> the logits of the last `wanted` of them."""
        token = token.to(torch.int64).contiguous()
        self.tokens.id, logits = token.data_ptr(), c_void_p(self.logits.data_ptr())
        dtypes, threads = (self.dtype_of_model == torch.bfloat16, self.dtype.itemsize), torch.get_num_threads()
        if not self.library.step(byref(self.model), byref(self.tokens), logits, *dtypes, threads):
            raise IndexError(f"one of the tokens {token.tolist()} is not in the vocabulary")
        return self.logits

    @torch.inference_mode()
    def read(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Adds tokens (T,) to a cache of one row that has a free slot for each -> the logits (1, V) after the last."""
        self.bind(cache)
        row, place = torch.zeros_like(tokens), cache.length + torch.arange(len(tokens))
        self.tokens.n, self.tokens.row, self.tokens.place = len(tokens), row.data_ptr(), place.data_ptr()
        self.bound = None
        self.step(tokens)
        cache.length += len(tokens)
        return self.logits

    @torch.inference_mode()
    def __call__(self, token: Tensor, cache: Cache) -> Tensor:
        if self.bound is not cache:
            self.bind(cache)
        self.step(token)
        cache.length += 1
        return self.logits
