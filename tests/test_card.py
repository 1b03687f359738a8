"""card.py: the model card that a finished run leaves, as Hugging Face's own reader understands it."""

import pytest
from helpers import TINY, make_data
from huggingface_hub import ModelCard

import train
from nanodoge.card import MARK


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    argv = [*TINY, f"--data={make_data(folder / 'data')}", f"--out_dir={folder / 'out'}"]
    train.main(argv)
    return argv, folder / "out" / "README.md"


def test_the_card_is_read_by_huggingface_hub_and_says_what_the_run_did(run):
    card = ModelCard.load(run[1])
    assert (card.data.library_name, card.data.license) == ("transformers", "unknown")
    assert card.data.tags == ["doge", "nanodoge"] and card.data.pipeline_tag == "text-generation"
    for fact in ("12 steps, 768 tokens", "max_steps=12", "| val_bpb |", "![The loss"):
        assert fact in card.text


def test_only_a_card_of_ours_is_replaced(run):
    argv, path = run
    path.write_text(f"---\n{MARK}\n---\nold")
    train.main([*argv, "--overwrite"])
    assert "12 steps" in path.read_text()
    path.write_text("mine")
    train.main([*argv, "--overwrite"])
    assert path.read_text() == "mine" and not path.with_name("README.md.new").exists()
