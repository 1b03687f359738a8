"""pyproject.toml against the repository: what `pip install -e .` makes importable."""

import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
PROJECT = (HERE / "pyproject.toml").read_text(encoding="utf-8")


def test_every_program_is_a_module_of_the_installation():
    modules = re.search(r"py-modules = \[(.*?)\]", PROJECT, re.DOTALL)[1]
    assert set(re.findall(r'"(\w+)"', modules)) == {path.stem for path in HERE.glob("*.py")}


def test_files_that_are_no_python_are_installed_too():
    patterns = re.search(r"package-data = \{ nanodoge = \[(.*?)\]", PROJECT)[1]
    held = {path for pattern in re.findall(r'"(.*?)"', patterns) for path in (HERE / "nanodoge").glob(pattern)}
    others = {p for p in (HERE / "nanodoge").rglob("*") if p.is_file() and p.suffix != ".py" and "cache" not in str(p)}
    assert {path for path in held if path.suffix != ".py"} == others


def test_modules_are_imported_from_another_folder(tmp_path):
    """As a notebook does; here a path stands in for the installation. config/ and stories.txt are found."""
    code = "import train, nanodoge.stories as s; print(train.read_options([]).hidden_size, len(s.Story(1).text) > 99)"
    environment = {"PYTHONPATH": str(HERE), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == "128 True\n", done.stderr
