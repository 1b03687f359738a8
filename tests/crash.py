"""Kills training at random moments, a hundred times, and looks whether anything was lost.

    python tests/crash.py --out=results/crash.csv  all of it, by hand: some minutes
    python tests/crash.py --kills=4 --only=train   what tests/test_crash.py runs

A crash cannot be argued away, only tried. So a small model is trained, and its process is ended by SIGKILL, which
nothing can catch: at any moment, while a checkpoint is being written, or while a finished one is being moved to its
place. After every kill the folder is looked at as it lies, then the run goes on with --resume. What must hold:

    unreadable   there is a checkpoint (once there has been one), it opens, it is not older than the one before, and its
                 weights are bit for bit those that the undisturbed run had after that step
    lost rows    log.csv holds the rows of the undisturbed run from the first on, none missing and none twice
    different    at the end: log, weights, optimizer and the stable checkpoint are those of the undisturbed run

Starting Python and torch takes seconds and a step of this model milliseconds, so the processes are forked from this
one, which has imported everything and computed nothing. (A process that has computed gradients cannot be forked.)

After the kills: several processes against one; one of several killed, and how soon the others end; a full disk and a
read-only folder (both need root, to mount a small tmpfs); torchrun, whole: --max-restarts, and Ctrl-C; and two hosts,
namespaces with a cable between them (root and iproute2), of which one is cut off for a while.
"""

import contextlib
import csv
import faulthandler
import functools
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: no pool of threads, which a fork would not take along
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import torch  # noqa: E402
from helpers import TINY, TUNE, VOLATILE, make_checkpoint, make_data, make_set  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import dpo  # noqa: E402
import grpo  # noqa: E402
import nanodoge.run  # noqa: E402
import sft  # noqa: E402
import train  # noqa: E402
from nanodoge.checkpoint import load_model, load_training_state  # noqa: E402
from nanodoge.layouts import checkpoint_file  # noqa: E402
from nanodoge.options import parse_options, run_command  # noqa: E402
from nanodoge.run import read_log  # noqa: E402

PATIENCE = 60  # seconds within which a process must end once another one of its run has died
MEETING = 180  # ... if it died while they were meeting: gloo then waits up to five times --patience


@dataclass
class Options:
    """What crash.py is asked to do."""

    kills: int = 100  # SIGKILLs of each kind of run
    seed: int = 0  # of the moments
    only: list[str] = field(default_factory=list)  # these parts of the table; empty = all
    out: str = ""  # csv file to write, empty = none


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def fork(main, argv, log, rank=0, world_size=1, port=0):
    """Starts main(argv) as a stage's command line would, output appended to the file `log` -> the process id."""
    sys.stdout.flush()
    if child := os.fork():
        return child
    status = 1
    try:
        faulthandler.register(signal.SIGUSR1)
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        os.dup2(1, 2)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        sys.argv = ["train.py", *argv]
        run_command(main)
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(status)


def fork_all(main, argv, log, world_size):
    """One process a rank -> their ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [fork(main, argv, log, rank, world_size, port) for rank in range(world_size)]


def wait(children, seconds=600):
    """The statuses of processes that are to end by themselves: negative for the signal that ended one, None for one
    that has not; where it hung is then in its log."""
    deadline, left, statuses = time.monotonic() + seconds, list(children), {}
    while left and time.monotonic() < deadline:
        for child in list(left):
            if (done := os.waitpid(child, os.WNOHANG))[0]:
                statuses[child] = os.waitstatus_to_exitcode(done[1])
                left.remove(child)
        time.sleep(0.002)
    for child in left:
        os.kill(child, signal.SIGUSR1)
        time.sleep(1)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        statuses[child] = None  # it hung
    return [statuses[child] for child in children]


def has_ended(child):
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves


def steady(folder):
    """The rows of log.csv without the columns that differ between equal runs."""
    path = Path(folder) / "log.csv"
    rows = read_log(path) if path.is_file() else []
    return [{k: v for k, v in row.items() if k not in VOLATILE} for row in rows]


def weights(folder):
    return load_file(checkpoint_file(folder, "model.safetensors"))


def same(a, b):
    """Whether two nested dicts of tensors are equal bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


class Undisturbed:
    """A run that nobody kills, and the weights of every checkpoint that it wrote on its way."""

    def __init__(self, main, argv, folder, world_size):
        self.folder, self.snapshots = folder, folder.with_name(folder.name + "-snapshots")

        def main_with_snapshots(argv):
            save = nanodoge.run.save_checkpoint

            def save_and_keep(place, model, tokenizer, state=None, **more):
                save(place, model, tokenizer, state, **more)
                if place == folder:
                    shutil.copytree(place, self.snapshots / str(state["step"]))

            nanodoge.run.save_checkpoint = save_and_keep
            main(argv)

        start = time.monotonic()
        children = fork_all(main_with_snapshots, [*argv, f"--out_dir={folder}"], folder.with_suffix(".txt"), world_size)
        assert wait(children) == [0] * world_size, folder.with_suffix(".txt").read_text()[-3000:]
        self.seconds, self.rows = time.monotonic() - start, steady(folder)
        self.steps = int(self.rows[-1]["step"])

    def check(self, folder, oldest):
        """Looks at a killed run as it lies -> the step of its checkpoint (0 = none yet), and what is wrong."""
        wrong, step = [], 0
        try:
            state = load_training_state(folder)
            if state:
                step = state["step"]
                load_model(folder)
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
        """What differs at the end."""
        wrong = ["lost rows: at the end"] * (steady(folder) != self.rows)
        for place in (folder, *[folder / "stable"] * (self.folder / "stable").is_dir()):
            twin = self.folder / place.relative_to(folder)
            a, b = (load_training_state(x) for x in (place, twin))
            kept = [{name: state.get(name) for name in ("optimizer", "reference")} for state in (a or {}, b)]
            if not (a and same(weights(place), weights(twin)) and same(*kept)):
                wrong.append(f"different: {place.name}")
        written = [path.read_bytes() if path.is_file() else b"" for path in (
            place / "samples.jsonl" for place in (folder, self.folder))]  # fmt: skip
        wrong += ["different: samples.jsonl"] * (written[0] != written[1])
        return wrong + [f"different: {name} is left" for name in (".saving", ".saved") if (folder / name).exists()]


# ---------------------------------------------------------------------------------------------------------------------
# Kills


def strike(folder, children, draw, seconds, number):
    """Kills at a random moment of a kind drawn at random -> whether it was inside the writing of a checkpoint. Of
    several processes all die, as in a power cut, or one, and then the others must end by themselves."""
    kind = draw.choice(["any", "saving", "saved", "after"])
    deadline = time.monotonic() + draw.uniform(0.2, 1) * seconds
    signs = {"saving": [folder / ".saving"], "saved": [folder / ".saved", folder / "stable" / ".saved"]}.get(kind, [])
    seen, target = 0, draw.randrange(1, 4)  # this many of them are let go by
    there = False
    while time.monotonic() < deadline and not has_ended(children[0]):
        if signs:
            before, there = there, any(sign.exists() for sign in signs)
            seen += there and not before
            if seen == target:
                break
        else:
            time.sleep(0.001)
    if kind == "saving":
        until = time.perf_counter() + draw.uniform(0, 0.006)  # somewhere in the few milliseconds that it takes
        while time.perf_counter() < until:
            pass
    victims = children if draw.random() < 0.5 else [draw.choice(children)]
    for child in victims:
        os.kill(child, number)
    return any((place / name).exists() for place in (folder, folder / "stable") for name in (".saving", ".saved"))


def killed(main, argv, root, options, world_size=1, kills=None, number=signal.SIGKILL):
    """Trains with interruptions until `kills` are used up, run after run, then to the end -> a row of the table."""
    draw, kills, tries, inside, runs, wrong = random.Random(options.seed), kills or options.kills, 0, 0, 0, []
    ended = {0, -number, 128 + number} | ({1, 2} if world_size > 1 else set())  # lost, or never met, the others
    root.mkdir()
    whole = Undisturbed(main, argv, root / "whole", world_size)
    while tries < kills and not wrong:
        folder, step = root / f"run{runs}", 0
        runs += 1
        while not wrong:
            log = root / f"run{runs}.txt"
            children = fork_all(main, [*argv, f"--out_dir={folder}", "--resume_or_start"], log, world_size)
            if struck := tries < kills:
                inside += strike(folder, children, draw, whole.seconds / 3, number)
                tries += 1
            statuses = wait(children, MEETING) if struck and world_size > 1 else wait(children)
            if not set(statuses) <= ended:  # None: it hung
                wrong.append(f"status {statuses}: {log.read_text()[-1000:]}")
            step, found = whole.check(folder, step)
            wrong += found
            if statuses == [0] * world_size:
                break
        if not wrong:
            wrong += whole.compare(folder)
            shutil.rmtree(folder)
    note = f"{runs} run{'s' * (runs > 1)} of {whole.steps} steps" + "".join(f"; {what}" for what in wrong[:3])
    return dict(tries=tries, inside_a_save=inside, failures=len(wrong), note=note)


# ---------------------------------------------------------------------------------------------------------------------
# Other ways to be hurt


def as_one(argv, root, world_size):
    """Several processes against one, and a run that one process began and several go on with: the same losses, for the
    rows of a step are the same. Sums are taken in another order, so they agree to float error and not to the bit."""
    root.mkdir()
    alone, several, moved = (root / name for name in ("alone", "several", "moved"))
    half = ["--max_steps=20", "--decay_steps=0"]
    statuses = wait([fork(train.main, [*argv, f"--out_dir={alone}"], root / "alone.txt")])
    statuses += wait(fork_all(train.main, [*argv, f"--out_dir={several}"], root / "several.txt", world_size))
    statuses += wait([fork(train.main, [*argv, *half, f"--out_dir={moved}"], root / "moved.txt")])
    again = [f"--out_dir={moved}", "--resume", *LONG[:2]]
    statuses += wait(fork_all(train.main, again, root / "moved.txt", world_size))
    worst, rows = 0.0, steady(alone)
    for folder in (several, moved):
        for a, b in zip(rows, steady(folder), strict=True):
            worst = max([worst, *(abs(float(a[k]) - float(b[k])) for k in ("loss", "val_loss") if a[k])])
    failures = (worst > 1e-5) + sum(status != 0 for status in statuses)
    return dict(tries=2, failures=failures, note=f"{len(rows)} steps; losses differ by {worst:.1e} at the most")


@contextlib.contextmanager
def small_disk(place, size):
    """A disk of `size` bytes, in memory."""
    place.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=True)
    try:
        yield place / "run", lambda how: subprocess.run(["mount", "-o", f"remount,{how}", place], check=True)
    finally:
        subprocess.run(["umount", place], check=True)


def disk(argv, root, how):
    """A disk that is full at one point or another, or cannot be written any more: one line, the checkpoint as it was;
    once there is room again, the run goes on."""
    if os.geteuid():
        return dict(tries=0, failures=0, note="needs root, to mount a disk")
    root.mkdir()
    whole, tries, wrong, words = Undisturbed(train.main, argv, root / "whole", 1), 0, [], set()
    needed = sum(path.stat().st_size for path in whole.folder.glob("**/*") if path.is_file())
    shares = [0.001, 0.1, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9, 0.97, 1.03, 1.1, 1.3] if how == "full" else [3]
    for share in shares:
        with small_disk(root / f"disk{share}", int(share * needed)) as (folder, remount):
            log, again = root / f"disk{share}.txt", [*argv, f"--out_dir={folder}", "--resume_or_start"]
            if how == "full":
                statuses = wait([fork(train.main, again, log)])
            else:
                half = ["--max_steps=20", "--decay_steps=0"]
                statuses = wait([fork(train.main, [*argv, *half, f"--out_dir={folder}"], log)])
                remount("ro")
                go_on = [f"--out_dir={folder}", "--resume", *LONG[:2]]
                statuses = wait([fork(train.main, go_on, log)])
            wrong += whole.check(folder, 0)[1]
            if statuses != [0]:
                tries += 1
                error = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
                wrong += [] if statuses == [2] and len(error) == 1 else [log.read_text()[-1000:]]
                known = ("No space left", "Read-only", "is the disk full?")
                words |= {word for word in known if word in error[-1]}
                remount(f"rw,size={8 * needed}")
                statuses = wait([fork(train.main, again if how == "full" else go_on, log)])
            wrong += whole.compare(folder) if statuses == [0] else [log.read_text()[-1000:]]
    return dict(tries=tries, failures=len(wrong), note="; ".join([*sorted(words), *wrong[:3]]))


def await_checkpoint(folder):
    """Waits for the first one, without opening it: its files are still being moved to their places."""
    deadline = time.monotonic() + 3 * PATIENCE  # processes have to start
    while not (folder / "training_state.pt").is_file():
        if time.monotonic() > deadline:
            return ["no checkpoint was written"]
        time.sleep(0.01)
    return []


def torchrun(argv, root, number):
    """The real launcher. SIGKILL for one of two processes: --max-restarts goes on by itself. SIGINT or SIGTERM for the
    launcher, as Ctrl-C or a job queue sends it: the run is saved and says how to go on."""
    root.mkdir()
    whole, folder, log = Undisturbed(train.main, argv, root / "whole", 2), root / "run", root / "run.txt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    command += ["train.py", *argv, f"--out_dir={folder}", "--resume_or_start"]
    environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # see Machine
    with open(log, "w") as file, subprocess.Popen(command, stdout=file, stderr=file, cwd=HERE.parent,
                                                  env=environment) as launcher:  # fmt: skip
        wrong = await_checkpoint(folder)
        start = time.monotonic()
        ranks = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        os.kill(int(ranks[-1]) if number == signal.SIGKILL else launcher.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            launcher.wait(2 * PATIENCE)
        launcher.kill()
    seconds = time.monotonic() - start
    text = log.read_text()
    if number == signal.SIGKILL:
        wrong += [] if launcher.returncode == 0 else [f"status {launcher.returncode}: {text[-1000:]}"]
    else:
        wrong += [] if "--resume" in text.partition("stopped and saved after step")[2] else [text[-1000:]]
        wrong += whole.check(folder, 0)[1]
        wait(fork_all(train.main, [f"--out_dir={folder}", "--resume"], log, 2))
    wrong = wrong or whole.compare(folder)
    return dict(tries=1, failures=len(wrong), seconds=round(seconds), note="; ".join(wrong[:3]))


@contextlib.contextmanager
def cable():
    """Two hosts, namespaces of the kernel, with nothing but a cable between them -> their names, which are those of
    their ends of the cable too; host i has the address 10.77.0.{i + 1}. Needs root."""
    names = [f"doge{i}.{os.getpid()}" for i in range(2)]
    ip = functools.partial(subprocess.run, check=True)
    try:
        for name in names:
            ip(["ip", "netns", "add", name])
        ip(["ip", "link", "add", names[0], "netns", names[0], "type", "veth", "peer", "name", names[1], "netns",
            names[1]])  # fmt: skip
        for i, name in enumerate(names):
            ip(["ip", "-n", name, "address", "add", f"10.77.0.{i + 1}/24", "dev", name])
            for device in ("lo", name):
                ip(["ip", "-n", name, "link", "set", device, "up"])
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], stderr=subprocess.DEVNULL)


def two_hosts(argv, root):
    """A process on each of two hosts. The cable is pulled, and nothing tells either that the other is gone: within
    --patience both end, and once the cable is back torchrun starts them again from the last checkpoint."""
    if os.geteuid() or not shutil.which("ip"):
        return dict(tries=0, failures=0, note="needs root and iproute2, to make two hosts")
    root.mkdir()
    whole, folder, launchers, wrong = Undisturbed(train.main, argv, root / "whole", 2), root / "run", [], []
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--max-restarts=3",
               "--rdzv-backend=c10d", "--rdzv-endpoint=10.77.0.1:29400", "--rdzv-id=hosts"]  # fmt: skip
    training = ["train.py", *argv, f"--out_dir={folder}", "--resume_or_start", "--patience=30"]
    logs = [root / f"host{i}.txt" for i in range(2)]
    with cable() as hosts, contextlib.ExitStack() as stack:
        for i, host in enumerate(hosts):
            more = [f"--local-addr=10.77.0.{i + 1}", f"--rdzv-conf=is_host={1 - i}"]
            environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "GLOO_SOCKET_IFNAME": host}
            launchers.append(stack.enter_context(subprocess.Popen(
                ["ip", "netns", "exec", host, *command, *more, *training], cwd=HERE.parent, env=environment,
                stdout=stack.enter_context(logs[i].open("w")), stderr=subprocess.STDOUT)))  # fmt: skip
        wrong += await_checkpoint(folder)
        start, ended = time.monotonic(), None
        subprocess.run(["ip", "-n", hosts[1], "link", "set", hosts[1], "down"], check=True)
        while time.monotonic() < start + PATIENCE and not ended:
            time.sleep(0.1)
            if all("another process of this run has ended" in log.read_text() for log in logs):
                ended = time.monotonic() - start
        subprocess.run(["ip", "-n", hosts[1], "link", "set", hosts[1], "up"], check=True)
        for launcher in launchers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                launcher.wait(5 * PATIENCE)
            launcher.kill()
    texts = [log.read_text() for log in logs]
    wrong += [] if ended else [f"not ended within {PATIENCE} s of the cut: {texts[0][-300:]} {texts[1][-300:]}"]
    wrong += [f"status {x.returncode}: {text[-999:]}" for x, text in zip(launchers, texts, strict=True) if x.returncode]
    wrong = wrong or whole.compare(folder)
    note = "; ".join(wrong[:3]) or f"both ended {ended:.0f} s after the cut, each with a line"
    return dict(tries=1, failures=len(wrong), note=note)


# ---------------------------------------------------------------------------------------------------------------------
# The table


LONG = ["--max_steps=40", "--decay_steps=8", "--save_every=2", "--eval_every=4"]
MUON = ["--optimizer=muon", "--micro_batch_size=1"]
MOE = ["--is_moe", "--num_experts=16", "--num_experts_per_tok=2", *MUON]
# Answers that now and then end by chance, and shorter ones are better: even a random model has something to learn.
WRITE = ["--batch_size=4", "--generations=4", "--max_new_tokens=24", "--slots=8", "--max_steps=12",
         "--eval_size=8", "--reward_length=1", "--kl=0.1", "--updates_per_rollout=2"]  # fmt: skip


def parts(root, options):
    """{part of the table: a function that makes its row}."""
    data = make_data(root / "data")
    pretrain = [*TINY, f"--data={data}", *LONG, "--patience=30"]  # one killed before they met is waited for so long

    def tune(stage, kind, *extra, kills=None):
        name = stage.__name__
        base = make_checkpoint(root / f"{name}-base")
        rows = make_set(root / f"{name}-rows", base, kind, count=80)
        argv = [*TUNE, f"--init_from={base}", f"--data={rows}", *LONG[:1], *LONG[2:], *extra]
        return killed(stage.main, argv, root / name, options, kills=kills)

    def train_killed(name, *extra, **more):
        return lambda: killed(train.main, [*pretrain, *extra], root / name, options, **more)

    def compiled(name, *extra, **more):
        row = train_killed(name, "--compile=on", *extra, kills=max(1, options.kills // 10), **more)()
        eager = not (root / name / "whole.txt").read_text().count("; torch.compile\n")
        return row | dict(failures=row["failures"] + eager, note=row["note"] + "; it did not compile" * eager)

    a_fifth = max(1, options.kills // 5)  # for what takes long
    rows = {
        "train": train_killed("train"),
        "train_moe_muon_accumulation": train_killed("moe", *MOE),
        "train_compiled": lambda: compiled("compiled", *MOE),
        "sft": lambda: tune(sft, "chat", "--eval_answers=0"),
        "dpo": lambda: tune(dpo, "preferences", kills=a_fifth),
        "grpo": lambda: tune(grpo, "problems", *WRITE, kills=a_fifth),
        "train_2_processes": train_killed("two", world_size=2, kills=a_fifth),
        "train_4_processes": train_killed("four", "--micro_batch_size=1", world_size=4, kills=-(-options.kills // 10)),
        "train_2_shards": train_killed("shards", "--shard", *MUON, world_size=2, kills=a_fifth),
        "train_2_shards_compiled": lambda: compiled("shards_compiled", "--shard", *MUON, world_size=2),
        "train_sigterm": train_killed("term", "--save_every=1", number=signal.SIGTERM),
        "full_disk": lambda: disk(pretrain, root / "full", "full"),
        "read_only_disk": lambda: disk(pretrain, root / "read_only", "read-only"),
    }
    for world_size in (2, 4):
        argv = [*pretrain, f"--micro_batch_size={4 // world_size}"]
        rows[f"{world_size}_processes_as_1"] = functools.partial(as_one, argv, root / f"as_{world_size}", world_size)
        argv = [*argv, "--shard"]
        rows[f"{world_size}_shards_as_1"] = functools.partial(as_one, argv, root / f"shards_{world_size}", world_size)
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):  # asked to stop, a run saves after any step
        name = f"torchrun_{number.name.lower()}"
        argv = [*pretrain, "--max_steps=100", f"--save_every={2 if number == signal.SIGKILL else 1}"]
        rows[name] = functools.partial(torchrun, argv, root / name, number)
    rows["two_hosts_one_cut_off"] = functools.partial(two_hosts, [*pretrain, "--max_steps=100"], root / "hosts")
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
            start = time.monotonic()
            rows.append(dict(part=name) | known[name]())
            rows[-1].setdefault("seconds", round(time.monotonic() - start))
            print(*(f"{key}={rows[-1].get(key, '')}" for key in COLUMNS), sep="  ", flush=True)
    if options.out:
        with open(options.out, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    sys.exit(1 if any(row["failures"] for row in rows) else 0)


if __name__ == "__main__":
    run_command(main)
