"""The last of the sampling kernels: the filters' edge among the listed groups of a row, and the draw. See `triton_ops/sampling.py`.

A row's `source`, what its scores are read by: (listed groups, how many, logits, mask, whether it has one, temperature,
vocab_size, words of a mask).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .row_scores import float_of, key_of, load_scores

_NONE = tl.constexpr(0x7FFFFFFF)

# What `_measure` adds up over the listed tokens.
_AT_LEAST = tl.constexpr(0)  # tokens of at least the score
_WEIGHT_AT_LEAST = tl.constexpr(1)  # their weight
_WEIGHT_ABOVE = tl.constexpr(2)  # weight of those above the score
_EQUAL_FROM = tl.constexpr(3)  # tokens of just the score from a token on


@triton.jit
def choose_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, uniform_ptr, bitmask_ptr, bitmask_stride, num_words,
    mask_rows_ptr, listed_ptr, num_listed_ptr, highest_ptr, total_ptr, lowest_key_ptr, goal_ptr, token_ids_ptr, valid_ptr,
    edge_scores_ptr, edge_tokens_ptr, logits_stride, num_groups, vocab_size,
    HAS_MASK: tl.constexpr, HAS_MASK_ROWS: tl.constexpr, GROUP: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Chooses the token of a row that has groups listed; one program for a row."""
    row = tl.program_id(0).to(tl.int64)
    num_listed = tl.load(num_listed_ptr + row)
    if num_listed == 0:
        return
    mask_row = row
    if HAS_MASK_ROWS:
        mask_row = tl.load(mask_rows_ptr + row).to(tl.int64)
    temperature, min_p = tl.load(temperature_ptr + row), tl.load(min_p_ptr + row)
    top_k, top_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
    top_k = tl.where(top_k < vocab_size, top_k, 0)
    highest = tl.load(highest_ptr + row)
    logits_row = logits_ptr + row * logits_stride
    words_row, masked = bitmask_ptr + mask_row * bitmask_stride, mask_row >= 0
    source = (
        listed_ptr + row * num_groups, num_listed, logits_row, words_row, masked, temperature, vocab_size, num_words
    )  # fmt: skip
    edge, first = highest * 0.0 - float("inf"), num_listed * 0
    group, goal = tl.load(source[0]), tl.load(uniform_ptr + row)
    if (top_k > 0) | (top_p < 1.0) | (min_p > 0.0):
        low, total = tl.load(lowest_key_ptr + row).to(tl.int64), tl.load(total_ptr + row)
        edge, first = _edge(top_k, top_p, low, total, highest, source, HAS_MASK, GROUP, AT_ONCE)
        group, goal = _group_at(goal, edge, first, min_p, highest, source, HAS_MASK, GROUP, AT_ONCE)
    else:
        goal = tl.load(goal_ptr + row)
    groups = group + tl.arange(0, 1)
    scores, tokens = load_scores(
        logits_row, words_row, masked, groups, groups >= 0, temperature, vocab_size, num_words, HAS_MASK, GROUP
    )
    weights = _kept_weights(scores, tokens, edge, first, min_p, highest)
    up_to = tl.cumsum(weights.to(tl.float64), axis=1)
    possible = weights > 0.0
    token = tl.min(tl.where(possible & (up_to > goal), tokens, _NONE))
    last = tl.max(tl.where(possible, tokens, -1))  # where rounding puts the goal past the group's own sum
    token = tl.where(token == _NONE, last, token)
    tl.store(token_ids_ptr + row, tl.maximum(token, 0).to(tl.int64))
    tl.store(valid_ptr + row, token >= 0)
    tl.store(edge_scores_ptr + row, edge)
    tl.store(edge_tokens_ptr + row, first)


@triton.jit
def _edge(
    top_k, top_p, low, total, highest, source, HAS_MASK: tl.constexpr, GROUP: tl.constexpr, AT_ONCE: tl.constexpr
):
    """Lowest score that top-k and top-p keep, and the first token of those that have just it which is kept."""
    scores, tokens = _load_listed(source, 0, HAS_MASK, GROUP, AT_ONCE)
    zero = source[1] * 0
    top = key_of(highest)
    mass = total.to(tl.float64)
    if top_k > 0:
        goal = top_k.to(tl.float64)
        low = _highest_with(
            _AT_LEAST, goal, low, top, highest, scores, tokens, highest, source, HAS_MASK, GROUP, AT_ONCE
        )
        if top_p < 1.0:
            mass = _measure(
                _WEIGHT_AT_LEAST, float_of(low), zero, scores, tokens, highest, source, HAS_MASK, GROUP, AT_ONCE
            )
    first = zero
    if top_p < 1.0:
        goal = mass * top_p.to(tl.float64)
        low = _highest_with(
            _WEIGHT_AT_LEAST, goal, low, top, highest, scores, tokens, highest, source, HAS_MASK, GROUP, AT_ONCE
        )
        edge = float_of(low)
        above = _measure(_WEIGHT_ABOVE, edge, zero, scores, tokens, highest, source, HAS_MASK, GROUP, AT_ONCE)
        num_equal = _measure(_EQUAL_FROM, edge, zero, scores, tokens, highest, source, HAS_MASK, GROUP, AT_ONCE)
        # Of equal scores the last tokens are kept, as a stable ascending sort has it: as many as it takes to reach the goal.
        needed = tl.maximum(tl.ceil((goal - above) / tl.exp(edge - highest).to(tl.float64)), 1.0)
        if needed < num_equal:
            end = (source[6] - 1 + zero).to(tl.int64)
            first = _highest_with(
                _EQUAL_FROM, needed, end * 0, end, edge, scores, tokens, highest, source, HAS_MASK, GROUP, AT_ONCE
            ).to(tl.int32)
    return float_of(low), first


@triton.jit
def _group_at(
    uniform, edge, first, min_p, highest, source,
    HAS_MASK: tl.constexpr, GROUP: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """The group in which a share of the kept weight falls, and the weight that is left to go inside it."""
    num_listed = source[1]
    total = uniform * 0.0
    for start in range(0, num_listed, AT_ONCE):
        total += tl.sum(_group_weights(start, edge, first, min_p, highest, source, HAS_MASK, GROUP, AT_ONCE), axis=0)
    goal = uniform * total
    carried, before = uniform * 0.0, uniform * 0.0
    place, last = num_listed * 0 + _NONE, num_listed * 0
    for start in range(0, num_listed, AT_ONCE):
        sums = _group_weights(start, edge, first, min_p, highest, source, HAS_MASK, GROUP, AT_ONCE)
        places = start + tl.arange(0, AT_ONCE)
        up_to = carried + tl.cumsum(sums, axis=0)
        hit = tl.min(tl.where((up_to > goal) & (sums > 0.0), places, _NONE), axis=0)
        is_first = (place == _NONE) & (hit != _NONE)
        before = tl.where(is_first, tl.sum(tl.where(places == hit, up_to - sums, 0.0), axis=0), before)
        place = tl.minimum(place, hit)
        last = tl.maximum(last, tl.max(tl.where(sums > 0.0, places, 0), axis=0))
        carried += tl.sum(sums, axis=0)
    left = tl.where(place == _NONE, float("inf"), goal - before)
    return tl.load(source[0] + tl.where(place == _NONE, last, place)), left


@triton.jit
def _group_weights(
    start, edge, first, min_p, highest, source,
    HAS_MASK: tl.constexpr, GROUP: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """[AT_ONCE] float64, kept weight of the listed groups from `start` on."""
    scores, tokens = _load_listed(source, start, HAS_MASK, GROUP, AT_ONCE)
    return tl.sum(_kept_weights(scores, tokens, edge, first, min_p, highest), axis=1).to(tl.float64)


@triton.jit
def _kept_weights(scores, tokens, edge, first, min_p, highest):
    """exp(score - highest) of the tokens that the filters keep, 0 for others."""
    weights = tl.exp(scores - highest)
    kept = ((scores > edge) | ((scores == edge) & (tokens >= first))) & (weights >= min_p)
    return tl.where(kept, weights, 0.0)


@triton.jit
def _load_listed(source, start, HAS_MASK: tl.constexpr, GROUP: tl.constexpr, AT_ONCE: tl.constexpr):
    """Scores and tokens [AT_ONCE, GROUP] of the listed groups from `start` on."""
    listed_row, num_listed, logits_row, words_row, masked, temperature, vocab_size, num_words = source
    places = start + tl.arange(0, AT_ONCE)
    wanted = places < num_listed
    groups = tl.load(listed_row + places, mask=wanted, other=0)
    return load_scores(
        logits_row, words_row, masked, groups, wanted, temperature, vocab_size, num_words, HAS_MASK, GROUP
    )


@triton.jit
def _highest_with(
    KIND: tl.constexpr, goal, low, high, value, scores, tokens, highest, source,
    HAS_MASK: tl.constexpr, GROUP: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """The highest key (`_EQUAL_FROM`: token) in [low, high] whose measure reaches `goal`; `low`'s is taken to do so."""
    while low < high:
        middle = (low + high + 1) >> 1
        if KIND == _EQUAL_FROM:
            measured = _measure(
                KIND, value, middle.to(tl.int32), scores, tokens, highest, source, HAS_MASK, GROUP, AT_ONCE
            )
        else:
            measured = _measure(
                KIND, float_of(middle), source[1] * 0, scores, tokens, highest, source, HAS_MASK, GROUP, AT_ONCE
            )
        low = tl.where(measured >= goal, middle, low)
        high = tl.where(measured >= goal, high, middle - 1)
    return low


@triton.jit
def _measure(
    KIND: tl.constexpr, value, first, scores, tokens, highest, source,
    HAS_MASK: tl.constexpr, GROUP: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """A sum over all listed groups, float64; `scores` and `tokens` are the first of them."""
    summands = _summands(KIND, value, first, scores, tokens, highest)
    for start in range(AT_ONCE, source[1], AT_ONCE):  # added up in place: nothing to wait for between loads
        more_scores, more_tokens = _load_listed(source, start, HAS_MASK, GROUP, AT_ONCE)
        summands += _summands(KIND, value, first, more_scores, more_tokens, highest)
    return tl.sum(summands).to(tl.float64)


@triton.jit
def _summands(KIND: tl.constexpr, value, first, scores, tokens, highest):
    """float32, in which numbers of tokens are exact too."""
    if KIND == _AT_LEAST:
        return (scores >= value).to(tl.float32)
    elif KIND == _WEIGHT_AT_LEAST:
        return tl.where(scores >= value, tl.exp(scores - highest), 0.0)
    elif KIND == _WEIGHT_ABOVE:
        return tl.where(scores > value, tl.exp(scores - highest), 0.0)
    else:
        return ((scores == value) & (tokens >= first)).to(tl.float32)
