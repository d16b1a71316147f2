"""What a logits processor keeps from call to call: rows of earlier steps, and rows that a call has left unfinished."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_accel.structured.dynamic_rows import DynamicRows
from hf_accel.structured.row_memory import RowMemory, row_hashes


class CallHistory:
    """What one thread's calls have left behind."""

    def __init__(self) -> None:
        self.dynamic = DynamicRows()
        self._memory: RowMemory | None = None

    def memory(self, device: torch.device) -> RowMemory:
        """Of rows on a device; another device begins anew."""
        if self._memory is None or self._memory.device != device:
            self._memory = RowMemory(device)
        return self._memory


class UnfinishedRows:
    """Rows that a call has left, all tokens known, and where their outputs begin."""

    def __init__(self, sequences: Tensor, num_prompt_tokens: int) -> None:
        self.sequences, self.num_prompt_tokens = sequences, num_prompt_tokens
        self.hashes = _hashes(sequences[:, :-1])

    def holds(self, input_ids: Tensor) -> bool:
        """Whether one of these rows [num_rows, length] goes on from one of ours."""
        if input_ids.shape[1] != self.sequences.shape[1] or input_ids.device != self.sequences.device:
            return False
        return bool((_hashes(input_ids[:, :-1])[:, None] == self.hashes[None]).any())


def _hashes(ids: Tensor) -> Tensor:
    return row_hashes(ids.long(), torch.zeros(len(ids), dtype=torch.long, device=ids.device))
