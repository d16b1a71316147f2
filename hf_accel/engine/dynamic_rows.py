"""Rows of a batch whose constraint the host keeps: their masks are computed from the tokens that it knows.

On CUDA that goes on while the device runs the forward: nothing here waits for it. The loops see to it that the host knows all
tokens of such a row (`Request.needs_host`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from hf_accel.structured.dynamic import DynamicGrammar, Matcher
from hf_accel.structured.dynamic_rows import HostMasks

if TYPE_CHECKING:
    from hf_accel.engine.logits_edits import SamplingRow


class DynamicConstraint:
    """One request's grammar and where its output stands."""

    def __init__(self, grammar: DynamicGrammar) -> None:
        self._grammar = grammar
        self._matcher: Matcher | None = None

    def after(self, row: SamplingRow, length: int) -> Matcher:
        """Where the row stands after `length` tokens; the host may have taken some back since the last time."""
        output = row.token_ids[row.num_prompt_tokens : length]
        assert len(output) == length - row.num_prompt_tokens, "a dynamic row ran ahead of the host"
        if self._matcher is None:
            self._matcher = self._grammar.matcher()
        self._matcher.move_to(output)
        return self._matcher


def mask_dynamic(
    scores: Tensor, rows: Sequence[SamplingRow], lengths: Sequence[int], errors: dict[int, Exception], may_be_lost: bool
) -> Tensor:
    """`scores` [num_rows, vocab_size] with what the rows' dynamic constraints forbid at -inf; itself without such rows.

    Where edits had left a row none of its allowed tokens (`may_be_lost`), it gets them all alike. A row whose constraint has no
    way on is noted in `errors` and left as it is.
    """
    masks = {}
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        if isinstance(row.constraint, DynamicConstraint):
            try:
                masks[i] = row.constraint.after(row, length).mask()
            except ValueError as error:
                errors[i] = error
    if not masks:
        return scores
    found = HostMasks(list(masks.values()), list(masks), len(rows), scores.device)
    return found.masked(scores, may_be_lost=may_be_lost)
