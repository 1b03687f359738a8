"""Kills training at random moments, a hundred times, and checks that nothing was lost.

    python tests/crash.py --out=results/crash.csv  all of it, by hand: some minutes
    python tests/crash.py --kills=2 --only=train   what tests/test_crash.py runs

Only trying shows what a crash does. A small model is trained, and its process is ended by SIGKILL, which nothing can
catch: at any moment, while a checkpoint is written, or while a finished one is moved to its place. After every kill the
folder is checked as it is, then the run continues with --resume_or_start. What must hold:

    unreadable   there is a checkpoint (once there has been one), it opens, it is not older than the one before, and its
                 weights are bit for bit those of the undisturbed run after that step
    lost rows    log.csv holds the rows of the undisturbed run from the first on, none missing and none twice
    different    at the end: log, weights, optimizer and the stable checkpoint are those of the undisturbed run

Starting Python and torch takes seconds and a step of this model milliseconds, so the processes are forked from this
one, which has imported everything and computed nothing. (A process that has computed gradients cannot be forked.)
What is imported later counts too: if most of a run went by before its first step, no kill would come while it saves.

After the kills: one of several processes killed, and how soon the others end; a full disk and a
read-only folder (both need root, to mount a small tmpfs); the real torchrun with --max-restarts, and Ctrl-C; and two
hosts, namespaces with a cable between them (root and iproute2), of which one is cut off for a while.
"""

import contextlib
import functools
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: no pool of threads, which a fork would not copy
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import helpers  # noqa: E402
import torch  # noqa: E402
import torch._dynamo  # noqa: E402  (every optimizer imports it: longer than a run)
from helpers import TINY, TUNE, make_checkpoint, make_data, make_set, write_csv  # noqa: E402

import dpo  # noqa: E402
import grpo  # noqa: E402
import nanodoge.run  # noqa: E402
import sft  # noqa: E402
import train  # noqa: E402
from nanodoge.checkpoint import load_model, load_training_state  # noqa: E402
from nanodoge.options import parse_options, run_command  # noqa: E402
from nanodoge.run import read_log  # noqa: E402

PATIENCE = 60  # seconds within which a process must end once another one of its run has died
FORK = multiprocessing.get_context("fork")
MEETING = 180  # ... if it died while they connected: gloo then waits up to five times --patience


@dataclass
class Options:
    """What crash.py is asked to do."""

    kills: int = 100  # SIGKILLs of each kind of run
    seed: int = 0  # of the moments
    only: list[str] = field(default_factory=list)  # these parts of the table; empty = all
    out: str = ""  # csv file to write, empty = none


# ---- Processes


def start(main, argv, log, world_size=1):
    return helpers.start(FORK, main, argv, log, log, world_size)


def wait(processes, seconds=600):
    """The exit statuses of processes that end by themselves: negative for the signal that ended one, None for one that
    hangs, which is killed after it has written its stack to its log."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    statuses = [process.exitcode for process in processes]
    for process in processes:
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGUSR1)
            time.sleep(1)
            process.kill()
            process.join()
    return statuses


# ---- What a run leaves


def steady(folder):
    """The rows of log.csv without the columns that differ between equal runs."""
    path = Path(folder) / "log.csv"
    return helpers.steady(read_log(path)) if path.is_file() else []


def weights(folder):
    return load_model(folder)[0].state_dict()


def left_by(folder):
    """All that a finished run leaves and that must not depend on kills: {name: value}."""
    found = {"log.csv": steady(folder)} | {path.name: path.read_bytes() for path in folder.glob("samples/*.jsonl")}
    for place in (folder, folder / "stable"):
        if place.is_dir() and (state := load_training_state(place)):
            kept = {name: state.get(name) for name in ("step", "optimizer", "reference")}
            found["stable" if place.name == "stable" else "checkpoint"] = kept | {"weights": weights(place)}
    return found


def same(a, b):
    """Whether two nested dicts of tensors are equal bit for bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


class Undisturbed:
    """A run that is not killed, with a copy of every checkpoint that it wrote."""

    def __init__(self, main, argv, folder, world_size=1):
        self.folder, self.snapshots = folder, folder.with_name(folder.name + "-snapshots")
        log = folder.with_suffix(".txt")
        folder.parent.mkdir()

        def main_with_snapshots(argv):
            save = nanodoge.checkpoint.save_checkpoint

            def save_and_copy(place, model, tokenizer, state=None, **more):
                save(place, model, tokenizer, state, **more)
                if place == folder:
                    shutil.copytree(place, self.snapshots / str(state["step"]))

            nanodoge.checkpoint.save_checkpoint = save_and_copy
            main(argv)

        before = time.monotonic()
        statuses = wait(start(main_with_snapshots, [*argv, f"--out_dir={folder}"], log, world_size))
        assert statuses == [0] * world_size, log.read_text()[-3000:]
        self.seconds, self.rows = time.monotonic() - before, steady(folder)
        self.steps = int(self.rows[-1]["step"])

    def check(self, folder, oldest=0):
        """Checks a killed run as it is. Returns the step of its checkpoint (0: none) and a list of what is wrong."""
        wrong, step = [], 0
        try:
            if state := load_training_state(folder):
                step = state["step"]
                if not same(weights(folder), weights(self.snapshots / str(step))):
                    wrong.append("unreadable: weights")
        except (ValueError, OSError) as error:
            wrong.append(f"unreadable: {error}")
        if step < oldest:
            wrong.append(f"unreadable: step {step} after step {oldest}")
        rows = steady(folder)
        if rows != self.rows[: len(rows)] or len(rows) < step - 1:  # a checkpoint is written before its step's row
            wrong.append(f"lost rows: {len(rows)} at step {step}")
        return step, wrong

    def compare(self, folder):
        """A list of what differs at the end."""
        found, wanted = left_by(folder), left_by(self.folder)
        wrong = [f"different: {name}" for name in {**found, **wanted} if not same(found.get(name), wanted.get(name))]
        return wrong + [f"different: {name} is left" for name in (".saving", ".saved") if (folder / name).exists()]


# ---- Kills


def strike(folder, processes, draw, seconds, number):
    """Signals the processes at a random moment of a kind drawn at random, and returns whether it was inside the writing
    of a checkpoint. Either all get the signal, as in a power cut, or one, and the others must end by themselves."""
    kind = draw.choice(["any", "saving", "saved", "after"])
    deadline = time.monotonic() + draw.uniform(0.2, 1) * seconds
    signs = {"saving": [folder / ".saving"], "saved": [folder / ".saved", folder / "stable" / ".saved"]}.get(kind, [])
    target, seen, there = draw.randrange(1, 4), 0, False  # strikes when a sign has appeared so many times
    while time.monotonic() < deadline and processes[0].exitcode is None and seen < target:
        before, there = there, any(sign.exists() for sign in signs)
        seen += there and not before
        time.sleep(0 if signs else 0.001)
    if kind == "saving":
        until = time.perf_counter() + draw.uniform(0, 0.006)  # somewhere in the few milliseconds that it takes
        while time.perf_counter() < until:
            pass
    for process in processes if draw.random() < 0.5 else [draw.choice(processes)]:
        process.kill() if number == signal.SIGKILL else process.terminate()
    return any((place / name).exists() for place in (folder, folder / "stable") for name in (".saving", ".saved"))


def killed(main, argv, root, options, world_size=1, kills=None, number=signal.SIGKILL):
    """Trains with interruptions until `kills` are used up, run after run, then to the end. Returns a table row."""
    draw, kills, tries, inside, runs = random.Random(options.seed), kills or options.kills, 0, 0, 0
    allowed = {0, -number, 128 + number} | ({1, 2} if world_size > 1 else set())  # 1, 2: lost or never met the others
    whole = Undisturbed(main, argv, root / "whole", world_size)
    not_compiled = "--compile=on" in argv and "; torch.compile\n" not in (root / "whole.txt").read_text()
    wrong = ["it did not compile"] * not_compiled
    while tries < kills and not wrong:
        folder, log, step, statuses = root / f"run{runs}", root / f"run{runs}.txt", 0, []
        runs += 1
        while statuses != [0] * world_size and not wrong:
            processes = start(main, [*argv, f"--out_dir={folder}", "--resume_or_start"], log, world_size)
            struck = tries < kills
            if struck:
                inside += strike(folder, processes, draw, whole.seconds / 3, number)
                tries += 1
            statuses = wait(processes, MEETING if struck and world_size > 1 else 600)
            if not set(statuses) <= allowed:  # None: it hung
                wrong.append(f"status {statuses}: {log.read_text()[-1000:]}")
            step, found = whole.check(folder, step)
            wrong += found
        if not wrong:
            wrong += whole.compare(folder)
            shutil.rmtree(folder)
    note = f"{runs} run{'s' * (runs > 1)} of {whole.steps} steps"
    return dict(tries=tries, inside_a_save=inside, failures=len(wrong), note="; ".join([note, *wrong[:3]]))


# ---- Other failures


@contextlib.contextmanager
def small_disk(place, size):
    """A disk of `size` bytes, in memory: a folder on it, and a function that mounts it again with other options."""
    place.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=True)
    try:
        yield place / "run", lambda how: subprocess.run(["mount", "-o", f"remount,{how}", place], check=True)
    finally:
        subprocess.run(["umount", place], check=True)


def disk(argv, root, how):
    """A disk that is full at one point or another, or becomes read-only: one line, the checkpoint as it was, and once
    it can be written again, the run continues."""
    if os.geteuid():
        return dict(tries=0, failures=0, note="needs root, to mount a disk")
    whole, tries, wrong, words = Undisturbed(train.main, argv, root / "whole"), 0, [], set()
    needed = sum(path.stat().st_size for path in whole.folder.glob("**/*") if path.is_file())
    shares = [0.001, 0.1, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9, 0.97, 1.03, 1.1, 1.3] if how == "full" else [3]
    for share in shares:
        with small_disk(root / f"disk{share}", int(share * needed)) as (folder, remount):
            log, out_dir = root / f"disk{share}.txt", f"--out_dir={folder}"
            go_on = [*argv, out_dir, "--resume_or_start"]
            if how == "read-only":
                wait(start(train.main, [*argv, *HALF, out_dir], log))
                remount("ro")
                go_on = [out_dir, "--resume", *LONG[:2]]
            statuses = wait(start(train.main, go_on, log))
            wrong += whole.check(folder)[1]
            if statuses != [0]:
                tries += 1
                errors = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
                wrong += [] if statuses == [2] and len(errors) == 1 else [log.read_text()[-1000:]]
                known = ("No space left", "Read-only", "is the disk full?")
                words |= {word for word in known if word in errors[-1]}
                remount(f"rw,size={8 * needed}")
                statuses = wait(start(train.main, go_on, log))
            wrong += whole.compare(folder) if statuses == [0] else [log.read_text()[-1000:]]
    return dict(tries=tries, failures=len(wrong), note="; ".join([*sorted(words), *wrong[:3]]))


def torchrun(arguments, log, before=(), **environment):
    """Starts the real launcher, its output in `log`. before: a command that runs it."""
    command = [*before, sys.executable, "-m", "torch.distributed.run", *arguments]
    environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} | environment  # see Machine
    with open(log, "w") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, cwd=HERE.parent, env=environment)


def end_of(launcher, seconds):
    """The status of a launcher that should end within `seconds`."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        launcher.wait(seconds)
    launcher.kill()
    return launcher.wait()


def await_checkpoint(folder):
    """Waits for the first one, without opening it: its files are still being moved to their places."""
    deadline = time.monotonic() + 3 * PATIENCE  # processes have to start
    while not (folder / "training_state.pt").is_file() and time.monotonic() < deadline:
        time.sleep(0.01)


def signalled(argv, root, number):
    """torchrun with two processes. SIGKILL for one of them: --max-restarts continues by itself. SIGINT or SIGTERM for
    the launcher, as Ctrl-C or a job queue sends it: the run is saved and says how to continue."""
    whole, folder, log = Undisturbed(train.main, argv, root / "whole", 2), root / "run", root / "run.txt"
    training = ["train.py", *argv, f"--out_dir={folder}", "--resume_or_start"]
    launcher = torchrun(["--standalone", "--nproc_per_node=2", "--max-restarts=1", *training], log)
    await_checkpoint(folder)
    wrong, before = [], time.monotonic()
    ranks = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    os.kill(int(ranks[-1]) if number == signal.SIGKILL else launcher.pid, number)
    status, seconds = end_of(launcher, 2 * PATIENCE), time.monotonic() - before
    text = log.read_text()
    if number == signal.SIGKILL:
        wrong += [f"status {status}: {text[-1000:]}"] * bool(status)
    else:
        wrong += [text[-1000:]] * ("--resume" not in text.partition("stopped and saved after step")[2])
        wrong += whole.check(folder)[1]
        wait(start(train.main, [f"--out_dir={folder}", "--resume"], log, 2))
    wrong = wrong or whole.compare(folder)
    return dict(tries=1, failures=len(wrong), seconds=round(seconds), note="; ".join(wrong[:3]))


def ip(words, check=True):
    subprocess.run(["ip", *words.split()], check=check, stderr=None if check else subprocess.DEVNULL)


@contextlib.contextmanager
def cable():
    """Two hosts, namespaces of the kernel, with nothing but a cable between them. Their names are also those of their
    ends of the cable; host i has the address 10.77.0.{i + 1}. Needs root."""
    a, b = names = [f"doge{i}.{os.getpid()}" for i in range(2)]
    try:
        for name in names:
            ip(f"netns add {name}")
        ip(f"link add {a} netns {a} type veth peer name {b} netns {b}")
        for i, name in enumerate(names):
            ip(f"-n {name} address add 10.77.0.{i + 1}/24 dev {name}")
            for device in ("lo", name):
                ip(f"-n {name} link set {device} up")
        yield names
    finally:
        for name in names:
            ip(f"netns delete {name}", check=False)


def two_hosts(argv, root):
    """A process on each of two hosts. The cable is pulled, and neither is told: within --patience both end, and once
    the cable is back torchrun starts them again from the last checkpoint."""
    if os.geteuid() or not shutil.which("ip"):
        return dict(tries=0, failures=0, note="needs root and iproute2, to make two hosts")
    whole, folder = Undisturbed(train.main, argv, root / "whole", 2), root / "run"
    rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=10.77.0.1:29400", "--rdzv-id=hosts"]
    rendezvous += ["--nnodes=2", "--nproc_per_node=1", "--max-restarts=3"]
    training = ["train.py", *argv, f"--out_dir={folder}", "--resume_or_start", "--patience=30"]
    logs, launchers, ended = [root / f"host{i}.txt" for i in range(2)], [], None
    with cable() as hosts:
        for i, host in enumerate(hosts):
            own = [f"--local-addr=10.77.0.{i + 1}", f"--rdzv-conf=is_host={1 - i}"]
            before = ["ip", "netns", "exec", host]
            launchers.append(torchrun([*rendezvous, *own, *training], logs[i], before, GLOO_SOCKET_IFNAME=host))
        await_checkpoint(folder)
        pulled = time.monotonic()
        ip(f"-n {hosts[1]} link set {hosts[1]} down")
        while time.monotonic() < pulled + PATIENCE and not ended:
            time.sleep(0.1)
            if all("another process of this run has ended" in log.read_text() for log in logs):
                ended = time.monotonic() - pulled
        ip(f"-n {hosts[1]} link set {hosts[1]} up")
        statuses = [end_of(launcher, 5 * PATIENCE) for launcher in launchers]
    texts = [log.read_text() for log in logs]
    wrong = [] if ended else [f"not ended within {PATIENCE} s of the cut: {texts[0][-300:]} {texts[1][-300:]}"]
    wrong += [f"status {status}: {text[-999:]}" for status, text in zip(statuses, texts, strict=True) if status]
    wrong = wrong or whole.compare(folder)
    note = "; ".join(wrong[:3]) or f"both ended {ended:.0f} s after the cut, each with a line"
    return dict(tries=1, failures=len(wrong), note=note)


# ---- The table

LONG = ["--max_steps=40", "--decay_steps=8", "--save_every=2", "--eval_every=4"]
HALF = ["--max_steps=20", "--decay_steps=0"]
MUON = ["--optimizer=muon", "--micro_batch_size=1"]
MOE = ["--is_moe", "--num_experts=16", "--num_experts_per_tok=2", *MUON]
# Completions that end by chance now and then, and a reward for short ones: even a random model has something to learn.
WRITE = "--batch_size=4 --generations=4 --max_new_tokens=24 --slots=8 --max_steps=12 --eval_size=8".split()
WRITE += "--reward_length=1 --kl=0.1 --updates_per_rollout=2".split()


def parts(root, options):
    """{part of the table: what makes its row in a folder}."""
    pretrain = [*TINY, f"--data={make_data(root / 'data')}", *LONG]
    pretrain += ["--patience=30"]  # a process that was killed before they connect is waited for so long
    a_fifth, a_tenth = max(1, options.kills // 5), max(1, options.kills // 10)  # for what takes long

    def pretraining(*extra, **more):
        return functools.partial(killed, train.main, [*pretrain, *extra], options=options, **more)

    def tuning(stage, kind, *extra, **more):
        def row(place):
            base = make_checkpoint(root / f"{kind}-base")
            make_set(root / f"{kind}-rows", base, kind, count=80)
            argv = [*TUNE, f"--init_from={base}", f"--data={root / f'{kind}-rows'}", *LONG[:1], *LONG[2:], *extra]
            return killed(stage.main, argv, place, options, **more)

        return row

    rows = {
        "train": pretraining(),
        "train_moe_muon_accumulation": pretraining(*MOE),
        "train_compiled": pretraining("--compile=on", *MOE, kills=a_tenth),
        "sft": tuning(sft, "chat", "--eval_answers=0"),
        "dpo": tuning(dpo, "preferences", kills=a_fifth),
        "grpo": tuning(grpo, "problems", *WRITE, kills=a_fifth),
        "train_2_processes": pretraining(world_size=2, kills=a_fifth),
        "train_4_processes": pretraining("--micro_batch_size=1", world_size=4, kills=a_tenth),
        "train_2_shards": pretraining("--shard", *MUON, world_size=2, kills=a_fifth),
        "train_2_shards_compiled": pretraining("--compile=on", "--shard", *MUON, world_size=2, kills=a_tenth),
        "train_sigterm": pretraining("--save_every=1", number=signal.SIGTERM),
        "full_disk": functools.partial(disk, pretrain, how="full"),
        "read_only_disk": functools.partial(disk, pretrain, how="read-only"),
        "two_hosts_one_cut_off": functools.partial(two_hosts, [*pretrain, "--max_steps=100"]),
    }
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):  # asked to stop, a run saves after any step
        argv = [*pretrain, "--max_steps=100", f"--save_every={2 if number == signal.SIGKILL else 1}"]
        rows[f"torchrun_{number.name.lower()}"] = functools.partial(signalled, argv, number=number)
    return rows


COLUMNS = "part tries inside_a_save failures seconds note".split()


def main(argv):
    options, rows = parse_options(Options, argv), []
    nanodoge.run.plot_loss = lambda *paths: None  # seconds of matplotlib in every process, and nothing to lose in it
    with tempfile.TemporaryDirectory() as root:
        known = parts(Path(root), options)
        for name in options.only or known:
            if name not in known:
                raise ValueError(f"--only={name} is not one of {' '.join(known)}")
            before = time.monotonic()
            row = dict(part=name) | known[name](Path(root, name))
            row = dict(seconds=round(time.monotonic() - before)) | row
            rows.append({key: row.get(key, "") for key in COLUMNS})
            print(*(f"{key}={value}" for key, value in rows[-1].items()), sep="  ", flush=True)
    if options.out:
        write_csv(options.out, rows)
    sys.exit(1 if any(row["failures"] for row in rows) else 0)


if __name__ == "__main__":
    run_command(main)
