"""How good is a model? Bits per byte of text it has never seen, and standard benchmarks.

    python evaluate.py out/stories --bpb=data/stories
    python evaluate.py out/mine --bpb=data/mine --dtype=float32,bfloat16,int8
    python evaluate.py out/mine --tasks=piqa,arc_easy=5 --limit=100 --out=piqa.json      arc_easy with 5 solved examples
    python evaluate.py out/mine --suite=base

Bits per byte (defined in nanodoge/data.py) are computed token by token, as in generation, so the change from int8 here
is the change in what the model writes. The benchmarks are those of EleutherAI's lm-evaluation-harness (`pip install
lm_eval`), so the numbers can be compared with published ones. It asks the model three things:

    log-likelihood   how probable is this answer after that context? A small model cannot be asked "A, B, C or D?", but
                     which of four answers is the most probable can be computed (`acc`; `acc_norm` divides by length).
    rolling          how probable is this whole text? (perplexity)
    generation       the completion, up to a stop string, is compared with the right answer.

Few-shot: the context begins with n solved questions; scores with different n cannot be compared. Each score has its
standard error: with 100 questions, 30 % right is 30 +- 4.6, which does not differ from the 25 % that guessing gives
with four answers. A score that is less than two standard errors above guessing shows nothing.
"""

import difflib
import hashlib
import json
from collections import defaultdict
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils._pytree import tree_map
from tqdm import tqdm

from model import Doge
from nanodoge.attention import Cache
from nanodoge.checkpoint import load_model
from nanodoge.data import Sequences, bits_per_byte, check_tokenizer, token_bytes
from nanodoge.decode import Decoder
from nanodoge.engine import Engine, Request
from nanodoge.examples import bucket_by_length
from nanodoge.losses import rows_at_once
from nanodoge.machine import Machine
from nanodoge.options import Count, Range, Whole, check_ranges, one_line, parse_options, run_command
from nanodoge.tokenizer import Tokenizer

# What the original project measures, with its few-shot counts. Its MMLU scores the texts of the answers and not their
# letters, hence mmlu_continuation. The last two suites are for models that chat, so they use the chat template.
SUITES = {
    "base": "hellaswag=0 arc_easy=5 arc_challenge=5 piqa=5 mmlu_continuation=5 winogrande=0 openbookqa=0 triviaqa=5",
    "instruct": "ifeval=0 hellaswag=0 arc_easy=0 arc_challenge=0 piqa=0 mmlu_continuation=0 bbh_fewshot=3",
    "reason": "gsm8k aime24=0 minerva_math500=0 gpqa_diamond_cot_zeroshot=0",
}


@dataclass
class EvaluateOptions:
    """What is measured"""

    checkpoint: list[str] = field(default_factory=lambda: ["out/stories"])  # folder of the model, or a name on the hub
    bpb: str = ""  # data folder whose validation text is measured; empty = data/stories, unless tasks are asked for
    eval_tokens: Count = 32768  # of the validation text at most, rounded up to whole sequences
    micro_batch_size: Count = 64  # sequences of the validation text at once
    tasks: list[str] = field(default_factory=list)  # benchmarks by their names in lm_eval, as NAME or NAME=SHOTS
    suite: Literal["", "base", "instruct", "reason"] = ""  # the benchmarks of the original's tables
    num_fewshot: Annotated[int, Range(-1)] = -1  # solved examples before each question; -1 = what suite or task say
    limit: Whole = 0  # questions of each task, the first ones; 0 = all
    apply_chat_template: Literal["auto", "on", "off"] = "auto"  # ask in a conversation; auto: not in suite base
    include_path: str = ""  # folder with task files of your own (YAML), which need no network
    micro_batch_tokens: Whole = 0  # prompts and answers at once, padding included; 0 = 2048, on a GPU 65,536
    out: str = ""  # JSON file for all the results
    dtype: list[str] = field(default_factory=lambda: ["float32"])  # float32, bfloat16, int8; for tasks one, not int8
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the best there is

    def __post_init__(self):
        check_ranges(self)
        asks = bool(self.tasks or self.suite)
        self.bpb = self.bpb or ("" if asks else "data/stories")
        valid = {"float32", "bfloat16"} if asks else {"float32", "bfloat16", "int8"}
        if not valid >= set(self.dtype) or len(self.dtype) not in ([1] if asks else [1, 2, 3]):
            words = "float32 or bfloat16 for tasks" if asks else "one or more of float32, bfloat16, int8"
            raise ValueError(f"--dtype={','.join(self.dtype)} must be {words}")
        if self.include_path and not Path(self.include_path).is_dir():
            raise ValueError(f"--include_path={self.include_path} is not a folder")
        if self.out and (not asks or Path(self.out).is_dir() or not Path(self.out).absolute().parent.is_dir()):
            raise ValueError(f"--out={self.out} must be a file in a folder that is there, for the results of --tasks")
        if len(self.checkpoint) != 1:
            raise ValueError(f"one checkpoint folder, not {len(self.checkpoint)}: {' '.join(self.checkpoint)}")


def print_bits_per_byte(model: Doge, tokenizer: Tokenizer, options: EvaluateOptions, machine: Machine) -> None:
    """A row for each dtype."""
    rows = Sequences(options.bpb, "val", model.config.max_position_embeddings)
    check_tokenizer(tokenizer, options.bpb, source=options.checkpoint[0])
    if len(rows.tokens) < 2:
        raise ValueError(f"--bpb={options.bpb}: val.bin has {len(rows.tokens)} tokens, too few to measure")

    @torch.inference_mode()
    def nats_of(tokens: Tensor, targets: Tensor) -> float:
        cache, nats = model.new_cache(*tokens.shape), 0.0
        for token, target in zip(tokens.to(machine.device).T, targets.to(machine.device).T, strict=True):
            nats += F.cross_entropy(decoder(token, cache), target, reduction="sum").item()
        return nats

    first, sizes = None, token_bytes(tokenizer)
    print(f"{'weights':<10}{'loss':>10}{'bits/byte':>12}{'change':>10}{'tokens':>10}")
    for dtype in options.dtype:
        decoder = Decoder(model, getattr(torch, dtype))
        loss, bits, seen = bits_per_byte(nats_of, rows, sizes, options.eval_tokens, options.micro_batch_size, machine)
        first = first or loss
        print(f"{dtype:<10}{loss:>10.4f}{bits:>12.4f}{loss / first - 1:>+10.2%}{seen:>10,}", flush=True)


# ---- Log-likelihoods


@torch.inference_mode()
def log_likelihoods(model: Doge, pairs: list[tuple], micro_batch_tokens: int = 2048) -> list[tuple[float, bool]]:
    """For each of pairs [(context, answer)], lists of ids, neither empty: the answer's log-probability in nats, and
    whether greedy decoding would write it. A context of several answers is read once."""
    groups, scores = defaultdict(list), {}  # groups: {context: numbers of the pairs with it}
    for i, (context, _) in enumerate(pairs):
        groups[tuple(context)].append(i)
    contexts, groups = list(groups), list(groups.values())
    sizes = [len(group) * max(sum(map(len, pairs[i])) for i in group) for group in groups]
    for batch in tqdm(bucket_by_length(sizes, micro_batch_tokens), unit="batch", leave=False, disable=None):
        order = [i for j in batch for i in groups[j]]
        rows = [row for row, j in enumerate(batch) for _ in groups[j]]
        found = score_answers(model, [contexts[j] for j in batch], rows, [pairs[i][1] for i in order])
        scores |= zip(order, found, strict=True)
    return [scores[i] for i in range(len(pairs))]


def score_answers(model: Doge, contexts: list, rows: list[int], answers: list) -> list[tuple[float, bool]]:
    """[(log-probability, greedy)] of answers (lists of ids), of which number i continues contexts[rows[i]]."""
    lengths = [len(answer) for answer in answers]
    room = max(map(len, contexts)) + max(lengths)
    cache = model.new_cache(len(contexts), min(room, model.config.max_position_embeddings), room=room)
    states = read(model, contexts, cache, last=True)[rows]  # (answers, 1, C): they predict the first tokens
    cache.layers = tree_map(lambda x: x[rows], cache.layers)  # each answer continues a copy of its context's row
    cache.length = cache.length[rows]
    if max(lengths) > 1:
        states = torch.cat((states, read(model, [answer[:-1] for answer in answers], cache)), dim=1)
    states = torch.cat([row[:length] for row, length in zip(states, lengths, strict=True)])  # (N, C)
    targets = torch.tensor([token for answer in answers for token in answer], device=states.device)
    size, scores = rows_at_once(states, model.output_weight), []
    for x, target in zip(states.split(size), targets.split(size), strict=True):
        logits = F.linear(x, model.output_weight).float()
        own = logits.gather(1, target[:, None])[:, 0]
        scores.append(torch.stack((own - logits.logsumexp(-1), own - logits.amax(-1)), dim=1).cpu().double())
    return [(score[:, 0].sum().item(), bool((score[:, 1] == 0).all())) for score in torch.cat(scores).split(lengths)]


def read(model: Doge, rows: list, cache: Cache, last: bool = False) -> Tensor:
    """Adds lists of ids to the rows of a cache -> the final states (B, T, C); with `last` only the last (B, 1, C)."""
    tokens = pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows], device=cache.length.device)
    return model.hidden(tokens.to(lengths.device), lengths, cache, lengths - 1 if last else None)[0]


# ---- lm-evaluation-harness


class HarnessMethods:
    """What lm_eval's TemplateLM leaves to a model. Texts become the ids that lm_eval's own `hf` model gives them. A
    prompt too long for the model loses its beginning, there as here; `shortened` counts them."""

    def __init__(self, model: Doge, tokenizer: Tokenizer, micro_batch_tokens: int):
        super().__init__()
        self.model, self.coder, self.micro_batch_tokens = model, tokenizer, micro_batch_tokens
        self.max_length, self.shortened = model.config.max_position_embeddings, 0

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text, BOS in front."""
        return self.coder.encode_prompt(string, add_bos=add_special_tokens is not False)

    def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
        """A conversation as text."""
        text = self.coder.decode(self.coder.render(chat_history, add_generation_prompt)[0])
        last = chat_history[-1]["content"].strip()  # without the prompt, the beginning of an answer to continue
        return text if add_generation_prompt else text[: text.rindex(last) + len(last)]

    def fit(self, ids: list[int], length: int) -> list[int]:
        """The last `length` ids."""
        self.shortened += len(ids) > length
        return ids[-length:]

    def _loglikelihood_tokens(self, requests: list[tuple], **_: Any) -> list[tuple[float, bool]]:
        pairs = []
        for (_, text), context, answer in requests:
            ids = self.fit(context + answer, self.max_length + 1)  # the last token is never read
            if not 0 < len(answer) < len(ids):
                valid = f"1 to max_position_embeddings={self.max_length}"
                raise ValueError(f"the answer {text[:60]!r} has {len(answer)} tokens: {valid} are valid")
            pairs.append((ids[: -len(answer)], answer))
        return log_likelihoods(self.model, pairs, self.micro_batch_tokens)

    def loglikelihood_rolling(self, requests: list, **_: Any) -> list[float]:
        """The log-probabilities of whole texts, in windows of at most max_length tokens."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows = []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)  # hf's BOS here is one too many
            pieces = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            windows.append([make_disjoint_window(piece) for piece in pieces])
        pairs = [pair for window in windows for pair in window]
        scores = iter(log_likelihoods(self.model, pairs, self.micro_batch_tokens))
        return [sum(next(scores)[0] for _ in window) for window in windows]

    def generate_until(self, requests: list, **_: Any) -> list[str]:
        """The completions of prompts, without special tokens."""
        asked = []
        for i, request in enumerate(requests):
            options = read_gen_kwargs(request.args[1], self.max_length)
            prompt = self.fit(self.tok_encode(request.args[0]), self.max_length - options["max_new_tokens"])
            asked.append(Request(prompt, **options, seed=i, stop_ids=[self.coder.eos_id]))
        slots = 4 * self.micro_batch_tokens // max(request.max_length for request in asked)
        Engine(self.model, slots=min(max(slots, 1), len(asked)), tokenizer=self.coder).generate(asked)
        return ["".join(self.coder.split[None](request.text.text)[::2]) for request in asked]


def harness_model(model: Doge, tokenizer: Tokenizer, micro_batch_tokens: int = 2048) -> Any:
    """The model as lm_eval's `simple_evaluate` takes it: an instance of its TemplateLM."""
    from lm_eval.api.model import TemplateLM  # an optional package

    digest = hashlib.sha256((tokenizer.digest + tokenizer.chat_template).encode()).hexdigest()
    ids = dict(eot_token_id=tokenizer.eos_id, prefix_token_id=tokenizer.bos_id, tokenizer_name=digest)
    return type("Harness", (HarnessMethods, TemplateLM), ids)(model, tokenizer, micro_batch_tokens)


def read_gen_kwargs(gen_kwargs: dict[str, Any], max_length: int) -> dict[str, Any]:
    """A task's generation_kwargs as fields of a Request. A task that asks for more tokens than the model has gets half
    of them. Raises ValueError for what is not computed here, such as num_beams."""
    from lm_eval.models.utils import normalize_gen_kwargs

    options = normalize_gen_kwargs(gen_kwargs, default_max_gen_toks=256)  # hf's number
    new, options["stop"] = options.pop("max_gen_toks"), options.pop("until")
    options["max_new_tokens"] = new if new < max_length else max_length // 2
    if not options.pop("do_sample"):
        options["temperature"] = 0.0
    if unknown := options.keys() - {field.name for field in fields(Request)}:
        raise ValueError(f"generation_kwargs: {', '.join(sorted(unknown))} cannot be used here")
    return options


def find_tasks(names: list[str], folder: str = "") -> Any:
    """lm_eval's TaskManager for these tasks; a task file in `folder` is preferred to lm_eval's own of that name."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(f"--tasks and --suite need lm_eval: pip install lm_eval ({one_line(error)})") from None
    manager = TaskManager(include_path=folder or None, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=folder or None)  # finds lm_eval's own, 14,000 of them: some seconds
    for name in set(names) - set(manager.all_tasks):
        close = " or ".join(difflib.get_close_matches(name, manager.all_tasks, n=3)) or "one of `lm_eval ls tasks`"
        raise ValueError(f"--tasks={name}: lm_eval has no such task, group or tag; did you mean {close}?")
    return manager


def run_tasks(model: Doge, tokenizer: Tokenizer, micro_batch_tokens: int, options: EvaluateOptions, chat: bool) -> None:
    """Prints lm_eval's table of each task, and writes all results to --out, when it is done. One that fails does not
    lose the others: at the end, ValueError names all that failed for want of a package, the network, a file or an
    option; any other error is raised as it is."""
    asked = [task.partition("=") for task in (*options.tasks, *SUITES.get(options.suite, "").split())]
    manager = find_tasks([name for name, *_ in asked], options.include_path)
    harness = harness_model(model, tokenizer, micro_batch_tokens)
    from datasets.exceptions import DatasetsError
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.utils import handle_non_serializable, make_table

    # bootstrap_iters: where the standard error has no formula; its own error is then 2 %
    common = dict(limit=options.limit or None, apply_chat_template=chat, log_samples=False, bootstrap_iters=1000)
    merged, errors = {}, {}
    for name, equals, count in dict.fromkeys(asked):
        shots = options.num_fewshot if options.num_fewshot >= 0 else int(count) if count else None
        try:
            results = simple_evaluate(harness, tasks=[name], num_fewshot=shots, task_manager=manager, **common)
        except Exception as error:
            errors[name + equals + count] = error
            continue
        print(make_table(results, "groups" if results.get("groups") else "results"), flush=True)
        for key, value in results.items():
            merged[key] = merged.get(key, {}) | value if isinstance(value, dict) else value
        if options.out:
            text = json.dumps(merged, indent=2, default=handle_non_serializable, ensure_ascii=False)
            Path(options.out).write_text(text, encoding="utf-8")
    if harness.shortened:
        print(f"{harness.shortened} prompts did not fit {harness.max_length} tokens and lost their beginning")
    for error in errors.values():
        if not isinstance(error, (ImportError, OSError, ValueError, DatasetsError)):
            raise error
    if errors:
        reasons = "; ".join(f"--tasks={name}: {type(e).__name__}: {one_line(e)}" for name, e in errors.items())
        packages, files = "pip install lm_eval[ifeval,math]", "--include_path=FOLDER"
        raise ValueError(f"{reasons} ({packages} if packages are missing, {files} for tasks without network)")


def main(argv: list[str]) -> None:
    options = parse_options(EvaluateOptions, argv, positional="checkpoint")
    machine = Machine(options.device)
    model, tokenizer = load_model(options.checkpoint[0])
    model = model.float().to(machine.device)
    if options.bpb:
        print_bits_per_byte(model, tokenizer, options, machine)
    if not options.tasks and not options.suite:
        return
    by_suite = options.apply_chat_template == "auto" and options.suite in ("instruct", "reason")
    chat = options.apply_chat_template == "on" or by_suite
    if chat and not tokenizer.chat_template:
        raise ValueError(f"--apply_chat_template=on: the tokenizer of {options.checkpoint[0]} has no chat template")
    size = options.micro_batch_tokens or (2048 if machine.device.type == "cpu" else 65536)  # a CPU's cache is small
    run_tasks(model.to(getattr(torch, options.dtype[0])), tokenizer, size, options, chat)


if __name__ == "__main__":
    run_command(main)
