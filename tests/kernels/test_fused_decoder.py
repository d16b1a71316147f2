"""The fused decoder over pages against the cache-free torch oracle: odd shapes, chunks, mixed batches, both dtypes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import pytest
import torch

from hf_accel_kernels.cpu import library
from hf_accel_kernels.fused import DecoderSpec, FusedDecoder, LayerWeights, Linear
from hf_accel_kernels.fused_reference import decoder_reference

pytestmark = pytest.mark.skipif(library.load()[0] is None, reason=f"no CPU ops: {library.load()[1]}")

VOCAB, MAX_POSITIONS, NUM_PAGES = 101, 160, 64


@dataclass
class Shape:
    hidden: int = 72
    inter: int = 100
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 16
    rotary_dim: int = 16
    page_size: int = 4
    num_layers: int = 3
    bias: bool = False
    qk_norm: bool = False
    nope_layers: tuple[int, ...] = ()
    sliding_window: int = 0
    multipliers: tuple[float, float, float] = (1.0, 1.0, 1.0)


SHAPES = {
    "llama": Shape(),
    "odd sizes": Shape(hidden=37, inter=51, heads=3, kv_heads=1, head_dim=10, rotary_dim=10, page_size=7),
    "qwen2": Shape(bias=True, heads=4, kv_heads=4),
    "qwen3": Shape(qk_norm=True, head_dim=32, rotary_dim=32),
    "nope and window": Shape(nope_layers=(1,), sliding_window=9, page_size=16),
    "granite": Shape(multipliers=(2.0, 0.3, 4.0)),
    "partial rotary": Shape(head_dim=64, rotary_dim=32, num_layers=2),
}


@dataclass
class Model:
    """Random weights of a shape, and the pages of one pool."""

    shape: Shape
    dtype: torch.dtype
    k_pages: list[torch.Tensor] = field(default_factory=list)
    v_pages: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(sum(map(ord, repr(self.shape))) % 1000)
        s = self.shape
        embedding, residual, divisor = s.multipliers
        self.spec = DecoderSpec(
            s.heads, s.kv_heads, s.head_dim, s.page_size, 1e-5, embedding, residual, divisor,
        )  # fmt: skip
        self.layers = [self.layer(i) for i in range(s.num_layers)]
        angles = torch.arange(MAX_POSITIONS).unsqueeze(1) * 10000.0 ** (
            -torch.arange(0, s.rotary_dim, 2) / s.rotary_dim
        )
        angles = torch.cat([angles, angles], dim=1)
        self.rest = (
            self.random(VOCAB, s.hidden), self.norm(s.hidden), Linear(self.random(VOCAB, s.hidden)),
            angles.cos().to(self.dtype), angles.sin().to(self.dtype),
        )  # fmt: skip
        for pages in (self.k_pages, self.v_pages):
            for _ in range(s.num_layers):
                pages.append(torch.full((NUM_PAGES, s.kv_heads, s.page_size, s.head_dim), 7.0, dtype=self.dtype))
        self.decoder = FusedDecoder(self.spec, self.layers, *self.rest)

    def random(self, *shape: int) -> torch.Tensor:
        return (torch.randn(*shape) / shape[-1] ** 0.5).to(self.dtype)

    def norm(self, size: int) -> torch.Tensor:
        return (1 + 0.3 * torch.randn(size)).to(self.dtype)

    def linear(self, rows: int, columns: int) -> Linear:
        return Linear(self.random(rows, columns), self.random(rows) if self.shape.bias else None)

    def layer(self, index: int) -> LayerWeights:
        s = self.shape
        q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
        return LayerWeights(
            self.linear(q, s.hidden), self.linear(kv, s.hidden), self.linear(kv, s.hidden), self.linear(s.hidden, q),
            self.linear(s.inter, s.hidden), self.linear(s.inter, s.hidden), self.linear(s.hidden, s.inter),
            self.norm(s.hidden), self.norm(s.hidden),
            self.norm(s.head_dim) if s.qk_norm else None, self.norm(s.head_dim) if s.qk_norm else None,
            scale=s.head_dim**-0.5, sliding_window=s.sliding_window, use_rope=index not in s.nope_layers,
        )  # fmt: skip

    def reference(self, ids: torch.Tensor) -> torch.Tensor:
        return decoder_reference(self.spec, self.layers, *self.rest, ids)


class Cache:
    """Sequences with their pages, shuffled over the pool; `step` computes the next tokens of each."""

    def __init__(self, model: Model, sequences: list[torch.Tensor]) -> None:
        self.model, self.sequences, self.done = model, sequences, [0] * len(sequences)
        width = max(-(-len(s) // model.shape.page_size) for s in sequences)
        assert width * len(sequences) <= NUM_PAGES
        self.table = torch.randperm(NUM_PAGES)[: width * len(sequences)].view(len(sequences), width).int()

    def step(self, counts: list[int], rows: list[int] | None = None, **kwargs: object) -> torch.Tensor:
        """Runs counts[i] tokens of sequence i; logits of the given rows of the batch (default: all)."""
        size = self.model.shape.page_size
        active = [i for i, count in enumerate(counts) if count]
        positions = [torch.arange(self.done[i], self.done[i] + counts[i]) for i in active]
        slots = [self.table[i].long()[p // size] * size + p % size for i, p in zip(active, positions)]
        starts = torch.tensor([0, *(counts[i] for i in active)]).cumsum(0)
        for i in active:
            self.done[i] += counts[i]
        total = int(starts[-1])
        return self.model.decoder.forward(
            torch.cat([self.sequences[i][p] for i, p in zip(active, positions)]),
            torch.cat(positions), torch.cat(slots), self.table[active],
            torch.tensor([self.done[i] for i in active]), starts,
            torch.arange(total) if rows is None else torch.tensor(rows, dtype=torch.int64),
            self.model.k_pages, self.model.v_pages, **kwargs,
        )  # fmt: skip


def assert_close(out: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert out.dtype == torch.float32
    error = ((out.double() - expected.double()).norm() / expected.double().norm()).item()
    assert error < (1e-5 if dtype == torch.float32 else 2e-2), f"relative error {error:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
def test_chunked_prefill_then_decode(name: str, dtype: torch.dtype) -> None:
    model = Model(SHAPES[name], dtype)
    ids = torch.randint(0, VOCAB, (60,))
    cache = Cache(model, [ids])
    logits = torch.cat([cache.step([count]) for count in (23, 1, 1, 17, 8, *[1] * 10)])
    assert_close(logits, model.reference(ids), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "odd sizes", "nope and window"])
def test_mixed_batches(name: str, dtype: torch.dtype) -> None:
    model = Model(SHAPES[name], dtype)
    sequences = [torch.randint(0, VOCAB, (length,)) for length in (40, 13, 31)]
    cache = Cache(model, sequences)
    parts: list[list[torch.Tensor]] = [[], [], []]
    for counts in ([20, 5, 0], [1, 1, 12], [1, 0, 1], [17, 6, 17], [1, 1, 1]):
        logits = cache.step(counts)
        for part, chunk in zip(parts, logits.split(counts)):
            part.append(chunk)
    for part, ids in zip(parts, sequences):
        assert_close(torch.cat(part), model.reference(ids), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_wanted_rows(dtype: torch.dtype) -> None:
    model = Model(SHAPES["llama"], dtype)
    ids = torch.randint(0, VOCAB, (50,))
    cache = Cache(model, [ids])
    expected = model.reference(ids)
    assert cache.step([20], rows=[]).shape == (0, VOCAB)
    assert_close(cache.step([25], rows=[24, 3, 3]), expected[[44, 23, 23]], dtype)
    assert_close(cache.step([5], rows=[4]), expected[[49]], dtype)


@pytest.mark.parametrize("name", ["llama", "nope and window"])
def test_wanted_rows_of_a_mixed_batch(name: str) -> None:
    model = Model(SHAPES[name], torch.float32)
    sequences = [torch.randint(0, VOCAB, (length,)) for length in (40, 13, 31)]
    expected = [model.reference(ids) for ids in sequences]
    cache = Cache(model, sequences)
    out = cache.step([20, 5, 10], rows=[19, 34])  # nothing of the second
    assert_close(out, torch.stack([expected[0][19], expected[2][9]]), torch.float32)
    out = cache.step([12, 1, 8], rows=[20, 3, 12])  # out of order, one in the middle
    assert_close(out, torch.stack([expected[2][17], expected[0][23], expected[1][5]]), torch.float32)
    out = cache.step([1, 1, 1], rows=[0, 1, 2])
    assert_close(out, torch.stack([expected[0][32], expected[1][6], expected[2][18]]), torch.float32)


def test_long_prefill_in_one_call() -> None:
    model = Model(dataclasses.replace(SHAPES["llama"], page_size=16), torch.float32)
    ids = torch.randint(0, VOCAB, (150,))
    assert_close(Cache(model, [ids]).step([150]), model.reference(ids), torch.float32)


def test_embeddings_instead_of_ids() -> None:
    model = Model(SHAPES["llama"], torch.float32)
    ids = torch.randint(0, VOCAB, (20,))
    logits = Cache(model, [ids]).step([20], inputs_embeds=model.rest[0][ids])
    assert_close(logits, model.reference(ids), torch.float32)


def test_threads_give_the_same_answer() -> None:
    model = Model(dataclasses.replace(SHAPES["qwen3"], hidden=256, page_size=16), torch.float32)
    ids = torch.randint(0, VOCAB, (150,))
    one = Cache(model, [ids]).step([150], num_threads=1)
    three = Cache(model, [ids]).step([150], num_threads=3)
    assert_close(three, one, torch.float32)


def test_a_negative_slot_is_not_stored() -> None:
    model = Model(SHAPES["llama"], torch.float32)
    before = model.k_pages[0].clone()
    table = torch.zeros(1, 1, dtype=torch.int32)
    one = torch.tensor([1])
    model.decoder.forward(
        one,
        torch.tensor([0]),
        torch.tensor([-1]),
        table,
        one,
        torch.tensor([0, 1]),
        one - 1,
        model.k_pages,
        model.v_pages,
    )
    assert torch.equal(before, model.k_pages[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_update_each_weight_in_place(dtype: torch.dtype) -> None:
    model = Model(dataclasses.replace(SHAPES["qwen3"], bias=True), dtype)
    ids = torch.randint(0, VOCAB, (12,))
    stale = Cache(model, [ids]).step([12])
    size = model.decoder.num_bytes
    for name in ("q", "k", "v", "o", "gate", "up", "down"):
        old = getattr(model.layers[1], name)
        new = Linear(model.random(*old.weight.shape), model.random(*old.bias.shape))
        model.layers[1] = dataclasses.replace(model.layers[1], **{name: new})
        model.decoder.update(1, name, *new)
        assert_close(Cache(model, [ids]).step([12]), model.reference(ids), dtype)
    for name in ("input_norm", "post_norm", "q_norm", "k_norm"):
        new_norm = model.norm(getattr(model.layers[0], name).shape[0])
        model.layers[0] = dataclasses.replace(model.layers[0], **{name: new_norm})
        model.decoder.update(0, name, new_norm)
        assert_close(Cache(model, [ids]).step([12]), model.reference(ids), dtype)
    embedding, final_norm, lm_head, cos, sin = model.rest
    model.rest = (embedding + 0.1, model.norm(len(final_norm)), Linear(lm_head.weight.flip(0)), cos, sin)
    model.decoder.set_embedding(model.rest[0])
    model.decoder.update(None, "final_norm", model.rest[1])
    model.decoder.update(None, "lm_head", model.rest[2].weight)
    fresh = Cache(model, [ids]).step([12])
    assert_close(fresh, model.reference(ids), dtype)
    assert (fresh - stale).abs().max() > 0.1
    assert model.decoder.num_bytes == size


def test_bad_batches_are_refused_and_write_nothing() -> None:
    model = Model(SHAPES["llama"], torch.float32)
    before = [pages.clone() for pages in (*model.k_pages, *model.v_pages)]
    good = {
        "input_ids": torch.tensor([1, 2]), "positions": torch.tensor([0, 1]), "slot_mapping": torch.tensor([0, 1]),
        "page_table": torch.zeros(1, 1, dtype=torch.int32), "seq_lens": torch.tensor([2]),
        "query_start_loc": torch.tensor([0, 2]), "logits_indices": torch.tensor([1]),
        "k_pages": model.k_pages, "v_pages": model.v_pages,
    }  # fmt: skip
    for name, value, message in (
        ("input_ids", torch.tensor([1, VOCAB]), "vocabulary"),
        ("input_ids", torch.tensor([-1, 1]), "vocabulary"),
        ("positions", torch.tensor([0, MAX_POSITIONS]), "rope"),
        ("slot_mapping", torch.tensor([0, NUM_PAGES * 4]), "pool"),
        ("page_table", torch.full((1, 1), NUM_PAGES, dtype=torch.int32), "pool"),
        ("seq_lens", torch.tensor([5]), "do not fit"),
        ("seq_lens", torch.tensor([1]), "do not fit"),
        ("query_start_loc", torch.tensor([0, 3]), "do not fit"),
        ("logits_indices", torch.tensor([2]), "do not fit"),
        ("positions", torch.tensor([0]), "do not fit"),
        ("k_pages", model.k_pages[:1], "expected 3 key pools"),
    ):
        with pytest.raises(ValueError, match=message):
            model.decoder.forward(**(good | {name: value}))
    assert all(map(torch.equal, before, (*model.k_pages, *model.v_pages)))
    model.decoder.forward(**good)


def test_wrong_weights_are_refused() -> None:
    model = Model(SHAPES["llama"], torch.float32)
    layer = dataclasses.replace(model.layers[0], o=Linear(torch.randn(72, 90)))
    with pytest.raises(ValueError, match="layer 1: o is"):
        FusedDecoder(model.spec, [model.layers[0], layer], *model.rest)
