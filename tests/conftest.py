"""The same numbers in every run, and one thread a test process: on a shared machine the barriers of a second one cost
more than it brings."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for the network

import pytest
import torch


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
