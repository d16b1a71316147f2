"""What a logits processor keeps from call to call: rows of earlier steps, and rows that a call has left unfinished."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_accel.structured.dynamic_rows import DynamicRows
from hf_accel.structured.mask_table import DONE, MaskTable
from hf_accel.structured.row_memory import RowMemory, row_hashes
from hf_accel.structured.token_fsm import TokenFsm


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


def state_after(table: MaskTable, fsm: TokenFsm, token_ids: Sequence[int]) -> int:
    """The state of a row whose output begins with these tokens; one that is not allowed ends it."""
    state, count = fsm.start, 0
    for token_id in token_ids:
        if state <= DONE or not fsm.allows(state, token_id, count):
            return DONE
        state, count = fsm.advance(state, token_id, count)
    return table.global_state(fsm, state, count)
