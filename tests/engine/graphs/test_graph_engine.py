"""Decode steps replayed from graphs give HF's tokens, at every batch size, in every kind of attention, whatever happens
meanwhile; and padding writes to its own page alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import hf_accel
from hf_accel import Engine, SamplingParams
from hf_accel.config import FaultInjection

from ...cpp_ops import needs_cpp_ops
from ...patching.configs import FAMILIES, VOCAB_SIZE, make_model
from ...tiny import make_tiny_llama

NEW_TOKENS = 9
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)


def make_prompts(count: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 23, (count,), generator=generator).tolist()
    return [torch.randint(0, VOCAB_SIZE, (n,), generator=generator) for n in lengths]


def hf_tokens(model: Any, prompt: torch.Tensor, count: int = NEW_TOKENS) -> list[int]:
    return model.generate(prompt[None], do_sample=False, max_new_tokens=count)[0, len(prompt) :].tolist()


def tokens(engine: Engine, prompts: list[torch.Tensor]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in engine.generate(prompts, GREEDY)]


def spread_llama() -> Any:
    return make_tiny_llama(initializer_range=0.15)


def test_every_batch_size(recorded: dict[str, Any], graphs_of: Any) -> None:
    model = spread_llama()
    prompts = make_prompts(7)
    expected = [hf_tokens(model, prompt) for prompt in prompts]
    engine = Engine(model, **recorded, enable_prefix_cache=False)
    graphs = graphs_of(engine)
    assert graphs.sizes == (1, 2, 4, 7)
    for count in (5, 1, 7, 2, 6, 3, 4):
        before = graphs.num_replays
        assert tokens(engine, prompts[:count]) == expected[:count]
        assert graphs.num_replays - before == NEW_TOKENS - 1
    assert graphs.num_captures == engine.stats().num_cuda_graphs == 4
    assert engine.stats().num_graph_replays == graphs.num_replays
    assert engine.stats().cuda_graph_bytes == graphs.num_bytes > 4000


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, recorded: dict[str, Any], graphs_of: Any) -> None:
    """Every kind of model that the engine runs can be captured as it is."""
    if recorded["overlap"] and family not in ("gpt_oss", "deepseek_v3"):
        pytest.skip("the loop is the same for all")
    model, prompts = make_model(family, torch.float32), make_prompts(3, seed=1)
    engine = Engine(model, **recorded)
    assert tokens(engine, prompts) == [hf_tokens(model, prompt) for prompt in prompts]
    captured = graphs_of(engine).num_captures
    assert captured == 1 or family == "phi3_longrope"  # older transformers look at its positions on the host
    assert graphs_of(engine).num_replays == captured * (NEW_TOKENS - 1)


@pytest.mark.parametrize("faults", [{"retract_every": 3}, {"force_miss": True}], ids=str)
def test_mixed_steps_and_faults_in_between(faults: dict[str, Any], recorded: dict[str, Any], graphs_of: Any) -> None:
    model, prompts = spread_llama(), make_prompts(9, seed=2)
    faults = {"faults": FaultInjection(check_integrity=True, **faults)}
    options = recorded | {"num_pages": 24, "max_num_batched_tokens": 11, **faults}
    engine = Engine(model, **options)
    assert tokens(engine, prompts) == [hf_tokens(model, prompt) for prompt in prompts]
    assert tokens(engine, prompts[::-1]) == [hf_tokens(model, prompt) for prompt in prompts[::-1]]
    assert 0 < graphs_of(engine).num_replays < engine.stats().num_steps


def test_padding_writes_to_the_reserved_page_only(recorded: dict[str, Any]) -> None:
    """Three sequences in a graph for seven: every page that they do not own keeps its bytes."""
    model, prompts = spread_llama(), make_prompts(3, seed=3)
    engine = Engine(model, **recorded, cuda_graph_batch_sizes=(7,), enable_prefix_cache=False)
    pool = engine.core.executor.runner.pool
    assert pool.num_reserved == 1 and len(pool.k_pages[0]) == pool.num_pages + 1 == 97
    assert pool.num_bytes == 97 * pool.bytes_per_page
    for pages in (*pool.k_pages, *pool.v_pages):
        pages.fill_(77.0)
    used: set[int] = set()
    build = engine.core.executor.builder.build

    def watched(output: Any) -> Any:
        used.update(page for request in output.requests for _, page in request.page_updates)
        return build(output)

    engine.core.executor.builder.build = watched
    assert tokens(engine, prompts) == [hf_tokens(model, prompt) for prompt in prompts]
    idle = [page for page in range(96) if page not in used]
    assert len(idle) > 70
    for pages in (*pool.k_pages, *pool.v_pages):
        assert bool((pages[idle] == 77.0).all())
        assert bool((pages[96, :, 0] != 77.0).any()) and bool((pages[96, :, 1:] == 77.0).all())
    assert engine.stats().num_pages_total == 96


class Steps:
    """The batches and logits of an engine's decode steps, with a copy of the logits as they were."""

    def __init__(self, engine: Engine) -> None:
        runner = engine.core.executor.runner
        self.seen: list[tuple[Any, torch.Tensor, torch.Tensor]] = []
        self._forward, runner.forward = runner.forward, self._watched

    def _watched(self, batch: Any) -> torch.Tensor:
        logits = self._forward(batch)
        if batch.staged is not None:
            self.seen.append((batch, logits, logits.clone()))
        return logits


def test_logits_are_the_callers_own_and_backends_are_told_the_lengths(recorded: dict[str, Any]) -> None:
    model, prompts = spread_llama(), make_prompts(3, seed=4)
    engine = Engine(model, **recorded)
    steps = Steps(engine)
    tokens(engine, prompts)
    refreshed = engine.core.executor.runner.backend.refreshed
    assert len(steps.seen) == len(refreshed) == NEW_TOKENS - 1
    for (batch, logits, copy), lengths in zip(steps.seen, refreshed, strict=True):
        assert logits.dtype == torch.float32 and torch.equal(logits, copy)
        assert lengths == (*batch.seq_lens_cpu, 1)  # padded to four


def test_token_ids_may_come_from_the_device(recorded: dict[str, Any], graphs_of: Any) -> None:
    """A step launched before its tokens are known on the host gets them in a tensor of its own."""
    model, prompts = spread_llama(), make_prompts(3, seed=8)
    engine = Engine(model, **recorded)
    runner = engine.core.executor.runner
    forward = runner.forward

    def late(batch: Any) -> torch.Tensor:
        if batch.staged is None:
            return forward(batch)
        batch.upload()
        ids = batch.input_ids.clone()
        batch.input_ids.fill_(3)
        return forward(dataclasses.replace(batch, input_ids=ids))

    runner.forward = late
    assert tokens(engine, prompts) == [hf_tokens(model, prompt) for prompt in prompts]
    assert graphs_of(engine).num_replays == NEW_TOKENS - 1


def test_a_batch_larger_than_the_largest_size(recorded: dict[str, Any], graphs_of: Any) -> None:
    model, prompts = spread_llama(), make_prompts(3, seed=5)
    engine = Engine(model, **recorded, cuda_graph_batch_sizes=(2,))
    assert tokens(engine, prompts) == [hf_tokens(model, prompt) for prompt in prompts]
    assert graphs_of(engine).num_replays == 0


def test_a_sequence_longer_than_the_buffers(recorded: dict[str, Any], graphs_of: Any) -> None:
    """`generate` goes past the model's longest position, with a warning, as HF does."""
    model, prompt = make_tiny_llama(initializer_range=0.15, max_position_embeddings=24), torch.arange(20)
    expected = hf_tokens(model, prompt)
    hf_accel.patch(model, **recorded)
    assert hf_tokens(model, prompt) == expected
    assert graphs_of(hf_accel.get_engine(model)).num_replays == 4  # the tokens at positions 20 to 23


@needs_cpp_ops
@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_the_stand_in_on_cpu(family: str, monkeypatch: pytest.MonkeyPatch, graphs_of: Any) -> None:
    """`cuda_graphs=True` on CPU: the same logic around the C++ ops, which read lengths from tensors."""
    model, prompts = make_model(family, torch.float32), make_prompts(9, seed=6)
    engine = Engine(model, cuda_graphs=True, fused=False, page_size=8, num_pages=64, max_num_seqs=6)
    assert tokens(engine, prompts) == [hf_tokens(model, prompt) for prompt in prompts]
    assert graphs_of(engine).num_replays > 0


def test_off_by_default_on_cpu_and_refused_where_the_backend_cannot() -> None:
    engine = Engine(spread_llama(), num_pages=8)
    assert engine.core.executor.runner.graphs is None and engine.core.executor.runner.pool.num_reserved == 0
    assert engine.stats().cuda_graph_bytes == engine.stats().num_cuda_graphs == 0
    engine.warmup()
    with pytest.raises(
        ValueError, match='cuda_graphs=True needs an attention backend that can be captured, not "torch"'
    ):
        Engine(spread_llama(), num_pages=8, cuda_graphs=True, attention_backend="torch")


def test_warmup_captures_all_sizes_the_largest_first(recorded: dict[str, Any], graphs_of: Any) -> None:
    model, prompts = spread_llama(), make_prompts(5, seed=7)
    engine = Engine(model, **recorded)
    engine.warmup()
    graphs = graphs_of(engine)
    assert list(graphs._graphs) == [7, 4, 2, 1] and graphs.num_replays == 0
    assert tokens(engine, prompts) == [hf_tokens(model, prompt) for prompt in prompts]
    assert graphs.num_captures == 4 and graphs.num_replays == NEW_TOKENS - 1
