"""Options: one dataclass per stage, filled from its defaults, then config files, then the command line.

A field of the dataclass is an option: its default, its type with the range it may have, and the comment on its line,
which is its help text. A config file holds plain assignments, which are read as literals and never executed. An unknown
name, a value of another type or out of range ends the program before it starts, in one line with exit status 2.
"""

import ast
import dataclasses
import difflib
import inspect
import math
import os
import re
import sys
import typing
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, NamedTuple

HERE = Path(__file__).resolve().parent.parent  # the repository


# ---- Ranges, as parts of a type: `steps: Count = 10`


class Range(NamedTuple):
    """The finite numbers from `low` to `high`, both included unless they are said to be open."""

    low: float
    high: float = math.inf
    low_is_open: bool = False
    high_is_open: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.low_is_open else value >= self.low
        return above and value < math.inf and (value < self.high if self.high_is_open else value <= self.high)

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"a number above {self.low:,}" if self.low_is_open else f"a number from {self.low:,} up"
        return f"from {self.low:,} " + (f"up and below {self.high:,}" if self.high_is_open else f"to {self.high:,}")


Count = Annotated[int, Range(1)]
Whole = Annotated[int, Range(0)]
Positive = Annotated[float, Range(0, low_is_open=True)]
NonNegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1, high_is_open=True)]
Share = Annotated[float, Range(0, 1)]


def check_ranges(options: Any) -> None:
    """Raises ValueError for a field outside the range in its type. A dataclass of options calls it when it is made."""
    for name, hint in typing.get_type_hints(type(options), include_extras=True).items():
        for allowed in getattr(hint, "__metadata__", ()):
            if (value := getattr(options, name)) not in allowed:
                raise ValueError(f"--{name}={value} must be {allowed}")


# ---- Parsing


def parse_options(cls: type, argv: list[str], **how: Any) -> Any:
    """`cls` made from its defaults, then config files, then the command line. how: as for read_values."""
    from_files, from_line = read_values(cls, argv, **how)
    return cls(**from_files | from_line)


def read_values(
    cls: type, argv: list[str], positional: str | None = None, default_config: str | Path | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """{option: value} of config files and of the command line (`--name=text`, `--name text`, and `--name` for a
    boolean), of the right types; ranges are not checked. --help prints and exits.

    Bare words are config files, and `default_config` is read if there are none. Where `positional` names a list field
    (the SOURCES of prepare_data.py) words fill that field, and a config file is given as `--config=FILE`. Raises
    ValueError for a mistake, naming the option and what is valid.
    """
    if "--help" in argv or "-h" in argv:
        print(help_text(cls, positional))
        sys.exit(0)
    hints, words, given, arguments = typing.get_type_hints(cls), [], {}, iter(argv)
    for argument in arguments:
        if not argument.startswith("--"):
            words.append(argument)
            continue
        name, equals, text = argument[2:].partition("=")
        name = name.replace("-", "_")
        if not equals:
            takes_value = name == "config" or hints.get(name, bool) is not bool
            text = next(arguments, "--") if takes_value else "true"
            if text.startswith("--"):
                raise ValueError(f"--{name} needs a value: --{name}=...")
        given[name] = text
    files = [] if positional else words
    files += [given.pop("config")] if "config" in given else []
    from_files = {}
    for file in files or [default_config] * bool(default_config):
        for name, (value, line) in read_config(file).items():
            from_files[name] = read_option(cls, name, value, f"{file}:{line}")
    from_line = {name: read_option(cls, name, text, f"--{name}") for name, text in given.items()}
    return from_files, from_line | ({positional: words} if positional and words else {})


def read_option(cls: type, name: str, value: Any, where: str) -> Any:
    """`value` as the type of the option `name` of `cls`. Raises ValueError, with the nearest name, if there is none."""
    names = [field.name for field in fields(cls)]
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        advice = f"did you mean {close[0]!r}?" if close else "--help lists the options"
        raise ValueError(f"{where}: there is no option {name!r}; {advice}")
    return convert(value, typing.get_type_hints(cls)[name], where)


def read_config(path: str | Path) -> dict[str, tuple[Any, int]]:
    """{name: (value, line number)} of a config file, in which only `name = literal` is allowed: nothing in it runs."""
    if not Path(path).is_file():
        raise ValueError(f"there is no config file {str(path)!r} (options are written --name=value)")
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8-sig"))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{path}: not a file of assignments ({error})") from None
    values = {}
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # the docstring
        if not (isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)):
            raise ValueError(f"{path}:{node.lineno}: only plain assignments are allowed: name = value")
        try:
            values[node.targets[0].id] = (ast.literal_eval(node.value), node.lineno)
        except (ValueError, TypeError, RecursionError):
            raise ValueError(f"{path}:{node.lineno}: the value must be a literal: a number, string, list") from None
    return values


SWITCH = {"true": True, "on": True, "1": True, "false": False, "off": False, "0": False}
KINDS = {bool: "true or false", int: "a whole number below 2^63", float: "a number", str: "a text", list[str]: "a list"}


def convert(value: Any, hint: Any, where: str) -> Any:
    """`value` (a literal of a config file, or text of the command line) as the type `hint`: int, float, bool, str,
    list[str] or Literal[...]. A whole number is accepted for a float, never the reverse; on for true, and true for the
    choice on."""
    text, choices = "", [choice for choice in typing.get_args(hint) if isinstance(choice, str)]  # of a Literal
    with suppress(ValueError):  # of encode (half a character), repr (thousands of digits), int and float
        text = value if isinstance(value, str) else repr(value)
        switch = SWITCH.get(text.lower())
        if b"\0" in text.encode():
            raise ValueError  # no file and no terminal could hold it
        if "on" in choices and switch is not None:
            return "on" if switch else "off"
        if value in choices or (hint is str and isinstance(value, str)):
            return value
        if hint is bool and switch is not None:
            return switch
        if hint is float and not isinstance(value, bool):
            return float(text)
        if hint is int and not isinstance(value, bool) and abs(int(text)) < 2**63:
            return int(text)
        if hint == list[str] and isinstance(value, str | list | tuple):
            return value.split(",") if isinstance(value, str) else [str(item) for item in value]
    valid = f"one of {', '.join(filter(None, choices))}" if choices else KINDS[hint]
    raise ValueError(f"{where}: {text!r} is not {valid}")


# ---- Help


def field_comments(cls: type) -> dict[str, tuple[str, str]]:
    """{field: (group, comment on its line)} from the source of `cls` and its bases. A line `# ---- Name` starts a
    group; before one, the group is the first line of the class's docstring. The names in `cls.first` come first."""
    comments = {}
    for base in reversed(cls.__mro__[:-1]):
        group = (base.__doc__ or "Options").splitlines()[0]
        lines = re.findall(r"^ {4}(?:# -+ (.+)|(\w+):[^#\n]*#\s*(.+))$", inspect.getsource(base), re.M)
        for title, name, comment in lines:
            group = title or group
            if name:
                comments[name] = group, comment
    return comments


def defaults(cls: type) -> dict[str, Any]:
    """{option: value} of a command without arguments: the class's defaults, and over them the file in config/ that it
    names as its `recipe`."""
    values = {f.name: f.default_factory() if f.default is dataclasses.MISSING else f.default for f in fields(cls)}
    recipe = read_config(HERE / "config" / cls.recipe) if hasattr(cls, "recipe") else {}
    return values | {name: value for name, (value, _) in recipe.items()}


def changed(options: Any) -> str:
    """The options that differ from those of a command without arguments."""
    usual = defaults(type(options))
    return " ".join(f"{name}={getattr(options, name)}" for name in usual if getattr(options, name) != usual[name])


def help_text(cls: type, positional: str | None = None) -> str:
    """The text of --help: usage, the options by group, each with what it is without arguments, its comment and its
    choices; then the script's opening essay, of a stage that says which options come first its beginning alone."""
    module = sys.modules[cls.__module__]
    usage = f"{positional.upper()} ... [--config=FILE]" if positional else "[config/FILE.py ...]"
    lines = [f"python {Path(module.__file__).name} {usage} [--name=value ...]"]
    comments, hints, values = field_comments(cls), typing.get_type_hints(cls), defaults(cls)
    first = getattr(cls, "first", "").split()
    groups = {"The options people need first": first} if first else {}
    for name in values:
        if name not in (*first, positional):
            groups.setdefault(comments[name][0], []).append(name)
    for group, names in groups.items():
        lines += ["", f"{group.rstrip('.')}:"]
        for name in names:
            value = ",".join(values[name]) if isinstance(values[name], list) else values[name]
            value = str(value).lower() if isinstance(value, bool) else value
            choices = ", ".join(choice for choice in typing.get_args(hints[name]) if choice and isinstance(choice, str))
            lines.append(f"  --{name}={value}".ljust(34) + f" {comments[name][1]}" + f" [{choices}]" * bool(choices))
    essay = (module.__doc__ or "").strip().split("\n\n")
    return "\n".join([*lines, "", "\n\n".join(essay[: 2 if first else None])])


# ---- The entry point of every script


def run_command(main: Callable[[list[str]], None]) -> None:
    """Calls `main(argv)` and turns a user's mistake into one line on stderr and exit status 2.

    The convention of the whole project: bad input raises ValueError with a line that names the option, the value and
    what is valid; a bug raises anything else. So a ValueError from one of our own files is a message, and one from
    inside a library is a bug that keeps its traceback. OSError (no such file, no permission, disk full) is always about
    the user's machine, wherever it is raised.
    """
    try:
        main(sys.argv[1:])
    except BrokenPipeError:  # the reader of our output, `head` for example, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (ValueError, OSError) as error:
        frame = error.__traceback__
        while frame.tb_next:
            frame = frame.tb_next
        ours = Path(frame.tb_frame.f_code.co_filename).resolve().parent in (HERE, HERE / "nanodoge")
        if isinstance(error, ValueError) and not ours:
            raise
        message = f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else str(error)
        print("error: " + "\\n".join(message.splitlines()), file=sys.stderr)  # file names can hold line ends
        sys.exit(2)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            print(f"error: out of memory: {one_line(error)[:200]}", file=sys.stderr)
            sys.exit(2)
        if not re.search("(gloo|socket).*(Connection (closed|reset) by peer|[Tt]imed out)", str(error), re.DOTALL):
            raise
        reason = "another process of this run has ended, or has not answered for --patience seconds"
        advice = "once its own message is dealt with, --resume goes on from the last checkpoint"
        print(f"error: {reason}; {advice}", file=sys.stderr, flush=True)
        os._exit(1)  # at once: destroying a process group that has lost a member can hang
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def is_out_of_memory(error: BaseException | None) -> bool:
    """True for a full GPU, for which torch has an error type, and for full host memory, a RuntimeError like others."""
    is_type = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return is_type or "can't allocate memory" in str(error)


def one_line(error: BaseException | str) -> str:
    """The first line of what an exception says; its type if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
