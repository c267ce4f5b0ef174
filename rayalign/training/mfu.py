"""The share of its GPUs' peak that a run reaches, by a count that is cheap and never too high."""

from torch import nn

from rayalign.policy.policy import Policy

PEAK_TFLOPS = {
    "H200 NVL": 835.0,
    "H200": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "RTX 4090": 165.0,
}
"""Dense bfloat16 with float32 sums, in the makers' data sheets; the first name that the device's name contains counts."""


def peak_tflops(device_name: str) -> float | None:
    """The peak of a card, by the name that torch gives it; None where it is not in the table."""
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in device_name), None)


def flops_per_token(policy: Policy) -> float:
    """Operations that training must do for each token: two for each weight of the language model's matrix products forward, two
    backward for the inputs, and two more where the weight is trained.

    What else a step computes is left out, so that the share is too low rather than too high: the vision tower, the output head,
    attention's scores, a reference pass, and what gradient checkpointing computes again.
    """
    linears = [module for module in policy.base.get_decoder().modules() if isinstance(module, nn.Linear)]
    return float(sum(m.in_features * m.out_features * (6 if m.weight.requires_grad else 4) for m in linears))
