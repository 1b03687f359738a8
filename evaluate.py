"""How good is a model? Bits per byte of text it has never seen, and the benchmarks that everybody reports.

    python evaluate.py out/stories --bpb=data/stories
    python evaluate.py out/mine --bpb=data/mine --dtype=float32,bfloat16,int8
    python evaluate.py out/mine --tasks=piqa,arc_easy --num_fewshot=5 --limit=100 --out=piqa.json
    python evaluate.py out/mine --suite=base

**Bits per byte.** A model that gives the next token the probability p needs -log2(p) bits to say it. Summed over a text
and divided by the bytes of that text, this does not depend on how the text was cut into tokens, so models of different
vocabularies can be compared: 8 is no model at all, a good compressor of English needs about 2, and a language model
less. The tokens go through decode.py one at a time, as in generation, with its eager arithmetic; embedding and cache
are float32. So what int8 changes here is what it changes when the model writes.

**Benchmarks.** The questions, the prompts and the rules of scoring are those of EleutherAI's lm-evaluation-harness
(`pip install lm_eval`), so that a number here can stand beside numbers from elsewhere. What is ours is how the model
answers. The harness asks it three things:

    log-likelihood   how probable is this continuation of that context? A small model cannot be asked "A, B, C or D?",
                     but it can be asked which of four answers it would rather have said. Summed over the tokens of the
                     answer, the largest wins: that is `acc`. A long answer has more factors below 1 than a short one,
                     so `acc_norm` divides by the letters of the answer first. Report the one others report.
    rolling          how probable is this whole text? (perplexity; what bits per byte are made of)
    generation       write until one of these strings comes up; then the words are compared with the right answer.

Few-shot: the context begins with n solved questions, which show what is asked for. More of them is not always better,
and numbers with different n cannot be compared. Two things stand beside every score, since a number alone says little.
The standard error: of 100 questions, 30 % right is 30 +- 4.6, so it cannot be told from 25 %. And chance: what guessing
gets, 25 % with four answers. A score that is not two standard errors above chance has shown nothing, and is marked so.

Why it is fast. The four answers to a question have the same context, and often all questions of a subject begin with
the same solved examples. A beginning is read once into a cache, which is then copied for whatever follows it. Only the
tokens of an answer need logits. Neither changes a score: tests compare with the harness's own `hf` model, and so does
--peer, which asks both in turn and says how long each took.
"""

import difflib
import hashlib
import importlib.util
import json
import math
import re
import time
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from nanodoge.attention import NEVER
from nanodoge.checkpoint import load_model, read_meta
from nanodoge.examples import bucket_by_length
from nanodoge.decode import Decoder
from nanodoge.machine import Machine
from nanodoge.options import one_line, parse_options, run_command
from train import Sequences, bytes_of_tokens

DTYPES = ["float32", "bfloat16", "int8"]
WORTH = 1.5  # times fewer tokens make up for reading a context apart from its answers (20M model, on a processor, where
# the logits of the answers take half of the time: 1.24 times fewer are 10 % slower, 2.3 times fewer 20 % faster)
SPARED = 1024  # tokens that a beginning shared by questions must spare to be read apart, which is one more pass
WRITTEN = 4  # times as many tokens at once when the model writes: each step reads all weights for one token a row
PEER_ROWS = 16  # questions at once of the `hf` model
SCORED = 2**21  # logits at once: 8 MB, which a processor's cache can hold; a GPU takes more

# What the original project measures, with its few-shot counts (None: the task's own). Its MMLU scores the texts of the
# answers and not their letters, hence mmlu_continuation; its ARC is the mean of the two. The last two suites are for
# models that chat, so they use the chat template.
SUITES = {
    "base": dict(hellaswag=0, arc_easy=5, arc_challenge=5, piqa=5, mmlu_continuation=5, winogrande=0, openbookqa=0,
                 triviaqa=5),
    "instruct": dict(ifeval=0, hellaswag=0, arc_easy=0, arc_challenge=0, piqa=0, mmlu_continuation=0, bbh_fewshot=3),
    "reason": dict(gsm8k=None, aime24=0, minerva_math500=0, gpqa_diamond_cot_zeroshot=0),
}  # fmt: skip
CHATTING = ("instruct", "reason")
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")  # a task's wishes that model.generate knows


@dataclass
class EvaluateOptions:
    checkpoint: list[str] = field(default_factory=lambda: ["out/stories"])  # folder of the model
    bpb: str = ""  # data folder whose validation text is measured; empty = data/stories, unless tasks are asked for
    tokens: int = 32768  # of the validation text at most, rounded up to whole rows
    batch_size: int = 64  # rows of the validation text at once
    tasks: list[str] = field(default_factory=list)  # benchmarks by their names in lm_eval, groups and tags too
    suite: Literal["", "base", "instruct", "reason"] = ""  # the benchmarks of the original's tables
    num_fewshot: int = -1  # solved examples before each question; -1 = what the suite or the task says
    limit: int = 0  # questions of each task, the first ones; 0 = all
    apply_chat_template: Literal["auto", "true", "false"] = "auto"  # ask in a conversation; auto: not in suite base
    include_path: str = ""  # folder with task files of your own (YAML), which need no network
    batch_tokens: int = 0  # tokens of prompts and answers at once, padding included; 0 = 2048, on a GPU 65,536
    peer: bool = False  # ask lm_eval's own `hf` model of the same folder too, and compare answers and time
    out: str = ""  # JSON file for all the results
    dtype: list[str] = field(default_factory=lambda: ["float32"])  # of the weights; int8, and several, for bpb only
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the best there is

    def __post_init__(self):
        asks = bool(self.tasks or self.suite)
        self.bpb = self.bpb or ("" if asks else "data/stories")
        for dtype in self.dtype or [""]:
            if dtype not in DTYPES:
                raise ValueError(f"--dtype={dtype} must be one or more of {', '.join(DTYPES)}")
        if asks and self.dtype not in (["float32"], ["bfloat16"]):
            raise ValueError(f"--dtype={','.join(self.dtype)}: tasks are run in float32 or in bfloat16")
        for name, least in dict(tokens=1, batch_size=1, batch_tokens=0, limit=0, num_fewshot=-1).items():
            if getattr(self, name) < least:
                raise ValueError(f"--{name}={getattr(self, name)} must be at least {least}")
        if self.include_path and not Path(self.include_path).is_dir():
            raise ValueError(f"--include_path={self.include_path} is not a folder")
        if self.out and (not asks or Path(self.out).is_dir() or not Path(self.out).absolute().parent.is_dir()):
            raise ValueError(f"--out={self.out} must be a file in a folder that is there, for the results of --tasks")
        if len(self.checkpoint) != 1:
            raise ValueError(f"one checkpoint folder, not {len(self.checkpoint)}: {' '.join(self.checkpoint)}")
        if self.peer and not (asks and Path(self.checkpoint[0]).is_dir()):
            raise ValueError("--peer is for --tasks or --suite and a checkpoint that is a folder")


# ---------------------------------------------------------------------------------------------------------------------
# Bits per byte


@torch.inference_mode()
def nats(model, decoder, tokens, targets):
    """The sum of -log p(target) over tokens, targets (B, T), -100 = ignored, of a decoder that reads token by token."""
    cache = model.new_cache(*tokens.shape)
    total = 0.0
    for t in range(tokens.shape[1]):
        total += F.cross_entropy(decoder(tokens[:, t], cache), targets[:, t], reduction="sum").item()
    return total


def bits_per_byte(model, decoder, rows, sizes, options):
    """-> mean loss in nats a token, bits per byte, tokens, over the first options.tokens of rows. sizes (V,): bytes."""
    device = model.embed_tokens.weight.device
    count = math.ceil(min(len(rows.tokens) - 1, options.tokens) / rows.length)
    loss, seen, size = 0.0, 0, 0
    for i in tqdm(range(0, count, options.batch_size), unit="batch", leave=False, disable=None):
        tokens, targets = rows.batch(range(i, min(i + options.batch_size, count)))
        real = targets[targets >= 0]
        loss += nats(model, decoder, tokens.to(device), targets.to(device))
        seen, size = seen + len(real), size + sizes[real].sum().item()
    return loss / seen, loss / math.log(2) / max(size, 1), seen


# ---------------------------------------------------------------------------------------------------------------------
# Log-likelihoods


@torch.inference_mode()
def log_likelihoods(model, pairs, batch_tokens=2048):
    """How probable continuations are. pairs: [(context, continuation)], lists of ids, neither empty -> for each the
    log-probability in nats, and whether greedy decoding would have written it.

    A tree is read, from the trunk to the leaves: what the contexts of a family have in common, the rest of each context
    once, then its continuations. batch_tokens bounds what one batch holds: every continuation with all before it.
    """
    together = defaultdict(list)  # context -> places of its pairs
    for place, (context, _) in enumerate(pairs):
        together[tuple(context)].append(place)
    stems = []
    for context, places in together.items():
        answers = sum(len(pairs[i][1]) for i in places)
        once = len(places) * len(context) + answers >= WORTH * (len(context) + answers)
        stems += [(context, places)] if once else [(context, [place]) for place in places]
    scores = [None] * len(pairs)
    with tqdm(total=len(pairs), unit="answer", leave=False, disable=None) as progress:
        for trunk, family in families(stems):
            cache = model.new_cache(1, len(trunk)) if trunk else None
            if trunk:
                read(model, [trunk], cache)
            sizes = [len(places) * (len(context) + max(len(pairs[i][1]) for i in places)) for context, places in family]
            for group in bucket_by_length(sizes, batch_tokens):
                places = [family[i][1] for i in group]
                leaves = [[tuple(pairs[i][1]) for i in some] for some in places]
                found = score_tree(model, cache, [family[i][0][len(trunk) :] for i in group], leaves)
                for place, score in zip((i for some in places for i in some), found, strict=True):
                    scores[place] = score
                progress.update(len(found))
    return scores


def families(stems):
    """[(context, places)] -> [(what the contexts of a family begin with, its stems)]. A family has half of each context
    in common, and this spares SPARED tokens. All others are one family that has nothing in common."""
    found, others, family = [], [], []
    for stem in [*sorted(stems), ((), [])]:
        if family and 2 * common(family[0][0], stem[0]) < max(len(stem[0]), 1):
            shared = common(family[0][0], family[-1][0])  # they are sorted, so the first and the last differ most
            shared = min(shared, min(len(context) for context, _ in family) - 1)  # a stem has at least one token
            if shared * (len(family) - 1) >= SPARED:
                found.append((family[0][0][:shared], family))
            else:
                others += family
            family = []
        family.append(stem)
    return found + ([((), others)] if others else [])


def common(a, b):
    """How many tokens a and b begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def score_tree(model, trunk, stems, leaves):
    """trunk: a Cache of one row, or None. stems: what follows it, the ids of every context. leaves: for every stem its
    continuations. -> [(log-probability, greedy)] of all continuations, stem by stem."""
    alone = [len(some) == 1 for some in leaves]  # a context with one continuation is read together with it
    rows = [stem + some[0][:-1] if one else stem for stem, some, one in zip(stems, leaves, alone, strict=True)]
    twigs = [(row, leaf) for row, some in enumerate(leaves) for leaf in some]
    room = max(map(len, rows)) + max(len(leaf) for _, leaf in twigs) + (0 if trunk is None else int(trunk.length))
    cache = None
    if trunk is not None:
        cache = fork(model, trunk, [0] * len(rows), room)
    elif not all(alone):
        cache = model.new_cache(len(rows), room)
    states = read(model, rows, cache)
    spots = [(k, row, len(stems[row]) - 1 + i, token) for k, (row, leaf) in enumerate(twigs)
             for i, token in enumerate(leaf if alone[row] else leaf[:1])]  # fmt: skip
    parts = [score_tokens(model, states, spots, len(twigs))]
    later = [(k, row, leaf) for k, (row, leaf) in enumerate(twigs) if not alone[row] and len(leaf) > 1]
    if later:
        states = read(model, [leaf[:-1] for *_, leaf in later], fork(model, cache, [row for _, row, _ in later], room))
        spots = [(k, j, i, token) for j, (k, _, leaf) in enumerate(later) for i, token in enumerate(leaf[1:])]
        parts.append(score_tokens(model, states, spots, len(twigs)))
    return [(score, missed == 0) for score, missed in sum(parts).tolist()]


def score_tokens(model, states, spots, count):
    """states (B, T, C); spots: [(k, row, column, token)], the state that is to predict the token, and for which of the
    `count` continuations -> (count, 2) float64: their log-probabilities, and tokens that were not the likeliest."""
    k, row, column, token = torch.tensor(spots, device=states.device).T
    states, total = states[row, column], torch.zeros(count, 2, dtype=torch.float64)
    size = (SCORED if states.device.type == "cpu" else 32 * SCORED) // len(model.output_weight) + 1
    for i in range(0, len(spots), size):
        part = slice(i, i + size)
        logits = F.linear(states[part], model.output_weight).float()
        own, best = logits.gather(1, token[part, None]), logits.amax(-1, keepdim=True)
        score = own - best - logits.sub_(best).exp_().sum(-1, keepdim=True).log()
        total.index_add_(0, k[part].cpu(), torch.cat((score, own < best), dim=1).cpu().double())
    return total


def placed(model):
    return model.embed_tokens.weight.device, model.embed_tokens.weight.dtype


def read(model, rows, cache):
    """Lists of ids -> their final states (B, T, C); the cache, if there is one, goes on to hold them."""
    device, _ = placed(model)
    tokens = pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device)
    return model.hidden(tokens, torch.tensor([len(row) for row in rows], device=device), cache)[0]


def fork(model, cache, rows, room):
    """A new Cache with room for longer texts. Its row i goes on from row rows[i] of `cache`."""
    new, rows = model.new_cache(len(rows), room), torch.tensor(rows, device=cache.length.device)
    for old_slots, new_slots in zip(cache.layers, new.layers, strict=True):
        for old, fresh in zip(old_slots, new_slots, strict=True):
            fresh[:, :, : old.shape[2] - 1] = old[rows, :, :-1]  # all but the spare slot, which holds nothing
        _, _, s, when = new_slots
        when[s == NEVER] = -1  # padding of a batch whose longest row may not be here
    new.length, new.frequencies = cache.length[rows], cache.frequencies  # which its keys were turned by
    return new


# ---------------------------------------------------------------------------------------------------------------------
# Generation


@torch.inference_mode()
def complete(model, tokenizer, prompts, stops, max_new_tokens, batch_tokens=8192, **sampling):
    """Continues lists of ids until EOS, one of the strings `stops` (which is left out) or max_new_tokens -> texts.
    sampling: as for model.generate."""
    texts, longest = [""] * len(prompts), max(map(len, stops), default=0)
    sizes = [len(prompt) + max_new_tokens for prompt in prompts]
    for group in tqdm(bucket_by_length(sizes, batch_tokens), unit="batch", leave=False, disable=None):
        device, _ = placed(model)
        tokens = pad_sequence([torch.tensor(prompts[i]) for i in group], batch_first=True).to(device)
        lengths = torch.tensor([len(prompts[i]) for i in group], device=device)
        going = {i: (row, tokenizer.stream(skip_special=True)) for row, i in enumerate(group)}
        for new in model.stream(tokens, max_new_tokens, lengths=lengths, vocab_size=tokenizer.vocab_size, **sampling):
            new = new.tolist()
            for i, (row, text_of) in list(going.items()):
                text = text_of(None if new[row] == tokenizer.eos_id else new[row])
                texts[i] += text
                tail = texts[i][-(len(text) + longest) :] if text else ""
                if new[row] == tokenizer.eos_id or any(stop in tail for stop in stops):
                    del going[i]
            if not going:
                break
        for i, (_, text_of) in going.items():
            texts[i] += text_of(None)
    for stop in stops:
        texts = [text.partition(stop)[0] for text in texts]
    return texts


# ---------------------------------------------------------------------------------------------------------------------
# lm-evaluation-harness


class Answers:
    """How a Doge answers the harness; `harness_model` makes it one of lm_eval's models.

    Texts become the ids that its own `hf` model gives them: one BOS in front, as Doge's tokenizer.json says, unless it
    is there. And special tokens written in a text are these tokens, since a conversation arrives as a text. BOS has the
    id 0, which must not be taken for none. A prompt too long for the model loses its beginning, there as here;
    `shortened` counts how often.
    """

    max_gen_toks = 256  # where a task says nothing: hf's number

    def __init__(self, model, tokenizer, batch_tokens):
        super().__init__()
        self.model, self.tokenizer, self.batch_tokens = model, tokenizer, batch_tokens
        self.max_length, self.shortened = model.config.max_position_embeddings, 0
        names = sorted(tokenizer.special_tokens, key=len, reverse=True)
        self.special = re.compile("(" + "|".join(map(re.escape, names)) + ")")

    @property
    def eot_token_id(self):
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self):
        return self.tokenizer.bos_id

    @property
    def tokenizer_name(self):  # under which lm_eval may keep what it has prepared
        return hashlib.sha256((self.tokenizer.digest + self.tokenizer.chat_template).encode()).hexdigest()

    def tok_encode(self, string, add_special_tokens=None, **_):
        bos = self.tokenizer.bos_id
        ids = []
        for i, part in enumerate(self.special.split(string)):
            ids += [self.tokenizer.special_tokens[part]] if i % 2 else self.tokenizer.encode(part)
        return ids if add_special_tokens is False or ids[:1] == [bos] else [bos, *ids]

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        text = self.tokenizer.decode(self.tokenizer.render(chat_history, add_generation_prompt)[0])
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()  # words put into the assistant's mouth: it is to go on from there
        return text[: text.rindex(last) + len(last)]

    def fit(self, ids, length):
        self.shortened += len(ids) > length
        return ids[-length:]

    def _loglikelihood_tokens(self, requests, disable_tqdm=False):
        pairs = []
        for (_, text), context, answer in requests:
            whole = self.fit(context + answer, self.max_length + 1)  # the last token is never read
            if not 0 < len(answer) < len(whole):
                raise ValueError(f"the answer {text[:60]!r} has {len(answer)} tokens: it must have at least 1, and at "
                                 f"most the model's max_position_embeddings={self.max_length}")  # fmt: skip
            pairs.append((whole[: -len(answer)], answer))
        return log_likelihoods(self.model, pairs, self.batch_tokens)

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        pairs, ends = [], [0]
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)  # hf's BOS here is one too many
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            pairs += map(make_disjoint_window, windows)
            ends.append(len(pairs))
        scores = [score for score, _ in log_likelihoods(self.model, pairs, self.batch_tokens)]
        return [sum(scores[start:end]) for start, end in pairwise(ends)]

    def generate_until(self, requests, disable_tqdm=False):
        alike, texts = defaultdict(list), [""] * len(requests)
        for i, request in enumerate(requests):
            alike[json.dumps(request.args[1], sort_keys=True)].append(i)
        for some in alike.values():
            stops, new, sampling = self.read_wishes(requests[some[0]].args[1])
            prompts = [self.fit(self.tok_encode(requests[i].args[0]), self.max_length - new) for i in some]
            room = WRITTEN * self.batch_tokens
            found = complete(self.model, self.tokenizer, prompts, stops, new, room, **sampling)
            for i, text in zip(some, found, strict=True):
                texts[i] = text
        return texts

    def read_wishes(self, wishes):
        """A task's generation_kwargs -> strings to stop at, tokens at most, options of model.generate. A task that asks
        for more tokens than the model has gets half of them, and the prompt the other half."""
        from lm_eval.models.utils import normalize_gen_kwargs

        wishes = normalize_gen_kwargs(wishes, self.max_gen_toks)
        stops, new = [stop for stop in wishes.pop("until") if stop], wishes.pop("max_gen_toks")
        if not wishes.pop("do_sample"):
            wishes["temperature"] = 0.0
        if unknown := wishes.keys() - SAMPLING:
            raise ValueError(f"generation_kwargs of a task: {', '.join(sorted(unknown))} is not one of until, "
                             f"do_sample, max_gen_toks, {', '.join(SAMPLING)}")  # fmt: skip
        return stops, new if new < self.max_length else self.max_length // 2, wishes


def harness_model(model, tokenizer, batch_tokens=2048):
    """The model as lm_eval's `simple_evaluate` takes it."""
    from lm_eval.api.model import TemplateLM  # which encodes contexts with their answers

    return type("HarnessDoge", (Answers, TemplateLM), {})(model, tokenizer, batch_tokens)


def load_tasks(shots, folder=""):
    """shots: {name of a task, group or tag: solved examples, None = as it says itself} -> lm_eval's Task and Group
    objects. A task file in `folder` goes before lm_eval's own of that name. Raises ValueError for unknown names."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("--tasks and --suite need lm_eval, which is not installed: pip install lm_eval")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=folder or None, include_defaults=False)
    if not shots.keys() <= set(manager.all_tasks):
        manager = TaskManager(include_path=folder or None)  # finds lm_eval's own, 14,000 of them: some seconds
    items, held = [], set()
    for name, count in shots.items():
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks, n=3)
            advice = f"did you mean {' or '.join(close)}?" if close else "python -m lm_eval ls tasks lists them"
            raise ValueError(f"--tasks={name}: lm_eval has no such task, group or tag; {advice}")
        try:
            loaded = manager.load([name])
        except ImportError as error:
            raise ValueError(f"--tasks={name}: {one_line(error)}; some tasks need more than lm_eval, as in "
                             "pip install lm_eval[ifeval,math]") from None  # fmt: skip
        except ConnectionError as error:
            raise ValueError(f"--tasks={name}: {one_line(error)}; --include_path=FOLDER reads task files of "
                             "your own, without network") from None  # fmt: skip
        for task in loaded["tasks"].values() if count is not None else ():
            task.set_config(key="num_fewshot", value=count)
        if again := held & loaded["tasks"].keys():
            raise ValueError(f"--tasks={name}: its task {min(again)} is asked for twice")
        held |= loaded["tasks"].keys()
        inside = {child for children in loaded["group_map"].values() for child in children}
        found = loaded["groups"] | loaded["tasks"]
        items += [item for key, item in found.items() if key not in inside]
    return items


def chance(item):
    """What guessing scores: with n answers 1/n, on average over the questions; 0 where an answer has to be written;
    None where there is nothing to guess. Of a group of tasks, the mean over all their questions."""
    if hasattr(item, "get_all_tasks"):
        parts = [(chance(task), len({request.doc_id for request in task.instances})) for task in item.get_all_tasks()]
        if any(guess is None for guess, _ in parts):
            return None
        return sum(guess * count for guess, count in parts) / sum(count for _, count in parts)
    if item.OUTPUT_TYPE == "multiple_choice":
        documents = {request.doc_id: request.doc for request in item.instances}
        return sum(1 / len(item.doc_to_choice(doc)) for doc in documents.values()) / len(documents)
    return 0.0 if item.OUTPUT_TYPE == "generate_until" else None


def run_tasks(model, tokenizer, options):
    """-> lm_eval's results, and the rows of our table: (task, shots, questions, metric, value, standard error or None,
    chance or None)."""
    shots = dict.fromkeys(options.tasks) | SUITES.get(options.suite, {})
    if options.num_fewshot >= 0:  # then lm_eval sets it, but for tasks that can only be asked without examples
        shots = dict.fromkeys(shots)
    chat = options.suite in CHATTING if options.apply_chat_template == "auto" else options.apply_chat_template == "true"
    if chat and not tokenizer.chat_template:
        raise ValueError(f"--apply_chat_template=true: the tokenizer of {options.checkpoint[0]} has no chat template")
    items = load_tasks(shots, options.include_path)
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    def ask(harness, items):
        start = time.perf_counter()
        results = simple_evaluate(
            harness, tasks=items, num_fewshot=options.num_fewshot if options.num_fewshot >= 0 else None,
            limit=options.limit or None, apply_chat_template=chat, log_samples=options.peer,
            bootstrap_iters=1000,  # where the standard error has no formula; its own error is then 2 %
            task_manager=TaskManager(include_defaults=False),
        )  # fmt: skip
        return results, time.perf_counter() - start

    on_cpu = placed(model)[0].type == "cpu"  # whose cache wants small batches
    harness = harness_model(model, tokenizer, options.batch_tokens or (2048 if on_cpu else 65536))
    results, seconds = ask(harness, items)
    if options.peer:
        from lm_eval.models.huggingface import HFLM

        device, dtype = placed(model)
        hf = HFLM(pretrained=options.checkpoint[0], device=str(device), dtype=dtype, batch_size=PEER_ROWS)
        theirs, their_seconds = ask(hf, load_tasks(shots, options.include_path))  # tasks keep what was asked
        print_difference(results.pop("samples"), theirs.pop("samples"), seconds, their_seconds)
    guesses = {name_of(part): chance(part) for item in items for part in members(item)}
    results["nanodoge"] = dict(checkpoint=options.checkpoint[0], chance=guesses, apply_chat_template=chat,
                               shortened=harness.shortened)  # fmt: skip
    return results, [row for item in items for row in score_rows(results, item)]


def print_difference(samples, theirs, seconds, their_seconds):
    """samples, theirs: {task: lm_eval's samples} of our model and of `hf`; how long both took, all included."""
    answers, equal, farthest = 0, 0, 0.0
    for task in samples:
        ours, hf = ({sample["doc_id"]: sample["filtered_resps"] for sample in both[task]} for both in (samples, theirs))
        for a, b in ((a, b) for key in ours for a, b in zip(ours[key], hf[key], strict=True)):
            answers += 1
            if isinstance(a, str):  # written; else (log-likelihood, greedy) or, rolling, the log-likelihood
                equal += a == b
                continue
            (a, *greedy), (b, *was_greedy) = (x if isinstance(x, list | tuple) else [x] for x in (a, b))
            farthest, equal = max(farthest, abs(a - b)), equal + (abs(a - b) < 1e-3 and greedy == was_greedy)
    print(f"lm_eval's hf model: {their_seconds:.0f} s, ours {seconds:.0f} s ({their_seconds / seconds:.1f} times as "
          f"fast); {equal:,} of {answers:,} answers are the same, log-likelihoods within {farthest:.1e}")  # fmt: skip


def name_of(item):
    return item.name if hasattr(item, "get_all_tasks") else item.task_name


def members(item):
    """A task; or a group and everything in it."""
    return [item, *item.get_all_groups(), *item.get_all_tasks()] if hasattr(item, "get_all_tasks") else [item]


def score_rows(results, item):
    """[(task, shots, questions, metric, value, standard error or None, chance or None)] of a task; of a group its mean,
    or the rows of what is in it if it has none."""
    name, rows = name_of(item), []
    scores, guess = results["results"].get(name, {}), results["nanodoge"]["chance"][name]
    for key, value in scores.items():
        metric, _, how = key.partition(",")  # such as "exact_match,strict-match"
        if how and not metric.endswith("_stderr"):
            error = scores.get(f"{metric}_stderr,{how}")
            error = error if isinstance(error, float) else None  # lm_eval says "N/A"
            guessed = guess if "acc" in metric or metric == "exact_match" else None
            shown = metric if how == "none" else key
            rows.append((name, results["n-shot"].get(name), scores["sample_len"], shown, value, error, guessed))
    if not rows and hasattr(item, "get_all_tasks"):
        return [row for child in item for row in score_rows(results, child)]
    return rows


def print_table(rows):
    line = "{:<26}{:>6}{:>11}  {:<28}{:>9}{:>11}{:>9}"
    print(line.format("task", "shots", "questions", "metric", "value", "std error", "chance"))
    for name, shots, count, metric, value, error, guess in rows:
        numbers = ("-" if x is None else f"{x:.4f}" for x in (value, error, guess))
        lost = None not in (error, guess) and value - guess < 2 * error
        print(line.format(name, "-" if shots is None else shots, f"{count:,}", metric, *numbers),
              "  no better than chance" if lost else "")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Main


def print_bits_per_byte(model, tokenizer, options):
    """A row for each dtype."""
    rows = Sequences(options.bpb, "val", model.config.max_position_embeddings)
    meta = read_meta(options.bpb)
    if (meta["tokenizer_sha256"], meta["vocab_size"]) != (tokenizer.digest, tokenizer.vocab_size):
        raise ValueError(f"--bpb={options.bpb} was made with another tokenizer than {options.checkpoint[0]}'s")
    if len(rows.tokens) < 2:
        raise ValueError(f"--bpb={options.bpb}: val.bin has {len(rows.tokens)} tokens, too few to measure")
    sizes, first = bytes_of_tokens(tokenizer), None
    print(f"{'weights':<10}{'loss':>10}{'bits/byte':>12}{'change':>10}{'tokens':>10}")
    for dtype in options.dtype:
        loss, bits, seen = bits_per_byte(model, Decoder(model, getattr(torch, dtype)), rows, sizes, options)
        first = first or loss
        print(f"{dtype:<10}{loss:>10.4f}{bits:>12.4f}{loss / first - 1:>+10.2%}{seen:>10,}", flush=True)


def main(argv):
    options = parse_options(EvaluateOptions, argv, positional="checkpoint")
    device = Machine(options.device).device
    model, tokenizer = load_model(options.checkpoint[0])
    model = model.float().to(device)
    if options.bpb:
        print_bits_per_byte(model, tokenizer, options)
    if options.tasks or options.suite:
        results, rows = run_tasks(model.to(getattr(torch, options.dtype[0])), tokenizer, options)
        print_table(rows)
        if count := results["nanodoge"]["shortened"]:
            print(f"{count} prompts did not fit {model.config.max_position_embeddings} tokens and lost their beginning")
        if options.out:
            from lm_eval.utils import handle_non_serializable

            text = json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False)
            Path(options.out).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
