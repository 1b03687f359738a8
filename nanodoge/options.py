"""Options: one dataclass a stage, filled from its defaults, config files and the command line; errors in one line."""

import ast
import dataclasses
import difflib
import inspect
import keyword
import os
import re
import sys
import typing
from pathlib import Path

import torch

from nanodoge.layouts import one_line

HERE = Path(__file__).resolve().parent.parent  # the repository


def run_command(main):
    """Calls `main(argv)` and turns a user's mistake into one line on stderr and exit status 2.

    The convention of the whole project: bad input raises ValueError with a line that names the option, the value and
    what would be valid; a bug raises anything else. So a ValueError from one of our own files is a message and one
    from inside a library is a bug that keeps its traceback. OSError (no such file, no permission, disk full) is always
    about the user's machine, wherever it is raised.
    """
    try:
        main(sys.argv[1:])
    except BrokenPipeError:  # whoever read our output, `head` for one, has had enough
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
        print("error: " + "\\n".join(message.splitlines()), file=sys.stderr)  # names can hold ends of lines
        sys.exit(2)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            print(f"error: out of memory: {one_line(error)[:200]}", file=sys.stderr)
            sys.exit(2)
        if not re.search("(gloo|socket).*(Connection (closed|reset) by peer|[Tt]imed out)", str(error), re.DOTALL):
            raise
        print("error: another process of this run has ended, or has not answered for --patience seconds; once its own "
              "message is dealt with, --resume goes on from the last checkpoint", file=sys.stderr)  # fmt: skip
        sys.stderr.flush()
        os._exit(1)  # at once: to take a process group apart that has lost a member can take for ever
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def is_out_of_memory(error):
    """torch has an error for a full GPU, and for a full memory a RuntimeError like any other."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def parse_options(options_class, argv, positional=None, base=None):
    """Builds `options_class` from its defaults, then `base` (a dict: the options of a run that is resumed), then
    config files, then `--name=value`, later ones winning.

    Bare words are config files; where `positional` names a list field (the SOURCES of prepare_data.py) they fill that
    field and a config file is given as `--config=FILE`. `--name` alone sets a boolean. Raises ValueError for an
    unknown name (with the nearest valid one), a wrong type, a missing file.
    """
    hints = typing.get_type_hints(options_class)
    base = {name: convert(value, hints[name], f"{name} of that run") for name, value in (base or {}).items()}
    return options_class(**base | read_values(options_class, argv, positional))


def read_values(options_class, argv, positional=None):
    """What `argv` says, as {option: value}: the types are checked, the ranges are not. --help prints and exits."""
    if "--help" in argv or "-h" in argv:
        print(help_text(options_class, positional))
        sys.exit(0)
    hints = typing.get_type_hints(options_class)
    names = [field.name for field in dataclasses.fields(options_class)]
    values, words = {}, []

    def assign(name, value, where):
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            advice = f"did you mean {close[0]!r}?" if close else "--help lists the options"
            raise ValueError(f"{where}: there is no option {name!r}; {advice}")
        values[name] = convert(value, hints[name], where)

    def load(path):
        for name, (value, line) in read_config(path).items():
            assign(name, value, f"{path}:{line}")

    for argument in argv:
        if not argument.startswith("--"):
            words.append(argument) if positional else load(argument)
            continue
        name, equals, text = argument[2:].partition("=")
        name = name.replace("-", "_")
        name += "_" * keyword.iskeyword(name)  # --for is the field for_
        if name == "config" and "config" not in names:
            load(text)
        elif not equals and name in names and hints[name] is not bool:
            raise ValueError(f"--{name} needs a value: --{name}=...")
        else:
            assign(name, text if equals else "true", f"--{name}")
    if words:
        values[positional] = words
    return values


def read_config(path):
    """Reads a config file into {name: (value, line number)}. Only `name = literal` is allowed, so a config can be
    printed, compared and trusted: nothing in it runs."""
    if not Path(path).is_file():
        raise ValueError(f"there is no config file {str(path)!r} (options are written --name=value)")
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8"))
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


def convert(value, hint, where):
    """Returns `value` (a literal from a config file, or text from the command line) as the type `hint`: int, float,
    bool, str, list[str] or Literal[...]. A whole number is accepted for a float and never the reverse."""
    try:
        text = value if isinstance(value, str) else repr(value)
        if b"\0" in text.encode():
            raise ValueError
    except ValueError:  # half a character; a number of thousands of digits
        raise ValueError(f"{where}: not a value that a file or a terminal could hold") from None
    if typing.get_origin(hint) is typing.Literal:
        if value not in typing.get_args(hint):
            raise ValueError(f"{where}: {text!r} is not one of {', '.join(map(str, typing.get_args(hint)))}")
        return value
    if hint is bool:
        if text.lower() not in ("true", "false", "1", "0"):
            raise ValueError(f"{where}: {text!r} is not true or false")
        return text.lower() in ("true", "1")
    if hint in (int, float) and not isinstance(value, bool):
        try:
            number = hint(text)
            if hint is float or abs(number) < 2**63:
                return number
            kind = "a whole number below 2^63"
        except ValueError:
            kind = "a whole number" if hint is int else "a number"
        raise ValueError(f"{where}: {text!r} is not {kind}")
    if hint is str and isinstance(value, str):
        return value
    if hint == list[str] and isinstance(value, (str, list, tuple)):
        return value.split(",") if isinstance(value, str) else [str(item) for item in value]
    raise ValueError(f"{where}: {text!r} is not of type {getattr(hint, '__name__', hint)}")


def field_comments(options_class):
    """{field name: the comment on its line}, read from the source of the class and its bases."""
    comments = {}
    for cls in reversed(options_class.__mro__[:-1]):
        for name, comment in re.findall(r"^ {4}(\w+):[^#\n]*#\s*(.+)$", inspect.getsource(cls), re.MULTILINE):
            comments[name] = comment
    return comments


def help_text(options_class, positional=None):
    """The text of --help: the script's own opening lines, then each option with its default and comment."""
    module = sys.modules[options_class.__module__]
    usage = f"{positional.upper()} ... [--config=FILE]" if positional else "[config/FILE.py ...]"
    lines = [f"python {Path(module.__file__).name} {usage} [--name=value ...]", "", (module.__doc__ or "").strip(), ""]
    comments, hints = field_comments(options_class), typing.get_type_hints(options_class)
    for field in dataclasses.fields(options_class):
        if field.name == positional:
            continue
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        choices = typing.get_args(hints[field.name]) if typing.get_origin(hints[field.name]) is typing.Literal else ()
        among = f" [{', '.join(map(str, choices))}]" if choices else ""
        lines.append(f"  --{field.name.rstrip('_')}={default}".ljust(34) + f" {comments.get(field.name, '')}{among}")
    return "\n".join(lines)
