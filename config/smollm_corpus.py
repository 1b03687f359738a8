"""What the published Doge models were pretrained on: four parts web, textbooks, code and mathematics.

    python prepare_data.py --config=config/smollm_corpus.py [--tokenizer=...] [--tokens=...]

The shares are the original's: 70 % web pages that a classifier found educational, 20 % textbooks and stories written
by a language model, 5 % Python files of educational value, 5 % mathematical web pages. Three things differ from the
original: documents are whole (it cut each after 2048 tokens), end in EOS (its did not), and Cosmopedia is plain text
(it was wrapped as a chat). python-edu names its files by their key in the Software Heritage archive (swh:), so each of
them is fetched by itself: the slowest part. Without that line the other shares scale up by themselves.
"""

sources = [
    "hf:HuggingFaceTB/smollm-corpus:fineweb-edu-dedup@0.70",
    "hf:HuggingFaceTB/smollm-corpus:cosmopedia-v2@0.20",
    "swh:HuggingFaceTB/smollm-corpus:python-edu@0.05",
    "hf:HuggingFaceTB/finemath:finemath-4plus@0.05",
]
out = "data/smollm_corpus"
tokens = 4_194_304_000  # 20M: 8,000 steps of 524,288; 60M: 16_777_216_000, 160M: 37_748_736_000, 320M: 67_108_864_000
vocab_size = 32768  # as the Doge tokenizer; --tokenizer=FOLDER of the published one gives the published token ids
val_fraction = 0.0005  # two million tokens, plenty for a loss in three digits
