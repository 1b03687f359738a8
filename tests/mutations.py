"""Breaks facts that everything rests on, one at a time, and says which test notices.

    python tests/mutations.py                 all of MUTATIONS: some minutes
    python tests/mutations.py tie cache       those whose names begin so

Each mutation replaces one piece of code in a copy of this checkout and runs the tests named beside it until one fails.
The same test must pass in the copy without the mutation. The exit status is 1 if a mutation was not noticed. A piece of
code that is not there, or there more than once, ends the script: point its row to where the code is.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 900  # seconds of one run of pytest

# name | file | files of tests that should notice; then the code, which stands in the file once, and what replaces it
MUTATIONS = r"""
tie rule: of equal scores the earlier key wins | nanodoge/attention.py | test_model.py
- return s.shape[-1] - 1 - s.flip(-1).sort(dim=-1, descending=True, stable=True).indices
+ return s.sort(dim=-1, descending=True, stable=True).indices

mask: the EOS that ends an answer is not learned | nanodoge/template.py | test_tokenizer.py test_sft.py
- {{- eos_token }}\n        {%- endgeneration %}
+ {%- endgeneration %}{{- eos_token }}

padding: it gets attention | model.py | test_model.py
- s = s.masked_fill(padding[:, None], NEVER)
+ pass

router: half of its scores are those of the next token | model.py | test_model.py
- logits = self.router_gate(x).unflatten(-1, (2, self.num_keys)).float()\n        best
+ logits = self.router_gate(x.roll(-1, dims=1)).unflatten(-1, (2, self.num_keys)).float()\n        best

resume: Adam's count of steps is one too many | nanodoge/checkpoint.py | test_train.py test_sft.py
- shard_like(v, p) if v.dim() else v\n
+ shard_like(v, p) if v.dim() else v + 1\n

order: a resumed run reads the data in another order | nanodoge/run.py | test_train.py test_sft.py
- self.row = row or None
+ self.row, self.options.seed = row or None, self.options.seed + 1

tied: the output matrix gives the embedding no gradient | model.py | test_model.py
- return self.embed_tokens.weight if self.config.tie_word_embeddings else
+ return self.embed_tokens.weight.detach() if self.config.tie_word_embeddings else

special tokens: what a user types can be one | nanodoge/tokenizer.py | test_tokenizer.py test_conversations.py
- splitter(may_use.get(role, ()))
+ splitter(may_use.get(role, self.special_tokens))

loss: a mean of the micro-batches' means | sft.py | test_sft.py
- loss_sum(run.network, *data.batch(group), machine) / targets
+ loss_sum(run.network, *data.batch(group), machine) / int(data.targets[group].sum()) / len(groups)

cache: the new key takes another slot than the weakest | nanodoge/attention.py | test_model.py
- masked_fill(~weakest, last).argmin(-1, keepdim=True)
+ masked_fill(~weakest, last).argmax(-1, keepdim=True)

step.cpp: of equally weak keys the newest leaves | nanodoge/step.cpp | test_cpp_step.py
- bool is_older = positions[j] < positions[weakest];
+ bool is_older = positions[j] > positions[weakest];

rename: the files of a checkpoint appear one after the other | nanodoge/checkpoint.py | test_checkpoint.py
- os.rename(saving, saved)
+ [os.replace(path, folder / path.name) for path in sorted(saving.iterdir())]
"""


def first_failure(folder, tests):
    """The test that fails first of `tests` (words for pytest) in a checkout, "" if none does."""
    environment = os.environ | dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", PYTHONDONTWRITEBYTECODE="1")
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-x", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return f"{' '.join(tests)} (more than {TIMEOUT} seconds)"
    found = re.search(r"^(?:FAILED|ERROR) (tests/\S+?)(?: - |$)", done.stdout, re.MULTILINE)
    return found[1] if found else "" if done.returncode == 0 else f"pytest: {done.stdout[-500:]}{done.stderr[-500:]}"


def main(*only):
    unnoticed = 0
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place, "copy")
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "out", "data"))
        for mutation in MUTATIONS.strip().split("\n\n"):
            head, *lines = mutation.split("\n")
            (name, file, tests), (code, instead) = head.split(" | "), (line[2:].replace(r"\n", "\n") for line in lines)
            if not name.startswith(only or ""):
                continue
            text = (copy / file).read_text(encoding="utf-8")
            if (count := text.count(code)) != 1:
                sys.exit(f"{name}: {file} has {count} times, not once: {code}")
            (copy / file).write_text(text.replace(code, instead), encoding="utf-8")
            failed = first_failure(copy, [f"tests/{name}" for name in tests.split()])
            (copy / file).write_text(text, encoding="utf-8")
            before = failed and first_failure(copy, [failed])
            unnoticed += not failed or bool(before)
            said = failed or "NOT NOTICED"
            print(f"{name:<64}{said}{', WITHOUT IT TOO: ' + before if before else ''}", flush=True)
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
