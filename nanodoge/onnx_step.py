"""One step of generation as an ONNX graph, and a decoder that runs it.

    decoder = OnnxDecoder(model, torch.int8)          # in place of nanodoge.decode.Decoder: faster without a compiler
    logits = decoder(token, cache)

The graph takes one token per row and the state. It gives the logits, and the state with the token in it. The state of
Doge has a constant size (see nanodoge/attention.py): for each layer k, v, s and position, in at most W + 1 slots, of
which the last is a spare. So one graph generates text of any length.

Why it is fast:
- onnxruntime starts an operation in 0.4 us, torch in 2 to 5.
- Most of a layer are operations that onnxruntime has as one, such as attention over the slots in use.
- The new state is written over the old one, so nothing is copied per token.
- While no row is full, a form of the graph without the choice of keys runs: of the 20M 238 nodes in place of 302.
- A third form reads the tokens of a short prompt together.
- A product with int8 weights rounds its inputs to int8 too, with a scale for each row and each BLOCK of inputs.

The last point is the one difference from Decoder. In float32 the greedy text is the same; in int8 another token may be
taken where two are nearly as likely.

Shapes as in model.py: B batch, C hidden size, H heads, K key/value heads, D head size. Also L layers, N slots,
G = H / K, and R = B K: each key/value head is a row of its own, with G heads. n tokens: one per row, or T of a prompt.
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from model import CDMoE, Doge, RMSNorm, rotary_frequencies
from nanodoge.attention import LARGEST, NEVER, Cache
from nanodoge.decode import one_thread
from nanodoge.layouts import quantise

try:
    import onnx
    import onnxruntime
    from onnx import GraphProto, TensorProto, helper, numpy_helper
except ImportError:
    raise ValueError("ONNX needs two packages: pip install onnx onnxruntime") from None

BLOCK = 256  # the most that onnxruntime takes; with 32 large products take twice as long
LEAST_BLOCK = 16  # the least that it takes; a matrix of fewer inputs stays in float32
LARGEST_FILE = 1_900_000_000  # bytes of weights: an ONNX file ends at 2 GiB; more go to a file beside it
FLOAT, INT32, INT64 = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64
FUSED = {"SkipSimplifiedLayerNormalization", "GroupQueryAttention", "MatMulNBits", "QuickGelu"}  # onnxruntime's own


class Matrix(NamedTuple):
    """A matrix of weights (out, in) in a graph."""

    name: str
    inputs: int
    values: np.ndarray  # (out, in) fp32, fp16 or int8; for MatMulNBits uint8 (out, blocks, block), with 128 for 0
    scale: Tensor | None = None  # of int8: (out, 1) fp32
    block: int = 0  # of MatMulNBits


class Graph:
    """Nodes and weights of an ONNX graph. expand: int8 becomes float32 when the graph is loaded, for runtimes whose
    int8 product is slower (in a browser by ten times). matrices: those of another form of the graph, or {}."""

    def __init__(self, dtype: torch.dtype, expand: bool, matrices: dict[str, Matrix]):
        self.dtype, self.expand, self.matrices = dtype, expand, matrices
        self.nodes, self.constants, self.weights, self.names = [], [], {}, 0

    def name(self) -> str:
        self.names += 1
        return f"x{self.names}"

    def add(self, operator: str, *inputs, outputs: int | list[str] = 1, **attributes) -> str | list[str]:
        """Adds a node -> the name of its output, or those of several. inputs: names, weights, or plain numbers."""
        inputs = [x if isinstance(x, str) else self.store(x) for x in inputs]
        outputs = [self.name() for _ in range(outputs)] if isinstance(outputs, int) else outputs
        domain = "com.microsoft" if operator in FUSED else ""
        self.nodes.append(helper.make_node(operator, inputs, outputs, domain=domain, **attributes))
        return outputs if len(outputs) > 1 else outputs[0]

    def store(self, value: Tensor | float | list[int]) -> str:
        """Stores weights, or numbers as float32 or int64 -> their name."""
        if isinstance(value, Tensor):
            name = f"w{len(self.weights)}"  # the same in all forms of the graph
            self.weights[name] = value.detach().contiguous().numpy()
        else:  # the shapes of other tensors may depend on it
            name = self.name()
            self.constants.append(numpy_helper.from_array(torch.tensor(value).numpy(), name))
        return name

    def matrix(self, *weights: Tensor) -> Matrix:
        """The rows of all weights (out, in), one after another."""
        name = f"w{len(self.weights)}"
        if name not in self.matrices:
            self.matrices[name] = self.pack(name, torch.cat([w.detach().float() for w in weights]))
        self.weights[name] = self.matrices[name].values
        return self.matrices[name]

    def pack(self, name: str, weight: Tensor) -> Matrix:
        """weight (out, in) fp32 in the format that the graph stores."""
        inputs = weight.shape[1]
        block = math.gcd(inputs, BLOCK)
        if self.dtype != torch.int8 or block < LEAST_BLOCK:
            dtype = torch.float32 if self.dtype == torch.int8 else self.dtype
            return Matrix(name, inputs, weight.to(dtype).numpy())
        values, scale = quantise({"w": weight}).values()
        if self.expand:
            return Matrix(name, inputs, values.numpy(), scale[:, None])
        values = (values.int() + 128).to(torch.uint8).unflatten(1, (-1, block))
        return Matrix(name, inputs, values.numpy(), scale[:, None], block)

    def product(self, x: str, matrix: Matrix, outputs: int | list[str] = 1) -> str:
        """x (n, in) fp32 -> (n, out)."""
        if not matrix.block:
            return self.add("Gemm", x, self.floats(matrix, matrix.name, matrix.scale), transB=1, outputs=outputs)
        scale = matrix.scale.repeat(1, matrix.inputs // matrix.block)
        sizes = dict(K=matrix.inputs, N=len(scale), bits=8, block_size=matrix.block, accuracy_level=4)  # 4: x as int8
        return self.add("MatMulNBits", x, matrix.name, scale, **sizes, outputs=outputs)

    def rows(self, matrix: Matrix, index: str) -> str:
        """index (n,) -> (n, in) fp32."""
        scale = None if matrix.scale is None else self.add("Gather", matrix.scale, index)
        return self.floats(matrix, self.add("Gather", matrix.name, index), scale)

    def floats(self, matrix: Matrix, values: str, scale: str | Tensor | None) -> str:
        """All rows or some as fp32, from their values and scales."""
        x = values if self.dtype == torch.float32 else self.add("Cast", values, to=FLOAT)
        if matrix.block:
            x = self.add("Reshape", self.add("Sub", x, 128.0), [-1, matrix.inputs])
        return x if scale is None else self.add("Mul", x, scale)


class Weakest(NamedTuple):
    """Of every layer the key that a full row loses to a stronger one: names, of lists one for each layer."""

    spare: str  # (1,): N - 1
    least: list[str]  # (R, 1, 1, 1): its score. Of other rows: NEVER
    leaving: list[str]  # (R, 1, 1, 1): its slot; the spare one
    kept: list[str]  # (R, 1, 1, 1): the slot of a new key that is kept


class Shared(NamedTuple):
    """What the layers of one step share: names. T = 1 but in the form that reads a prompt."""

    rotary: list[str]  # cos and sin (R, 1, D / 2); of a prompt (1, T, D / 2)
    position: str  # (R, 1, 1, T): of the new keys
    slots: str  # (1,) int32: N; of a prompt those in use
    at: str  # (R, 1, 1, T): where GroupQueryAttention puts the new keys: the next slots, or the spare one of a full row
    at32: str  # (R,) int32: the last of these
    weakest: Weakest | None = None  # None: no row is full
    used: str = ""  # (1,) of a prompt: slots in use
    bias_shape: str = ""  # (4,) of a prompt: K, G, T, used


def begin_step(graph: Graph, L: int, K: int, evicts: bool) -> Shared:
    """The nodes before the first layer: positions, and the rotary embedding."""
    add = graph.add
    length = add("Reshape", add("Tile", add("Unsqueeze", "length", [1]), [1, K]), [-1, 1, 1, 1])  # (R, 1, 1, 1)
    angles = add("Mul", add("Reshape", add("Cast", length, to=FLOAT), [-1, 1]), "frequencies")  # (R, D / 2)
    rotary = [add("Unsqueeze", add(name, angles), [1]) for name in ("Cos", "Sin")]
    at, slots, weakest = length, add("Shape", "s0", start=3), None
    if evicts:
        spare = add("Sub", slots, [1])
        at = add("Min", length, spare)
        weakest = find_weakest(graph, L, spare, at)
    at32 = add("Reshape", add("Cast", at, to=INT32), [-1])
    return Shared(rotary, length, add("Cast", slots, to=INT32), at, at32, weakest)


def begin_prompt(graph: Graph, K: int, G: int) -> Shared:
    """The nodes before the first layer of the form that reads a prompt, whose row has a free slot for every token."""
    add = graph.add
    angles = add("Mul", add("Reshape", add("Cast", "position", to=FLOAT), [1, -1, 1]), "frequencies")  # (1, T, D / 2)
    places = add("Tile", add("Reshape", "position", [1, 1, 1, -1]), [K, 1, 1, 1])
    last = add("Gather", "position", [-1])
    used, T = add("Add", last, [1]), add("Shape", "position")
    last32, used32 = (add("Cast", x, to=INT32) for x in (last, used))
    rotary, bias_shape = [add(name, angles) for name in ("Cos", "Sin")], add("Concat", [K, G], T, used, axis=0)
    return Shared(rotary, places, used32, places, last32, None, used, bias_shape)


def find_weakest(graph: Graph, L: int, spare: str, at: str) -> Weakest:
    """The nodes that find which keys full rows may lose (attention.remember)."""
    add = graph.add
    every = add("Tile", at, [L, 1, 1, 1])  # (L R, 1, 1, 1), as what follows: of all layers at once
    full = add("Equal", every, spare)
    some_full = add("Cast", add("ReduceMax", add("Cast", full, to=INT32), keepdims=0), to=TensorProto.BOOL)
    least, oldest = add("If", some_full, outputs=2, **weakest_branches(graph, L, spare, every))
    found = [("Where", full, least, NEVER), ("Where", full, oldest, spare), ("Where", full, oldest, every)]
    parts = (add("Split", add(*node), axis=0, outputs=L, num_outputs=L) for node in found)
    return Weakest(spare, *(x if L > 1 else [x] for x in parts))


def weakest_branches(graph: Graph, L: int, spare: str, every: str) -> dict[str, GraphProto]:
    """The branches of an If: where a row is full, `least` and `oldest` (L R, 1, 1, 1) are the smallest score that a row
    holds and the slot of the oldest key that has it. Searching all slots takes time, so it is done only there."""
    add, begin, branches = graph.add, len(graph.nodes), {}
    kinds = (("least", FLOAT), ("oldest", INT64))
    outputs = [helper.make_tensor_value_info(name, kind, None) for name, kind in kinds]
    for branch in ("then_branch", "else_branch"):
        if branch == "then_branch":
            s, position = (
                add("Slice", add("Concat", *(f"{name}{i}" for i in range(L)), axis=0), [0], spare, [3])
                for name in ("s", "position")
            )
            least = add("ReduceMin", s, [3], outputs=["least"])
            position = add("Where", add("Equal", s, least), position, torch.iinfo(torch.int64).max)
            add("ArgMin", position, axis=3, outputs=["oldest"])
        else:
            add("Expand", NEVER, add("Shape", every), outputs=["least"])
            add("Identity", every, outputs=["oldest"])
        branches[branch] = helper.make_graph(graph.nodes[begin:], branch, [], outputs)
        del graph.nodes[begin:]
    return branches


def attention(graph: Graph, i: int, layer: nn.Module, h: str, shared: Shared, eps: float) -> tuple[str, str]:
    """The nodes of DynamicMaskAttention: h (n, C) -> (n, C), and the slots (R, 1, 1, T) of the new keys. For
    GroupQueryAttention n rows with one token each are R rows with one key/value head; a prompt is one row with K."""
    add, K, D, is_prompt = graph.add, len(layer.A), layer.head_dim, bool(shared.used)
    G, heads = layer.q_proj.out_features // (K * D), K if is_prompt else 1
    qkv = torch.cat([x.weight.unflatten(0, (K, -1)) for x in (layer.q_proj, layer.k_proj, layer.v_proj)], dim=1)
    qkv = add("Reshape", graph.product(h, graph.matrix(*qkv)), [-1, *[K] * is_prompt, G + 2, D])
    qk, v = add("Split", qkv, [G + 1, 1], axis=-2, outputs=2)
    if isinstance(layer.q_norm, RMSNorm):
        weights = torch.cat((layer.q_norm.weight.expand(G, D), layer.k_norm.weight[None]))
        qk = add("RMSNormalization", qk, weights, axis=-1, epsilon=eps)
    width = heads * (G + 1)
    qk = add("Reshape", qk, [1, -1, width * D] if is_prompt else [-1, 1, width * D])
    qk = add("RotaryEmbedding", qk, *shared.rotary, num_heads=width)
    dt = add("Softplus", add("Gemm", h, layer.dt_proj.weight @ layer.v_proj.weight, transB=1))  # (n, K)
    score = add("Exp", add("Min", add("Mul", dt, layer.A), LARGEST))
    if is_prompt:
        q, k = add("Split", add("Reshape", qk, [-1, K, G + 1, D]), [G, 1], axis=2, outputs=2)
        q, k, v = (add("Reshape", x, [1, -1, K * n * D]) for x, n in ((q, G), (k, 1), (v, 1)))
        score = add("Reshape", add("Transpose", score, perm=[1, 0]), [K, 1, 1, -1])
    else:
        q, k = add("Split", qk, [G * D, D], axis=2, outputs=2)
        score = add("Reshape", score, [-1, 1, 1, 1])

    slot, new, weakest = shared.at, score, shared.weakest
    if weakest:
        # The new key is appended at `at`. Of a full row one key is not seen: the weakest, or the new if it is weaker.
        loses = add("Less", score, weakest.least[i])
        new, old = add("Where", loses, NEVER, score), add("Where", loses, weakest.least[i], NEVER)
        slot = add("Where", loses, weakest.spare, weakest.kept[i])
        seen = add("ScatterElements", f"s{i}", weakest.leaving[i], old, axis=3)
        seen = add("ScatterElements", seen, shared.at, new, axis=3)
    new_s = add("ScatterElements", f"s{i}", slot, new, axis=3, outputs=[f"new_s{i}"])
    add("ScatterElements", f"position{i}", slot, shared.position, axis=3, outputs=[f"new_position{i}"])
    bias = seen if weakest else new_s
    if is_prompt:  # for every query the scores of the slots in use; the causal mask is GroupQueryAttention's
        bias = add("Expand", add("Slice", new_s, [0], shared.used, [3]), shared.bias_shape)
        bias = add("Reshape", bias, [1, K * G, 0, 0])  # 0: as before
    inputs = q, k, v, f"k{i}", f"v{i}", shared.at32, shared.slots, "", "", "", bias
    names = [graph.name(), f"new_k{i}", f"new_v{i}"]
    found, *_ = add("GroupQueryAttention", *inputs, num_heads=heads * G, kv_num_heads=heads, outputs=names)
    return graph.product(add("Reshape", found, [-1, K * G * D]), graph.matrix(layer.o_proj.weight)), slot


def feed_forward(graph: Graph, mlp: nn.Module, h: str) -> str:
    """The nodes of MLP or CDMoE: h (n, C) -> (n, C)."""
    add, matrix = graph.add, graph.matrix
    both = graph.product(h, matrix(mlp.gate_proj.weight, mlp.up_proj.weight))
    gate, up = add("Split", both, axis=1, outputs=2, num_outputs=2)
    y = graph.product(add("Mul", add("QuickGelu", gate, alpha=1.0), up), matrix(mlp.down_proj.weight))  # SiLU
    if not isinstance(mlp, CDMoE):
        return y
    C, n, k = mlp.gate_proj.in_features, mlp.num_keys, mlp.top_k  # see CDMoE.route
    logits = add("Reshape", add("Gemm", h, mlp.router_gate.weight, transB=1), [-1, 2, n])
    best, index = add("TopK", logits, [min(k, n)], axis=2, outputs=2)  # (n, 2, k)
    i, j = (graph.store(ranks) for ranks in mlp.pairs)
    sums = (add("Gather", add("Gather", best, half, axis=1), ranks, axis=1) for half, ranks in ((0, i), (1, j)))
    scores, pair = add("TopK", add("Add", *sums), [k], axis=1, outputs=2)  # (n, k)
    x, y_ = (
        add("GatherElements", add("Gather", index, half, axis=1), add("Gather", ranks, pair), axis=1)
        for half, ranks in ((0, i), (1, j))
    )
    experts = add("Reshape", add("Add", add("Mul", x, n), y_), [-1])  # (n k,)
    tables = (graph.rows(matrix(table.weight), experts) for table in (mlp.down_embed, mlp.up_embed))
    down, up = (add("Reshape", rows, [-1, k, C]) for rows in tables)
    hidden = add("QuickGelu", add("MatMul", down, add("Unsqueeze", h, [2])), alpha=1.0)  # (n, k, 1)
    hidden = add("Mul", hidden, add("Unsqueeze", add("Softmax", scores, axis=1), [2]))
    return add("Add", y, add("ReduceSum", add("Mul", hidden, up), [1], keepdims=0))


def step_model(
    model: Doge, dtype: torch.dtype, vocab_size: int, expand: bool = False, form: str = "evicts", matrices=None
):
    """The graph as a ModelProto without its weights, and these by name. dtype: of the matrices, float32, float16 or
    int8. vocab_size: tokens that have logits. Raises ValueError for heads that onnxruntime cannot attend with.

    Inputs: token and length (B,), the tokens before it; frequencies (R or 1, D / 2) of the rotary embedding; and of
    each layer k, v (R, 1, N, D), s and position (R, 1, 1, N). There must be a free slot beside the spare one, or W + 1
    slots. Outputs: logits (B, V), new_k ... of each layer, and slot (L, R). The new key of a full row is in the last
    slot of new_k and new_v: the caller copies it from there to `slot`.

    form "evicts": this; "free": no row is full, and there is no output `slot`; "prompt": one row is not full, its
    tokens are token (T,), their places position (T,), and the logits (1, V) are those after the last; k and v are
    (1, K, N, D). matrices: the weights of one form, which another need not make again.
    """
    config, graph = model.config, Graph(dtype, expand, {} if matrices is None else matrices)
    evicts, is_prompt = form == "evicts", form == "prompt"
    L, K, D, eps = config.num_hidden_layers, config.num_key_value_heads, config.head_dim, config.rms_norm_eps
    if D % 8:
        raise ValueError(f"ONNX: heads of {D} numbers; onnxruntime takes multiples of 8")
    embedding = graph.matrix(model.embed_tokens.weight[:vocab_size])
    head = embedding if config.tie_word_embeddings else graph.matrix(model.lm_head.weight[:vocab_size])
    G, slots = config.num_attention_heads // K, []
    shared = begin_prompt(graph, K, G) if is_prompt else begin_step(graph, L, K, evicts)
    x = graph.rows(embedding, "token")
    h = graph.add("RMSNormalization", x, model.layers[0].input_layernorm.weight, axis=-1, epsilon=eps)

    def add_norm(y, x, residual, norm):
        """residual x + y, and its norm."""
        x = graph.add("Mul", x, residual)
        h, _, _, x = graph.add("SkipSimplifiedLayerNormalization", y, x, norm.weight, epsilon=eps, outputs=4)
        return x, h

    following = [block.input_layernorm for block in model.layers[1:]] + [model.norm]
    for i, (block, norm) in enumerate(zip(model.layers, following, strict=True)):
        y, slot = attention(graph, i, block.self_attn, h, shared, eps)
        slots.append(slot)
        x, h = add_norm(y, x, block.input_residual, block.post_attention_layernorm)
        x, h = add_norm(feed_forward(graph, block.mlp, h), x, block.post_attention_residual, norm)
    if evicts:
        graph.add("Reshape", graph.add("Concat", *slots, axis=0), [L, -1], outputs=["slot"])
    graph.product(graph.add("Gather", h, [-1]) if is_prompt else h, head, outputs=["logits"])

    def tensors(prefix):
        keys = FLOAT, [1, K, "N", D] if is_prompt else ["R", 1, "N", D]
        kinds = dict(k=keys, v=keys)
        kinds |= dict(s=(FLOAT, ["R", 1, 1, "N"]), position=(INT64, ["R", 1, 1, "N"]))
        return [info(f"{prefix}{name}{i}", *kind) for i in range(L) for name, kind in kinds.items()]

    info = helper.make_tensor_value_info
    place = info("position", INT64, ["T"]) if is_prompt else info("length", INT64, ["B"])
    inputs = [info("token", INT64, [place.name[0]]), place, info("frequencies", FLOAT, ["F", D // 2])]
    outputs = [info("logits", FLOAT, ["B", vocab_size])] + [info("slot", INT64, [L, "R"])] * evicts
    proto = helper.make_graph(graph.nodes, "step", inputs + tensors(""), outputs + tensors("new_"), graph.constants)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(proto, opset_imports=opsets, ir_version=11), graph.weights


def save_step(model: Doge, path: Path, dtype: torch.dtype, vocab_size: int, expand: bool) -> None:
    """Writes the graph and its weights, with the rotary frequencies as one of these."""
    proto, weights = step_model(model, dtype, vocab_size, expand)
    config = model.config
    weights["frequencies"] = rotary_frequencies(config.head_dim, config.rope_theta)[
        None, config.head_dim // 2 :
    ].numpy()
    [given] = [x for x in proto.graph.input if x.name == "frequencies"]
    proto.graph.input.remove(given)
    proto.graph.initializer.extend(numpy_helper.from_array(w, name) for name, w in weights.items())
    beside = sum(w.nbytes for w in weights.values()) > LARGEST_FILE
    onnx.save_model(proto, path, save_as_external_data=beside, location=f"{path.name}.data")


class OnnxDecoder:
    """Decoder of nanodoge/decode.py, by onnxruntime on a CPU. It works on the memory of a Cache in float32.

    decoder(token (B,), cache) -> logits (B, V) fp32, valid until the next call, and the cache holds the token. dtype:
    float32 or int8.
    """

    compiled, sampling = False, staticmethod(one_thread)
    reads = 256  # tokens of a prompt that it reads faster than the model: of 32 in 0.3 of the time, of 256 in 0.8

    def __init__(self, model: Doge, dtype: torch.dtype = torch.float32):
        if model.embed_tokens.weight.device.type != "cpu" or dtype not in (torch.float32, torch.int8):
            raise ValueError("--backend=onnx computes on a CPU: --device=cpu, with --dtype=float32 or int8")
        self.model, self.dtype, self.sessions = model, dtype, {}
        self.matrices, self.values = {}, {}  # of all forms of the graph
        if dtype == torch.float32:  # the form for prompts would be one more copy of the weights
            self.reads = 0
        self.vocab_size = model.config.vocab_size
        self.bound = None, ""  # the cache and the form of the step that `binding` is of
        self.session("free")

    def session(self, form: str) -> onnxruntime.InferenceSession:
        """A form of the graph (see step_model), loaded at the first call. All share the weights."""
        if form in self.sessions:
            return self.sessions[form]
        proto, weights = step_model(self.model, self.dtype, self.vocab_size, form=form, matrices=self.matrices)
        for name, w in weights.items():  # ONNX files end at 2 GB, so the weights are given as they lie in memory
            kind = helper.np_dtype_to_tensor_dtype(w.dtype)
            tensor = TensorProto(name=name, data_type=kind, dims=w.shape, data_location=TensorProto.EXTERNAL)
            tensor.external_data.add(key="location", value="memory")
            proto.graph.initializer.append(tensor)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Threads of onnxruntime that wait for work would take the cores from those of torch, which draw the tokens.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self.values = self.values or {name: onnxruntime.OrtValue.ortvalue_from_numpy(w) for name, w in weights.items()}
        options.add_external_initializers(list(self.values), list(self.values.values()))
        self.sessions[form] = onnxruntime.InferenceSession(proto.SerializeToString(), options)
        return self.sessions[form]

    def room(self, length: int) -> int:
        return length

    def bind(self, form: str, cache: Cache, **tensors: Tensor) -> tuple[onnxruntime.IOBinding, dict[str, Tensor]]:
        """Makes these tensors and the memory of a cache the inputs and outputs of a form of the graph -> the binding,
        and all of its tensors by name."""
        session, (B, K, N, D) = self.session(form), cache.layers[0].k.shape
        frequencies = cache.frequencies.view(-1, D)[:, D // 2 :]
        tensors["frequencies"] = frequencies.repeat_interleave(K if len(frequencies) > 1 else 1, dim=0)
        tensors["logits"] = torch.empty(B, self.vocab_size)
        tensors["slot"] = torch.empty(len(cache.layers), B * K, dtype=torch.long)
        heads = (1, K) if form == "prompt" else (B * K, 1)
        for i, slots in enumerate(cache.layers):
            for name, x in slots._asdict().items():
                x = x.view(*heads, N, D) if name in "kv" else x.view(B * K, 1, 1, N)
                tensors[f"{name}{i}"] = tensors[f"new_{name}{i}"] = x
        binding = session.io_binding()
        for places, side in ((session.get_inputs(), binding.bind_input), (session.get_outputs(), binding.bind_output)):
            for name in (place.name for place in places):
                x = tensors[name]
                assert x.is_contiguous(), f"onnxruntime reads the memory of {name} from its beginning on"
                side(name, "cpu", 0, np.float32 if x.dtype == torch.float32 else np.int64, x.shape, x.data_ptr())
        return binding, tensors

    @torch.inference_mode()
    def read(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Adds tokens (T,) to a cache of one row that has a free slot for each -> the logits (1, V) after the last."""
        position = cache.length + torch.arange(len(tokens))
        binding, tensors = self.bind("prompt", cache, token=tokens, position=position)
        self.session("prompt").run_with_iobinding(binding)
        cache.length += len(tokens)
        return tensors["logits"]

    @torch.inference_mode()
    def __call__(self, token: Tensor, cache: Cache) -> Tensor:
        form = "evicts" if cache.evicts else "free"
        if self.bound != (cache, form):
            self.bound = cache, form
            self.binding, self.tensors = self.bind(form, cache, token=torch.empty_like(token), length=cache.length)
        self.tensors["token"].copy_(token)
        self.session(form).run_with_iobinding(self.binding)
        if cache.evicts:  # the keys of full rows are in the last slot
            _, K, N, D = cache.layers[0].k.shape
            begin = torch.arange(0, len(token) * K * N, N)  # of each row's slots, among those of all rows
            last = begin + cache.length.clamp(max=N - 1).repeat_interleave(K)
            for slot, slots in zip(self.tensors["slot"] + begin, cache.layers, strict=True):
                for x in (slots.k.view(-1, D), slots.v.view(-1, D)):
                    x.index_copy_(0, slot, x[last])
        cache.length += 1
        return self.tensors["logits"]
