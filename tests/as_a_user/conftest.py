"""Stories of users who know timm and PyTorch and have read the README: whole tasks across parts of the package, by the
real command line where a command is meant, against timm's model of the same weights."""

import pytest
import torch


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32)
