"""A linear layer whose products are of eight-bit numbers."""

from torch import Tensor

from moe_compile.ops import fp8
from moe_compile.ops.canonical import canonical


@canonical
def fp8_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, recipe: fp8.Recipe = "current"
) -> Tensor:
    """x @ weight.T + bias, of numbers that are rounded to eight bits first; not exact.

    Args:
        x: [..., K].
        weight: [N, K].
        bias: [N].
        recipe: `"current"`: a scale for each tensor; gradients are e5m2, the rest is e4m3.
            `"blockwise"`: e4m3 with a scale for 128 numbers that are multiplied with others, and
            for 128 x 128 of the weight.

    Returns:
        [..., N] in x's dtype, or autocast's; sums are of float32.

    Source: Micikevicius et al. 2022, arXiv:2209.05433; DeepSeek-AI 2024, arXiv:2412.19437.
    """
    return fp8.linear(fp8.product, x, weight, bias, recipe)
