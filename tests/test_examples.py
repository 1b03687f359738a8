"""docs/tour.md against the files that it quotes, and the notebooks of examples/ against their committed outputs.

python -m pytest -m notebooks                                         runs the notebooks, two minutes on one core
python tests/test_examples.py                                         runs them, and writes their outputs
python train.py --keep_window_size=64 --out_dir=out/stories-64        the model of the pictures
PICTURES=docs/pictures python tests/test_examples.py out/stories-64   draws them; writes no outputs
"""

import doctest
import math
import os
import re
import sys
from pathlib import Path

import matplotlib
import pytest

HERE = Path(__file__).resolve().parent.parent
TOUR = HERE / "docs" / "tour.md"
NOTEBOOKS = sorted((HERE / "examples").glob("*.ipynb"))
NUMBER = r"-?\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?"
CELL_SECONDS = 300  # longest that one cell may take, on a busy machine


def run_notebook(path):
    """The notebook at `path`, executed in a kernel of its own. A cell that fails raises CellExecutionError."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=CELL_SECONDS, resources={"metadata": {"path": path.parent}})
    client.execute()
    return notebook


def text_of(cell):
    """What a code cell prints and returns, without pictures."""
    parts = [output.get("text", output.get("data", {}).get("text/plain", "")) for output in cell.get("outputs", ())]
    return "".join(part for part in parts if not part.startswith("<Figure"))


def assert_same_text(text, wanted):
    """The same words, and numbers that differ by rounding only: another CPU adds in another order."""
    assert re.sub(NUMBER, "#", text) == re.sub(NUMBER, "#", wanted)
    pairs = zip(re.findall(NUMBER, text), re.findall(NUMBER, wanted), strict=True)
    for a, b in ((float(a.replace(",", "")), float(b.replace(",", ""))) for a, b in pairs):
        assert math.isclose(a, b, rel_tol=0.02, abs_tol=0.002), (text, wanted)


@pytest.mark.notebooks
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run_and_print_what_is_committed(path, monkeypatch):
    """A cell tagged `measured` prints times, or what a trained model does: it must run, its text is not compared."""
    nbformat = pytest.importorskip("nbformat")
    for name in ("CHECKPOINT", "PICTURES"):
        monkeypatch.delenv(name, raising=False)
    committed, fresh = nbformat.read(path, as_version=4), run_notebook(path)
    for old, new in zip(committed.cells, fresh.cells, strict=True):
        assert bool(old.get("outputs")) == bool(new.get("outputs")), old.source
        if old.cell_type == "code" and "measured" not in old.metadata.get("tags", ()):
            assert_same_text(text_of(new), text_of(old))


def test_notebooks_are_small_and_have_no_paths_of_a_machine():
    for path in NOTEBOOKS:
        text = path.read_text(encoding="utf-8")
        assert len(text) < 600_000 and not re.search(r"/home/|/root/|/Users/|Traceback", text), path.name


@pytest.mark.draws
def test_the_loss_curve_of_a_stage_leaves_the_backend_of_a_notebook_alone(tmp_path):
    from nanodoge.run import plot_loss  # here, since as a program this file does not find it

    before = matplotlib.get_backend()
    matplotlib.use("svg")
    try:
        plot_loss(HERE / "results" / "stories.csv", tmp_path / "loss.png")
        assert matplotlib.get_backend() == "svg" and (tmp_path / "loss.png").stat().st_size > 1000
    finally:
        matplotlib.use(before)


# ---- The guided reading


def squeezed(text):
    return re.sub(r"\s+", "", text)


def test_code_that_the_tour_quotes_stands_in_the_files():
    """A block that begins with ```py FILE holds lines of FILE, whitespace apart. A line `...` stands for lines left
    out."""
    blocks = re.findall(r"^```py (\S+)\n(.*?)^```", TOUR.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) > 15
    for name, block in blocks:
        source, start = squeezed((HERE / name).read_text(encoding="utf-8")), 0
        for part in map(squeezed, re.split(r"^\s*\.\.\.\n", block, flags=re.MULTILINE)):
            start = source.find(part, start) + len(part)
            assert start >= len(part), f"docs/tour.md quotes what {name} does not say, or in another order:\n{block}"


def test_worked_examples_of_the_tour_print_what_it_says():
    """Blocks that begin with ```pycon are sessions; each continues the one before it."""
    blocks = re.findall(r"^```pycon\n(.*?)^```", TOUR.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    session = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, "tour.md", str(TOUR), 0)
    report = []
    doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(session, out=report.append)
    assert len(session.examples) > 20 and not report, "".join(report)


if __name__ == "__main__":
    import nbformat

    if sys.argv[1:]:
        os.environ["CHECKPOINT"] = str(Path(sys.argv[1]).resolve())
    if folder := os.environ.get("PICTURES"):
        os.environ["PICTURES"] = str(Path(folder).resolve())
    for notebook in NOTEBOOKS:
        done = run_notebook(notebook)
        for cell in done.cells:
            cell.metadata.pop("execution", None)  # times, which would change every file at every run
        if not sys.argv[1:]:
            nbformat.write(done, notebook)
        print(notebook.name)
