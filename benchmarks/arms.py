"""The ways of running a workload that are compared: HF's three, and hf-accel.

Every arm has a model instance of its own with the same weights. `reset` makes it forget every prefix, `run` does the
whole workload. Knows no clock, except the cap of the one-by-one arm.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

import hf_accel
from benchmarks.hf_versions import forget_prefixes, page_size_option
from benchmarks.models import BenchmarkModel
from benchmarks.workloads import Workload

CB_PAGE_SIZE = 32
CB_MAX_BATCH_TOKENS = 256
CB_SPARE = 1.5
CB_SPARE_BLOCKS = 32
"""Its cost grows with the blocks it has, and it fails where its safety margin leaves too few: tuned on `shared_prefix`
(728 blocks: 48 s of CPU time, 128: 29.5 s; 256, 512, 1024 batch tokens: 46.6, 48.0, 51.7 s)."""
THREAD_START_SECONDS = 0.3
"""The manager's thread clears its buffers when it starts; that shall not be timed."""

RunStage = Callable[[list[list[int]], list[int]], list[list[int]]]


@dataclass
class RunResult:
    """What one run of a workload gave.

    Attributes:
        outputs: new tokens of each generation, n in a row for each prompt; empty for one that the cap left out.
        hit_rate: share of the prompt tokens that the prefix cache served; None where it is not known.
        capped: whether generations were left out.
        num_fallbacks: hf-accel calls that the original code served.
    """

    outputs: list[list[int]]
    hit_rate: float | None = None
    capped: bool = False
    num_fallbacks: int = 0

    @property
    def num_tokens(self) -> int:
        """Wanted tokens that were generated."""
        return sum(map(len, self.outputs))


class Arm:
    """One way of running one workload on one model.

    Attributes:
        name: as in `NAMES`.
        api: the calls it makes, in words, for the results.
        sampling_like_hf: with `torch.manual_seed`, sampled tokens are those of a single `generate` call.
    """

    name = ""
    api = ""
    sampling_like_hf = False

    def __init__(self, bench: BenchmarkModel, workload: Workload) -> None:
        self.bench, self.model, self.workload = bench, bench.model, workload

    def reset(self) -> None:
        """Forget every cached prefix; not timed."""

    def run(self) -> RunResult:
        """Do the whole workload."""
        raise NotImplementedError

    def pause(self) -> None:
        """Stand still while other arms run; not timed."""

    def close(self) -> None:
        """Give memory back."""

    def _generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, n: int) -> list[list[int]]:
        """New tokens of a left-padded `model.generate` call."""
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts])  # [num_prompts, longest]
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        config = GenerationConfig(max_new_tokens=max_new_tokens, pad_token_id=0, num_return_sequences=n, **self._how())
        device = self.model.device
        output = self.model.generate(ids.to(device), attention_mask=mask.to(device), generation_config=config)
        return output[:, longest:].tolist()

    def _how(self) -> dict[str, Any]:
        w = self.workload
        return (
            {"do_sample": True, "temperature": w.temperature, "top_k": w.top_k} if w.sampled else {"do_sample": False}
        )

    def _in_stages(self, run_stage: RunStage) -> list[list[int]]:
        """Run stage by stage; `run_stage(prompts, lengths)` gives n outputs a prompt."""
        prompts: list[list[int]] = []
        outputs: list[list[int]] = []
        for stage in self.workload.stages:
            batch = [self.workload.prompt(len(prompts) + i, prompts, outputs) for i in range(len(stage))]
            outputs += run_stage(batch, [g.max_new_tokens for g in stage])
            prompts += batch
        return outputs


class GenerateOneByOne(Arm):
    """`model.generate`, a call for each completion."""

    name, api = "generate", "model.generate, one prompt a call"

    def __init__(self, bench: BenchmarkModel, workload: Workload, max_seconds: float = float("inf")) -> None:
        super().__init__(bench, workload)
        self._max_seconds = max_seconds

    def run(self) -> RunResult:
        began, w = time.perf_counter(), self.workload
        outputs: list[list[int]] = []
        capped = False

        def stage(prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
            nonlocal capped
            new: list[list[int]] = []
            for prompt, length in zip(prompts, lengths, strict=True):
                for _ in range(w.n):
                    capped = capped or time.perf_counter() - began > self._max_seconds
                    new += [[]] if capped else self._generate([prompt], length, 1)
            return new

        outputs = self._in_stages(stage)
        return RunResult(outputs, 0.0, capped)


class GeneratePadded(Arm):
    """`model.generate` on all prompts of a stage, left-padded; rows run to the stage's longest output."""

    name, api, sampling_like_hf = "generate_batch_padded", "model.generate, left-padded batch", True

    def run(self) -> RunResult:
        def stage(prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
            rows = self._generate(prompts, max(lengths), self.workload.n)
            wanted = [length for length in lengths for _ in range(self.workload.n)]
            return [row[:length] for row, length in zip(rows, wanted, strict=True)]

        return RunResult(self._in_stages(stage), 0.0)


class ContinuousBatching(Arm):
    """transformers' own continuous batching, through the manager behind `generate_batch`.

    `generate_batch` has one `max_new_tokens` for all requests, so requests are added one by one with their own, in the
    order in which it would (sorted, for prefix hits). One manager serves all runs, as with `persistent_manager=True`;
    its warm-up, start and stop are not timed, and the thread stands still while other arms run.

    Attributes:
        deadline: a run past this moment of `time.monotonic` raises TimeoutError.
    """

    name = "generate_batch"

    def __init__(self, bench: BenchmarkModel, workload: Workload, max_batch_tokens: int = CB_MAX_BATCH_TOKENS) -> None:
        super().__init__(bench, workload)
        num_blocks = int(CB_SPARE * workload.num_pages(CB_PAGE_SIZE)) + CB_SPARE_BLOCKS
        self.api = (
            f"continuous batching manager, page_size {CB_PAGE_SIZE}, num_blocks {num_blocks}, "
            f"max_batch_tokens {max_batch_tokens}"
        )
        config = GenerationConfig(
            max_new_tokens=max(g.max_new_tokens for g in workload.generations),
            eos_token_id=-1,
            pad_token_id=0,
            num_return_sequences=workload.n,
            **self._how(),
        )
        plain = self.model.config._attn_implementation
        self._manager = self.model.init_continuous_batching(
            generation_config=config,
            continuous_batching_config=ContinuousBatchingConfig(
                **{page_size_option(): CB_PAGE_SIZE},
                num_blocks=num_blocks,
                max_batch_tokens=max_batch_tokens,
                allow_block_sharing=True,
            ),
        )
        self._manager.warmup()
        self.deadline = float("inf")
        self._attentions = (plain, self.model.config._attn_implementation)
        self.model.set_attn_implementation(plain)  # 5.17's paged one refuses the other arms' forwards on this model
        self._num_matched = 0
        cache = self._manager.batch_processor.cache
        match = cache.search_prefix_match

        def counted(*args: Any, **kwargs: Any) -> int:
            num_tokens = match(*args, **kwargs)
            self._num_matched += num_tokens
            return num_tokens

        cache.search_prefix_match = counted

    def reset(self) -> None:
        forget_prefixes(self._manager.batch_processor.cache)
        self._num_matched = 0
        self.model.set_attn_implementation(self._attentions[1])
        self._manager.start()
        time.sleep(THREAD_START_SECONDS)

    def run(self) -> RunResult:
        outputs = self._in_stages(self._stage)
        rate = self._num_matched / self.workload.num_prompt_tokens if self.workload.n == 1 else None
        return RunResult(outputs, rate)

    def pause(self) -> None:
        self._manager.stop(block=True, keep_for_next_session=True)
        self.model.set_attn_implementation(self._attentions[0])

    def close(self) -> None:
        self.model.destroy_cached_continuous_batching_manager()

    def _stage(self, prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
        n, manager = self.workload.n, self._manager
        ids: dict[int, str] = {}
        for index in sorted(range(len(prompts)), key=lambda i: prompts[i], reverse=True):
            ids[index] = manager.add_request(prompts[index], max_new_tokens=lengths[index], eos_token_id=-1)
        results: dict[str, list[int]] = {}
        while len(results) < n * len(prompts):
            if time.monotonic() > self.deadline:
                raise TimeoutError(f"continuous batching gave {len(results)} of {n * len(prompts)} results in time")
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                if result.error is not None:
                    raise RuntimeError(f"continuous batching failed a request: {result.error}")
                results[result.request_id] = list(result.generated_tokens)
            elif result is None and not manager.is_running():
                raise RuntimeError("the continuous batching thread ended before its requests")
        names = [
            name for i in range(len(prompts)) for name in [ids[i]] + [f"{ids[i]}__child#{c}" for c in range(n - 1)]
        ]
        return [results[name] for name in names]


class HFAccel(Arm):
    """The patched model: its `generate` where one call says it all, its engine for lengths of their own and for turns."""

    name, sampling_like_hf = "hf_accel", True
    config: ClassVar[dict[str, Any]] = {}

    def __init__(self, bench: BenchmarkModel, workload: Workload) -> None:
        super().__init__(bench, workload)
        self.api = "patched model.generate" if workload.one_call else "Engine.generate"
        self._engine = hf_accel.get_engine(hf_accel.patch(self.model, **self.config))

    def reset(self) -> None:
        self._engine.flush_cache()

    def run(self) -> RunResult:
        before = self._engine.stats()
        outputs = self._in_stages(self._one_call if self.workload.one_call else self._engine_call)
        after = self._engine.stats()
        num_prompt = after.num_prompt_tokens - before.num_prompt_tokens
        rate = (after.num_cached_tokens - before.num_cached_tokens) / num_prompt if num_prompt else 0.0
        return RunResult(outputs, rate, num_fallbacks=after.num_fallbacks - before.num_fallbacks)

    def close(self) -> None:
        hf_accel.unpatch(self.model)

    def _one_call(self, prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
        return self._generate(prompts, lengths[0], self.workload.n)

    def _engine_call(self, prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
        params = [hf_accel.SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in lengths]
        return [output.outputs[0].token_ids for output in self._engine.generate(prompts, params, use_tqdm=False)]


class HFAccelNoCache(HFAccel):
    """The same without the prefix cache: what batching and the kernels give alone."""

    name = "hf_accel_nocache"
    config: ClassVar[dict[str, Any]] = {"enable_prefix_cache": False}


ARMS: dict[str, type[Arm]] = {
    arm.name: arm for arm in (GenerateOneByOne, GeneratePadded, ContinuousBatching, HFAccel, HFAccelNoCache)
}
NAMES = tuple(ARMS)
DEFAULT = tuple(name for name in NAMES if name != "hf_accel_nocache")
