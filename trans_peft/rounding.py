"""Compare two computations of the same result, whose sums are rounded in another order."""

import torch

__all__ = ["difference_beyond_rounding", "rounding_tolerance"]


def rounding_tolerance(x: torch.Tensor, roundings: int = 4) -> float:
    """Return the relative difference that rounding may cause between two results like x.

    `roundings` is the number of roundings in the dtype of x: 4 for one module. Below it is a floor
    for sums in fp32, which is higher where torch may multiply in TF32.
    """
    tf32 = x.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
    return max(8e-3 if tf32 else 1e-3, roundings * torch.finfo(x.dtype).eps)


def difference_beyond_rounding(
    found: torch.Tensor, expected: torch.Tensor, roundings: int = 4
) -> float | None:
    """Return |found - expected| / |expected| if it exceeds rounding, else None.

    The result is infinite for another shape, and NaN if a value is not finite.
    """
    if found.shape != expected.shape:
        return float("inf")
    scale = expected.float().norm()
    distance = (found.float() - expected.float()).norm()
    if distance <= rounding_tolerance(expected, roundings) * scale:
        return None
    return float(distance / scale)
