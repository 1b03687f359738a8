"""Figures that stand in sentences of the documents are those of the logs in results/. (Whole tables: test_docs.py.)"""

import csv

import pytest

from nanodoge.options import HERE


def column(name, key):
    with open(HERE / "results" / f"{name}.csv", newline="", encoding="utf-8") as file:
        return [float(row[key]) for row in csv.DictReader(file) if row[key]]


FIGURES = {  # page: the text that must stand there
    "README.md": [f"ends at {column('stories', 'val_bpb')[-1]:.2f} bits per byte"],
    "docs/evaluation.md": [
        f"| {column('stories', 'val_bpb')[-1]:.3f} ([log](../results/stories.csv))",
        f"| {column('shakespeare', 'val_bpb')[-1]:.2f} ([log](../results/shakespeare.csv))",
        f"| {column('stdlib', 'val_bpb')[-1]:.2f} ([log](../results/stdlib.csv))",
        "| {:.1f} (it has never seen such a text) | **{:.2f}** (after the first 50 steps {:.2f})".format(
            *(column("gsm8k", "val_loss")[i] for i in (0, -1, 1))
        ),
        f"**{column('gsm8k-preferences', 'val_accuracy')[-1]:.0%}**".replace("%", " %"),
    ],
    "docs/internals.md": [
        f"{sum(column('crash', 'tries')):.0f} tries, {sum(column('crash', 'inside_a_save')):.0f} of them there"
    ],
}


@pytest.mark.parametrize("page", FIGURES)
def test_figures_are_those_of_the_logs(page):
    text = (HERE / page).read_text(encoding="utf-8")
    assert [figure for figure in FIGURES[page] if figure not in text] == []
