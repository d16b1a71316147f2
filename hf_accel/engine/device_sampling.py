"""Chooses tokens on the device: SamplingParams and numbers of a batch as what `hf_accel_kernels.sampling` takes.

Owns how a batch's settings reach the device: one copy from pinned memory, awaited by nobody. Knows nothing of requests.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hf_accel.sampling_params import SamplingParams
from hf_accel_kernels import sampling

_MOST = (1 << 31) - 1


def choose(scores: Tensor, params: Sequence[SamplingParams], numbers: Sequence[float]) -> tuple[Tensor, Tensor]:
    """One token for each row: argmax for greedy ones, others filtered and drawn. No host sync.

    Args:
        scores: [num_rows, vocab_size] float32, bfloat16 or float16, after all edits; not changed.
        params: one for each row.
        numbers: one for each row, in [0, 1); greedy rows' mean nothing.

    Returns:
        token_ids [num_rows] int64 and valid [num_rows] bool on the device of `scores`; 0 where a row has no valid choice.
    """
    if all(p.greedy for p in params):
        return sampling.argmax(scores)
    return sampling.sample(scores, *settings_on(scores.device, params, numbers))


def settings_on(
    device: torch.device, params: Sequence[SamplingParams], numbers: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """temperature (0 for greedy rows), top_k, top_p, min_p and uniform of the rows, as `sampling.sample` takes them."""
    num_rows = len(params)
    buffer = torch.empty(num_rows * 24, dtype=torch.uint8, pin_memory=device.type == "cuda")
    host = buffer.numpy()
    host[: num_rows * 8].view(np.float64)[:] = numbers
    of_rows = host[num_rows * 8 :].reshape(4, num_rows * 4)
    of_rows[0].view(np.float32)[:] = [0.0 if p.greedy else p.temperature for p in params]
    of_rows[1].view(np.float32)[:] = [p.top_p for p in params]
    of_rows[2].view(np.float32)[:] = [p.min_p for p in params]
    of_rows[3].view(np.int32)[:] = [min(p.top_k, _MOST) for p in params]
    on_device = buffer.to(device, non_blocking=True)
    uniform = on_device[: num_rows * 8].view(torch.float64)
    temperature, top_p, min_p = on_device[num_rows * 8 : num_rows * 20].view(torch.float32).view(3, num_rows)
    return temperature, on_device[num_rows * 20 :].view(torch.int32), top_p, min_p, uniform
