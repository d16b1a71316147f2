"""Sampling as Triton kernels: the vocabulary is read once by blocks, then what may be chosen is searched. See `sampling.py`.

No sort. 1: every block of a row gives the highest score and the weight of each group of 32 tokens; blocks fill the chip at one
row too. 2: one program for a row finds a score that the filters' edge cannot be below, from what is known of the groups, and
lists the groups that reach it (or, with no filter, the one group in which the number falls). 3: one program for a row bisects
the edge of top-k, then of top-p, over the listed groups, in the integers that are ordered as floats are, and walks the
distribution. The logits come from memory once, and the listed groups again: about top_k of them, or as many as the tokens
that top-p keeps. A row so flat that top-p keeps most of it has most groups listed, and is read for each step of the bisection.
How a row is divided does not depend on the number of rows, so its result does not either.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .launch import launch
from .row_scores import LOWEST_KEY, float_of, key_of, load_scores, mask_arguments
from .sampling_choice import choose_kernel

_MARGIN = tl.constexpr(1e-5)  # share of the weight that rounding may misplace
_NEGLIGIBLE = tl.constexpr(1e-30)  # a group's share below any random number's resolution


@dataclass(frozen=True)
class Config:
    """How the kernels divide a row; sums are rounded accordingly.

    Attributes:
        group: tokens of a group, 128 bytes of float32; it divides 32.
        groups_of_block: groups that a program of the first kernel reads.
        groups_at_once: groups that the last kernel keeps in registers; it reads more of them again for each step of a search.
    """

    group: int = 32
    groups_of_block: int = 64
    groups_at_once: int = 128


DEFAULT = Config()


@dataclass(frozen=True)
class Sampled:
    """What was chosen, and the edge of what could be: a score beyond `edge_scores`, or equal and its token not before `edge_tokens`."""

    token_ids: torch.Tensor  # [num_rows] int64
    valid: torch.Tensor  # [num_rows] bool
    edge_scores: torch.Tensor  # [num_rows] float32, of logits / temperature; set for rows with top_k, top_p or min_p
    edge_tokens: torch.Tensor  # [num_rows] int32


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    uniform: torch.Tensor,
    bitmask: torch.Tensor | None,
    mask_rows: torch.Tensor | None,
    config: Config = DEFAULT,
) -> Sampled:
    """`sampling.sample`; validates nothing."""
    num_rows, vocab_size = logits.shape
    num_blocks = triton.cdiv(vocab_size, config.group * config.groups_of_block)
    num_groups = num_blocks * config.groups_of_block

    def empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty(num_rows, *shape, dtype=dtype, device=logits.device)

    result = Sampled(empty(torch.int64), empty(torch.bool), empty(torch.float32), empty(torch.int32))
    block_max, block_first = empty(torch.float32, num_blocks), empty(torch.int32, num_blocks)
    group_max, group_sum = empty(torch.float32, num_groups), empty(torch.float32, num_groups)
    listed, num_listed = empty(torch.int32, num_groups), empty(torch.int32)
    highest, total, lowest_key, goal = (
        empty(torch.float32), empty(torch.float32), empty(torch.int32), empty(torch.float64)
    )  # fmt: skip
    masks = mask_arguments(logits, bitmask, mask_rows)
    has = {"HAS_MASK": bitmask is not None, "HAS_MASK_ROWS": mask_rows is not None}
    launch(
        _groups_kernel, (num_rows, num_blocks), logits, temperature, *masks, block_max, block_first, group_max, group_sum,
        logits.stride(0), vocab_size, **has, GROUP=config.group, GROUPS=config.groups_of_block, num_warps=4,
    )  # fmt: skip
    width = triton.next_power_of_2(num_groups)
    launch(
        _list_kernel, (num_rows,), block_max, block_first, group_max, group_sum, temperature, top_k, top_p, min_p, uniform,
        listed, num_listed, highest, total, lowest_key, goal, result.token_ids, result.valid, vocab_size, num_blocks,
        NUM_BLOCKS=triton.next_power_of_2(num_blocks), NUM_GROUPS=width, GROUPS=config.groups_of_block,
        GROUP=config.group, num_warps=min(max(width // 512, 1), 16),
    )  # fmt: skip
    launch(
        choose_kernel, (num_rows,), logits, temperature, top_k, top_p, min_p, uniform, *masks, listed, num_listed, highest,
        total, lowest_key, goal, result.token_ids, result.valid, result.edge_scores, result.edge_tokens, logits.stride(0),
        num_groups, vocab_size, **has, GROUP=config.group, AT_ONCE=config.groups_at_once, num_warps=16,
    )  # fmt: skip
    return result


@triton.jit
def _groups_kernel(
    logits_ptr, temperature_ptr, bitmask_ptr, bitmask_stride, num_words, mask_rows_ptr, block_max_ptr, block_first_ptr,
    group_max_ptr, group_sum_ptr, logits_stride, vocab_size,
    HAS_MASK: tl.constexpr, HAS_MASK_ROWS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Of one block: its highest score (NaN if there is one) and where it is first, or each group's highest score and weight."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    mask_row = row
    if HAS_MASK_ROWS:
        mask_row = tl.load(mask_rows_ptr + row).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    greedy = temperature < 1e-6
    groups = block * GROUPS + tl.arange(0, GROUPS)
    scores, tokens = load_scores(
        logits_ptr + row * logits_stride, bitmask_ptr + mask_row * bitmask_stride, mask_row >= 0, groups, groups >= 0,
        tl.where(greedy, 1.0, temperature), vocab_size, num_words, HAS_MASK, GROUP,
    )  # fmt: skip
    is_nan = scores != scores
    scores = tl.where(is_nan, -float("inf"), scores)
    group_max = tl.max(scores, axis=1)
    highest = tl.max(group_max, axis=0)
    entry = row * tl.num_programs(1) + block
    tl.store(block_max_ptr + entry, tl.where(tl.max(is_nan.to(tl.int32)) > 0, float("nan"), highest))
    if greedy:
        tl.store(block_first_ptr + entry, tl.min(tl.where(scores == highest, tokens, 0x7FFFFFFF)))
    else:
        base = tl.where(highest > -float("inf"), highest, 0.0)
        target = row * tl.num_programs(1) * GROUPS + groups
        tl.store(group_max_ptr + target, group_max)
        tl.store(group_sum_ptr + target, tl.sum(tl.exp(scores - base), axis=1))


@triton.jit
def _list_kernel(
    block_max_ptr, block_first_ptr, group_max_ptr, group_sum_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, uniform_ptr,
    listed_ptr, num_listed_ptr, highest_ptr, total_ptr, lowest_key_ptr, goal_ptr, token_ids_ptr, valid_ptr, vocab_size, num_blocks,
    NUM_BLOCKS: tl.constexpr, NUM_GROUPS: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Chooses for greedy rows; of others lists the groups that hold every token which may be chosen, in order."""
    row = tl.program_id(0).to(tl.int64)
    greedy = tl.load(temperature_ptr + row) < 1e-6
    blocks = tl.arange(0, NUM_BLOCKS)
    entries = row * num_blocks + blocks
    maxima = tl.load(block_max_ptr + entries, mask=blocks < num_blocks, other=-float("inf"))
    is_nan = maxima != maxima
    highest = tl.max(tl.where(is_nan, -float("inf"), maxima), axis=0)
    valid = (tl.max(is_nan.to(tl.int32), axis=0) == 0) & (highest > -float("inf"))
    valid = valid & (greedy | (highest < float("inf")))
    tl.store(valid_ptr + row, valid)
    token = row * 0
    num_listed = tl.max(blocks * 0, axis=0)
    if greedy:
        firsts = tl.load(block_first_ptr + entries, mask=blocks < num_blocks, other=0x7FFFFFFF)
        first = tl.min(tl.where(maxima == highest, firsts, 0x7FFFFFFF), axis=0)
        token = tl.where(valid, first, 0).to(tl.int64)
    elif valid:
        num_groups = num_blocks * GROUPS
        groups = tl.arange(0, NUM_GROUPS)
        inside = groups < num_groups
        group_max = tl.load(group_max_ptr + row * num_groups + groups, mask=inside, other=-float("inf"))
        own_max = tl.load(block_max_ptr + row * num_blocks + groups // GROUPS, mask=inside, other=-float("inf"))
        sums = tl.load(group_sum_ptr + row * num_groups + groups, mask=inside, other=0.0) * tl.exp(own_max - highest)
        top_k, top_p, min_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
        has_k, has_p = (top_k > 0) & (top_k < vocab_size), top_p < 1.0
        listed_row = listed_ptr + row * num_groups
        tl.store(highest_ptr + row, highest)
        if has_k | has_p | (min_p > 0.0):
            total = tl.sum(sums, axis=0)
            key = _lowest_key(group_max, sums, total, highest, tl.where(has_k, top_k, 0), top_p, GROUP)
            # With both, top-p's total has what min-p drops in it.
            floor = tl.where(has_k & has_p, 0.0, min_p)
            reaches = (
                (group_max > -float("inf")) & (group_max >= float_of(key)) & (tl.exp(group_max - highest) >= floor)
            )
            tl.store(listed_row + tl.cumsum(reaches.to(tl.int32), axis=0) - 1, groups, mask=reaches)
            num_listed = tl.sum(reaches.to(tl.int32), axis=0)
            tl.store(total_ptr + row, total)
            tl.store(lowest_key_ptr + row, key.to(tl.int32))
        else:
            group, goal = _group_at(
                sums, tl.load(uniform_ptr + row), block_max_ptr + row * num_blocks, group_sum_ptr + row * num_groups, highest,
                NUM_BLOCKS, GROUPS,
            )  # fmt: skip
            tl.store(listed_row, group)
            tl.store(goal_ptr + row, goal)
            num_listed = num_listed + 1
    tl.store(token_ids_ptr + row, token)
    tl.store(num_listed_ptr + row, num_listed)


@triton.jit
def _lowest_key(group_max, sums, total, highest, top_k, top_p, GROUP: tl.constexpr):
    """A key that the edge of the kept tokens is not below; only its upper half is searched."""
    start = (LOWEST_KEY >> 16) + key_of(highest) * 0
    top = key_of(highest) >> 16
    edge, high = start, top
    if top_k > 0:  # so many groups reach it, so at least so many tokens do; top-p's total is of these
        while edge < high:
            middle = (edge + high + 1) >> 1
            enough = tl.sum((group_max >= float_of(middle << 16)).to(tl.int32), axis=0) >= top_k
            edge = tl.where(enough, middle, edge)
            high = tl.where(enough, high, middle - 1)
    elif top_p < 1.0:  # no more can be below it than the share that top-p must drop
        share = (1.0 - top_p - _MARGIN) * total
        others = tl.maximum(sums - tl.exp(group_max - highest), 0.0)
        while edge < high:
            middle = (edge + high + 1) >> 1
            bound = float_of(middle << 16)
            below = tl.minimum(others, (GROUP - 1) * tl.exp(bound - highest))
            fits = tl.sum(tl.where(group_max >= bound, below, sums), axis=0) <= share
            edge = tl.where(fits, middle, edge)
            high = tl.where(fits, high, middle - 1)
    return tl.where(edge > start, edge << 16, LOWEST_KEY)


@triton.jit
def _group_at(sums, uniform, block_max_row, group_sum_row, highest, NUM_BLOCKS: tl.constexpr, GROUPS: tl.constexpr):
    """The group in which a share of the whole weight falls, and the weight that is left to go inside it."""
    of_blocks = tl.sum(tl.reshape(sums, [NUM_BLOCKS, GROUPS]), axis=1).to(tl.float64)
    goal = uniform * tl.sum(of_blocks, axis=0)
    block, left = _place_at(of_blocks, goal, NUM_BLOCKS)
    of_groups = tl.load(group_sum_row + block * GROUPS + tl.arange(0, GROUPS))
    of_groups *= tl.exp(tl.load(block_max_row + block) - highest)
    group, left = _place_at(of_groups.to(tl.float64), left, GROUPS)
    return block * GROUPS + group, left


@triton.jit
def _place_at(weights, goal, SIZE: tl.constexpr):
    """Where the sum of weights exceeds `goal`, the last place that counts if rounding keeps it from that; and what is left to go."""
    places = tl.arange(0, SIZE)
    up_to = tl.cumsum(weights, axis=0)
    possible = weights > _NEGLIGIBLE
    hit = tl.min(tl.where(possible & (up_to > goal), places, SIZE), axis=0)
    place = tl.where(hit < SIZE, hit, tl.max(tl.where(possible, places, 0), axis=0))
    return place, goal - tl.sum(tl.where(places == place, up_to - weights, 0.0), axis=0)
