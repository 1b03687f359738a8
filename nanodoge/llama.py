"""llama.cpp beside us: a model of the same shape with random weights, and its batched decoding without HTTP.

Needs `pip install llama-cpp-python gguf`. The model is a Llama: its layer has the same matrix products as Doge's and no
dynamic mask. It writes the greedy text, by llama.cpp's own sampler, as ours does.
"""

import functools
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np

from model import DogeConfig


def write_gguf(path: Path, config: DogeConfig, kind: str) -> None:
    """A GGUF file of random weights. kind: F32, BF16, F16 or Q8_0, of the matrices."""
    import gguf

    C, M, V, D = config.hidden_size, config.intermediate_size, config.vocab_size, config.head_dim
    heads, key_heads, layers = config.num_attention_heads, config.num_key_value_heads, config.num_hidden_layers
    fields = dict(tokenizer_model="none", vocab_size=V, context_length=config.max_position_embeddings)
    fields |= dict(embedding_length=C, feed_forward_length=M, block_count=layers, head_count=heads)
    fields |= dict(head_count_kv=key_heads, key_length=D, value_length=D, rope_dimension_count=D)
    file = gguf.GGUFWriter(path, "llama")
    for name, value in (fields | dict(layer_norm_rms_eps=1e-6)).items():
        getattr(file, f"add_{name}")(value)
    shapes = {"attn_q": (heads * D, C), "attn_k": (key_heads * D, C), "attn_v": (key_heads * D, C)}
    shapes |= {"attn_output": (C, heads * D), "ffn_gate": (M, C), "ffn_up": (M, C), "ffn_down": (C, M)}
    shapes |= {"attn_norm": (C,), "ffn_norm": (C,)}
    blocks = {f"blk.{i}.{name}": shape for i in range(layers) for name, shape in shapes.items()}
    draw, quant = np.random.default_rng(0), gguf.GGMLQuantizationType[kind]
    for name, shape in ({"token_embd": (V, C), "output_norm": (C,)} | blocks).items():
        weight = draw.normal(0, 0.02, shape).astype(np.float32) if len(shape) == 2 else np.ones(shape, np.float32)
        if len(shape) == 1 or kind == "F32":
            file.add_tensor(f"{name}.weight", weight)
        else:
            file.add_tensor(f"{name}.weight", gguf.quants.quantize(weight, quant), raw_dtype=quant)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


@functools.cache
def load_llama() -> tuple:
    """llama_cpp, started, and the silent log, which must live as long. Raises ValueError without the two packages."""
    try:
        import gguf  # noqa: F401
        import llama_cpp as llama
    except ImportError:
        raise ValueError("llama.cpp needs two packages: pip install llama-cpp-python gguf") from None
    llama.llama_backend_init()
    llama.llama_log_set(silent := llama.llama_log_callback(lambda *_: None), None)
    return llama, silent


def llama_writer(
    config: DogeConfig, kind: str, rows: int, prompt: int, new: int, threads: int
) -> Callable[..., list[list[int]]]:
    """A step of bench.py: each call writes `rows` texts of `new` tokens after prompts of `prompt` tokens, and returns
    them. The prompts are read together, then one token of every row at a time. Called with draws=False it computes the
    logits alone: it reads the prompt's last token again and again."""
    llama, _ = load_llama()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.gguf")
        write_gguf(path, config, kind)
        model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
    params = llama.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = rows * (prompt + new), 2048, 512, rows
    params.n_threads = params.n_threads_batch = threads
    context, batch = llama.llama_init_from_model(model, params), llama.llama_batch_init(max(2048, rows), 0, 1)
    sampler = llama.llama_sampler_init_greedy()

    def read(places: list[tuple[int, int, int, bool]], draws: bool, texts: list[list[int]]):
        """places: [(row, position, token, whether the row's next token is chosen)], in one batch."""
        batch.n_tokens = len(places)
        for i, (row, position, token, is_last) in enumerate(places):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, is_last
            batch.seq_id[i][0] = row
        assert llama.llama_decode(context, batch) == 0
        for i, (row, _, token, is_last) in enumerate(places):
            if is_last:  # i: the place in the batch whose logits the sampler reads
                texts[row].append(llama.llama_sampler_sample(sampler, context, i) if draws else token)

    def step(draws: bool = True) -> list[list[int]]:
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        texts, V = [[] for _ in range(rows)], config.vocab_size
        every = [(row, i, (row * prompt + i) % V, i == prompt - 1) for row in range(rows) for i in range(prompt)]
        for i in range(0, len(every), 2048):
            read(every[i : i + 2048], draws, texts)
        for i in range(new - 1):
            read([(row, prompt + i, text[-1], True) for row, text in enumerate(texts)], draws, texts)
        llama.llama_synchronize(context)
        return texts

    weakref.finalize(step, lambda: (llama.llama_free(context), llama.llama_model_free(model)))
    return step
