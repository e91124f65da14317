"""float32 numbers of which a matrix holds the upper part: what training in 16 bits needs so that small steps add up.

Rounded to bfloat16, a weight is the upper half of a float32 one, up to a carry. The other 16 bits are kept beside it, and the two
together are the float32 number again, bit for bit, in half the room of a float32 copy.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

LOW = {torch.float32: None, torch.bfloat16: torch.int16, torch.float16: torch.float32}


def joined(stored: Float[Tensor, " k"], low: Tensor | None) -> Float[Tensor, " k"]:
    """The float32 numbers that stored values and what `split` kept beside them stand for; with zeros beside, the stored values themselves."""
    if low is None:
        return stored
    if stored.dtype == torch.bfloat16:
        return stored.view(torch.int16).to(torch.int32).bitwise_left_shift_(16).add_(low).view(torch.float32)
    return stored.float().add_(low)


def split(
    values: Float[Tensor, " k"], dtype: torch.dtype
) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"] | Int[Tensor, " k"] | None]:
    """float32 values as they are stored in `dtype`, and what is lost by that: of `LOW[dtype]`, None where nothing is.

    bfloat16 is rounded to nearest, and a tie, which is one number in 65,536, away from zero.
    """
    if dtype == torch.float32:
        return values, None
    if dtype == torch.bfloat16:
        bits = values.view(torch.int32)
        upper = bits.add(0x8000).bitwise_right_shift_(16)
        low = bits.sub(upper.bitwise_left_shift(16)).to(torch.int16)
        return upper.to(torch.int16).view(torch.bfloat16), low
    stored = values.to(dtype)
    return stored, values - stored.float()
