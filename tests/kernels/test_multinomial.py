"""`multinomial` against torch.multinomial: the same ids and the same generator afterwards, bit for bit."""

from __future__ import annotations

import random

import pytest
import torch

from hf_accel_kernels import multinomial as module
from hf_accel_kernels.multinomial import multinomial

WORDS = 624


@pytest.fixture
def native():
    function = module._native()
    if function is None:
        pytest.skip("the C++ ops are not built here")
    return function


@pytest.fixture(autouse=True)
def _keep_default_generator():
    with torch.random.fork_rng(devices=[]):
        yield


def _probs(rng: random.Random, num_rows: int, vocab_size: int, kept: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rng.randrange(1 << 40))
    scores = torch.randn((num_rows, vocab_size), generator=generator) * rng.choice([0.1, 1.0, 4.0, 20.0])
    if kept is not None:
        scores.masked_fill_(scores < scores.topk(min(kept, vocab_size)).values[:, -1:], float("-inf"))
    return scores.softmax(dim=-1)


def _both(function, probs: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """Draw from `state` natively and with torch; everything must be equal. Returns the ids."""
    ours, theirs = torch.Generator(), torch.Generator()
    ours.set_state(state)
    theirs.set_state(state)
    ids = module._draw(function, probs, ours)
    expected = torch.multinomial(probs, num_samples=1, generator=theirs)
    assert ids is not None and ids.dtype == expected.dtype and ids.shape == expected.shape
    assert torch.equal(ids, expected)
    assert torch.equal(ours.get_state(), theirs.get_state())
    return ids


def _state(seed: int, used_words: int = 0, cached_normal: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if cached_normal:
        torch.randn(3, generator=generator)
        torch.randn(1, generator=generator, dtype=torch.float64)
    if used_words:
        torch.rand(used_words, generator=generator)
    return generator.get_state()


@pytest.mark.parametrize("kept", [1, 5, 40, None])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 16), (3, 100), (2, 311), (4, 313), (2, 5003)])
def test_ids_and_state_are_torchs(native, shape, kept):
    rng = random.Random(f"{shape} {kept}")
    for _ in range(30):
        state = _state(rng.randrange(1 << 62), rng.randrange(1500), rng.random() < 0.5)
        _both(native, _probs(rng, *shape, kept), state)


@pytest.mark.parametrize("kept", [40, None])
@pytest.mark.parametrize("shape", [(8, 32000), (2, 50257)])
def test_large_vocabularies(native, shape, kept):
    rng = random.Random(f"{shape} {kept}")
    for _ in range(5):
        _both(native, _probs(rng, *shape, kept), _state(rng.randrange(1 << 62), rng.randrange(1500)))


def test_every_position_in_a_block(native):
    rng = random.Random(1)
    for used in [*range(8), *range(WORDS - 20, WORDS + 8), *range(2 * WORDS - 3, 2 * WORDS + 3)]:
        _both(native, _probs(rng, 2, 9), _state(used, used, cached_normal=used % 3 == 0))


def test_ids_spread_over_the_row(native):
    """The comparisons above say something: the draws are not all one id."""
    probs = torch.full((200, 50), 0.02)
    ids = _both(native, probs, _state(3))
    assert ids.unique().numel() > 30


@pytest.mark.parametrize("scale", [1.0, 3e38, 1e-37, 1e-42, 1e-45])
def test_weights_that_are_no_probabilities(native, scale):
    """Quotients that overflow, underflow and tie; negative zeros."""
    rng = random.Random(f"{scale}")
    for seed in range(40):
        weights = (_probs(rng, 3, 97, rng.choice([2, 20, 97])) > 0).float() * scale
        weights[weights == 0] = -0.0
        _both(native, weights, _state(seed, seed))


def test_flushed_denormals(native):
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    try:
        for seed in range(20):
            weights = torch.rand((3, 65), generator=torch.Generator().manual_seed(seed)) * 1e-38
            weights[:, 3] = 2e-38
            _both(native, weights, _state(seed, seed))
    finally:
        torch.set_flush_denormal(False)


def _untemper(y: int) -> int:
    y ^= y >> 18
    y ^= (y << 15) & 0xEFC60000
    x = y
    for _ in range(5):
        x = y ^ ((x << 7) & 0x9D2C5680)
    y = x & 0xFFFFFFFF
    for _ in range(3):
        x = y ^ (x >> 11)
    return x


def _crafted(words: list[int]) -> torch.Tensor:
    """A generator state whose next outputs are `words`."""
    state = _state(7, used_words=2)
    values = state[24 : 24 + 8 * WORDS].view(torch.int64)
    values[2 : 2 + len(words)] = torch.tensor([_untemper(w) for w in words])
    generator = torch.Generator()
    generator.set_state(state)
    pairs = torch.empty(len(words) // 2, dtype=torch.float64).exponential_(1, generator=generator)
    bits = [((high << 32) | low) & ((1 << 53) - 1) for high, low in zip(words[::2], words[1::2], strict=True)]
    expected = -torch.log1p(-torch.tensor(bits, dtype=torch.float64) * 2.0**-53)
    torch.testing.assert_close(pairs, expected)  # the crafted words are really what torch draws
    return state


def test_uniforms_of_zero_and_almost_one(native):
    """0 / 0 is NaN and wins; p / 0 is infinite; the 11 high bits of a pair do not count."""
    zero, almost_one, smallest = [0xFFE00000, 0], [0xFFFFFFFF] * 2, [0, 1]
    plain = [0x12345, 0x6789ABCD]
    high_only, low_zero = [0, 0xFFFFFFFF], [0x00012345, 0]
    pairs = [plain, zero, almost_one, smallest, plain, zero, high_only, low_zero, [0, 0], plain]
    rng = random.Random(5)
    winners = set()
    for _ in range(60):
        rng.shuffle(pairs)
        weights = torch.tensor([[rng.choice([0.0, 0.0, 0.5, 1e-30, 3e38]) for _ in pairs]])
        weights[0, rng.randrange(len(pairs))] = 1.0
        winner = int(_both(native, weights, _crafted([word for pair in pairs for word in pair])))
        winners.add(bool(weights[0, winner] == 0))
    assert winners == {True, False}


def test_a_pair_of_words_over_the_end_of_a_block(native):
    """The high word's 21 bits are 0, so that everything hangs on the low one: the first of the next block."""
    rng = random.Random(17)
    winners = []
    for seed in range(300):
        state = _state(seed, used_words=WORDS - 1)
        values = state[24 : 24 + 8 * WORDS].view(torch.int64)
        values[WORDS - 1] = _untemper(0xABC00000)
        if seed % 10 == 0:
            values[[0, 1, 397]] = 0  # the next block begins with 0
        winners.append(int(_both(native, torch.tensor([[1.0, 2.0 ** rng.uniform(19, 24)]]), state)))
    assert 50 < sum(winners) < 250


def test_a_torn_state_is_left_to_torch(native):
    """`left` and `next` that do not belong together cannot come from draws, but torch accepts them."""
    state = _state(9, 10)
    state[8:12].view(torch.int32)[0] = 500
    generator, theirs = torch.Generator(), torch.Generator()
    generator.set_state(state)
    theirs.set_state(state)
    probs = torch.full((2, 700), 0.1)
    assert module._draw(native, probs, generator) is None
    assert torch.equal(generator.get_state(), state)
    assert torch.equal(multinomial(probs, generator), torch.multinomial(probs, 1, generator=theirs))


def test_interleaved_with_other_draws_of_the_default_generator(native, monkeypatch):
    rng = random.Random(11)
    tensors = [_probs(rng, rng.randrange(1, 5), rng.randrange(1, 900), rng.choice([3, None])) for _ in range(40)]
    sizes = [rng.randrange(1, 40) for _ in tensors]

    def play(draw):
        torch.manual_seed(1234)
        seen = []
        for probs, n in zip(tensors, sizes, strict=True):
            seen += [draw(probs), torch.rand(n), torch.randn(n), torch.randint(1000, (n,)), torch.randperm(n)]
        return seen, torch.get_rng_state()

    expected, expected_state = play(lambda probs: torch.multinomial(probs, num_samples=1))

    def forbidden(*args, **kwargs):
        raise AssertionError("torch.multinomial was called")

    assert module._checked_native() is not None
    with monkeypatch.context() as patch:
        patch.setattr(torch, "multinomial", forbidden)
        actual, state = play(multinomial)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert torch.equal(state, expected_state)


BAD_ROWS = {
    "nan": [[0.5, float("nan"), 0.5], [1.0, 1.0, 1.0]],
    "inf": [[1.0, 1.0, 1.0], [0.5, float("inf"), 0.5]],
    "negative": [[0.5, -0.5, 0.5], [1.0, 1.0, 1.0]],
    "zero sum": [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]],
}


@pytest.mark.parametrize("probs", [*map(torch.tensor, BAD_ROWS.values()), torch.ones(2, 0), torch.ones(1, 1, 2)])
def test_errors_are_torchs(probs):
    outcomes = []
    for draw in (multinomial, lambda p: torch.multinomial(p, num_samples=1)):
        torch.manual_seed(3)
        with pytest.raises(RuntimeError) as error:
            draw(probs)
        outcomes.append((str(error.value), torch.get_rng_state().tolist()))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize(
    "probs",
    [
        torch.rand(3, 50, dtype=torch.float64),
        torch.rand(3, 50, dtype=torch.bfloat16),
        torch.rand(50, 3).T,
        torch.rand(3, 100)[:, ::2],
        torch.rand(50),
        torch.rand(0, 5),
        torch.nn.Parameter(torch.rand(3, 50)),
    ],
    ids=["float64", "bfloat16", "transposed", "strided", "1-D", "no rows", "subclass"],
)
def test_other_tensors_go_to_torch(probs):
    torch.manual_seed(21)
    actual, state = multinomial(probs), torch.get_rng_state()
    torch.manual_seed(21)
    assert torch.equal(actual, torch.multinomial(probs, num_samples=1))
    assert torch.equal(state, torch.get_rng_state())


def test_without_the_library(monkeypatch):
    monkeypatch.setattr(module, "_checked_native", lambda: None)
    probs = torch.rand(4, 33)
    torch.manual_seed(2)
    actual = multinomial(probs)
    torch.manual_seed(2)
    assert torch.equal(actual, torch.multinomial(probs, num_samples=1))


def test_the_self_check_notices_a_difference_and_draws_from_nobody(native, monkeypatch):
    before = torch.get_rng_state()
    assert module._agrees_with_torch(native)
    assert not module._agrees_with_torch(lambda *args: 0)  # declines everything

    torch_multinomial = torch.multinomial
    monkeypatch.setattr(torch, "multinomial", lambda *args, **kw: (torch_multinomial(*args, **kw) + 1) % 7)
    assert not module._agrees_with_torch(native)  # other ids
    monkeypatch.setattr(
        torch,
        "multinomial",
        lambda *args, generator, **kw: (
            torch_multinomial(*args, generator=generator, **kw),
            torch.rand(1, generator=generator),
        )[0],
    )
    assert not module._agrees_with_torch(native)  # the same ids, another state
    monkeypatch.undo()
    assert torch.equal(torch.get_rng_state(), before)
