"""linear_residual beyond the contract: dropped samples, bad input."""

import pytest
import torch
from samples import BY_NAME, bad_call

pytestmark = pytest.mark.usefixtures("triton_backend")


def test_dropped_samples_pass_through(device):
    tensors = BY_NAME["linear_residual"].tensors(device=device)
    out = BY_NAME["linear_residual"].run(tensors)
    assert torch.equal(out[1], tensors["residual"][1])
    assert not torch.equal(out[0], tensors["residual"][0])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"residual": torch.zeros(2, 21, 25)}, ValueError, "residual must have shape"),
        ({"layer_scale": torch.zeros(25)}, ValueError, "layer_scale must have shape"),
        ({"drop_path_scale": torch.zeros(3)}, ValueError, r"drop_path_scale must have shape \(B,\)"),
        ({"drop_path_scale": torch.ones(2, requires_grad=True)}, ValueError, "not differentiable"),
    ],
)
def test_bad_input(changes, error, message):
    with pytest.raises(error, match=message):
        bad_call("linear_residual", changes)
