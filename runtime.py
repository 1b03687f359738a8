"""What every stage stands on: options, device and ranks, checkpoints, the log.

A training script is a loop of a dozen lines surrounded by chores: read the options, find the GPU, agree with the
other processes, save, load, write the log, draw the curve. The chores are the same in every stage, and they are where
days of training are lost. They live here once, so that train.py can be about training.

Options.    A stage declares one dataclass: a field is an option, its comment is the help text. Values come from the
            defaults, then from config files (plain assignments, read as literals and never executed), then from
            `--name=value`. A name nobody declared, or a value of another type, ends the run before it starts.
"""

import ast
import dataclasses
import difflib
import inspect
import re
import sys
import typing
from pathlib import Path

HERE = Path(__file__).resolve().parent


# ---------------------------------------------------------------------------------------------------------------------
# Entry point and options


def run(main):
    """Calls `main(argv)` and turns a user's mistake into one line on stderr and exit status 2.

    The convention of the whole project: bad input raises ValueError with a line that names the option, the value and
    what would be valid; a bug raises anything else. So a ValueError from one of our own files is a message and one
    from inside a library is a bug that keeps its traceback. OSError (no such file, no permission, disk full) is always
    about the user's machine, wherever it is raised.
    """
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        frame = error.__traceback__
        while frame.tb_next:
            frame = frame.tb_next
        ours = Path(frame.tb_frame.f_code.co_filename).resolve().parent == HERE
        if isinstance(error, ValueError) and not ours:
            raise
        message = f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else str(error)
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def parse_options(options_class, argv, positional=None):
    """Builds `options_class` from its defaults, then config files, then `--name=value`, later ones winning.

    Bare words are config files; where `positional` names a list field (the SOURCES of prepare_data.py) they fill that
    field and a config file is given as `--config=FILE`. `--name` alone sets a boolean. Raises ValueError for an
    unknown name (with the nearest valid one), a wrong type, a missing file. `--help` prints every option and exits.
    """
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
        if name == "config" and "config" not in names:
            load(text)
        elif not equals and name in names and hints[name] is not bool:
            raise ValueError(f"--{name} needs a value: --{name}=...")
        else:
            assign(name, text if equals else "true", f"--{name}")
    if words:
        values[positional] = words
    return options_class(**values)


def read_config(path):
    """Reads a config file into {name: (value, line number)}. Only `name = literal` is allowed, so a config can be
    printed, compared and trusted: nothing in it runs."""
    if not Path(path).is_file():
        raise ValueError(f"there is no config file {str(path)!r} (options are written --name=value)")
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, RecursionError, MemoryError) as error:
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
    text = value if isinstance(value, str) else repr(value)
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
            return hint(text)
        except ValueError:
            kind = "a whole number" if hint is int else "a number"
            raise ValueError(f"{where}: {text!r} is not {kind}") from None
    if hint is str and isinstance(value, str):
        return value
    if hint == list[str]:
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
        lines.append(f"  --{field.name}={default}".ljust(34) + f" {comments.get(field.name, '')}{among}")
    return "\n".join(lines)
