"""layer_norm_linear beyond the contract: bad input. What it shares with layer_norm_mlp is in that op's file."""

import pytest
import torch
from samples import bad_call

pytestmark = pytest.mark.usefixtures("triton_backend")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weight": torch.zeros(40, 25)}, ValueError, r"weight must have shape \(O, D\) with 24"),
        ({"bias": torch.zeros(41)}, ValueError, r"bias must have shape \(O,\) = \(40,\)"),
        ({"x": torch.zeros(2, 24).bfloat16()}, TypeError, "x is torch.bfloat16, but weight is torch"),
        ({"bias": torch.zeros(40).half()}, TypeError, "bias is torch.float16, but weight is torch"),
    ],
)
def test_bad_input(changes, error, message):
    with pytest.raises(error, match=message):
        bad_call("layer_norm_linear", changes)
