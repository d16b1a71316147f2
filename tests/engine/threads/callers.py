"""Callers of every kind for the thread tests, each deterministic whatever runs beside it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

import hf_accel
from hf_accel import SamplingParams
from hf_accel.config import FaultInjection

CONFIG: dict[str, Any] = {"num_pages": 512, "page_size": 8, "faults": FaultInjection(check_integrity=True)}
JOIN_SECONDS = 120


class Favour(LogitsProcessor):
    """Adds to the logit that follows the last token, so that its history matters."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[torch.arange(len(scores)), (input_ids[:, -1] + 1) % scores.shape[1]] += 2.0
        return scores


class Collect(BaseStreamer):
    def __init__(self):
        self.ids: list[int] = []

    def put(self, value):
        self.ids += value.reshape(-1).tolist()

    def end(self):
        self.ids.append(-1)


def prompt(seed: int, length: int, rows: int = 1) -> torch.Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


def run_together(jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    """Each job in its own thread, all at once; their results, or the exceptions they raised."""
    results: list[Any] = [None] * len(jobs)
    barrier = threading.Barrier(len(jobs))

    def run(index: int) -> None:
        barrier.wait()
        try:
            results[index] = jobs[index]()
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + JOIN_SECONDS
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    assert not any(thread.is_alive() for thread in threads), "a caller hangs"
    return results


def mixed_jobs(model) -> list[Callable[[], Any]]:
    """Callers of every kind, each deterministic whatever runs beside it."""
    engine = hf_accel.get_engine(model)
    greedy = {"do_sample": False, "max_new_tokens": 24, "pad_token_id": 0}
    padded = prompt(2, 21, rows=3)
    mask = torch.ones_like(padded)
    mask[1, :9] = mask[2, :4] = 0

    def streamed_generate():
        streamer = Collect()
        model.generate(prompt(5, 13), streamer=streamer, **greedy)
        return streamer.ids

    def scores():
        out = model.generate(prompt(6, 9), return_dict_in_generate=True, output_scores=True, **greedy)
        return out.sequences.tolist()

    def sampled(seed):
        params = SamplingParams(temperature=0.9, top_p=0.9, seed=seed, max_tokens=20, n=3, repetition_penalty=1.1)
        return [o.token_ids for o in engine.generate([prompt(seed, 12)[0]], params)[0].outputs]

    def streamed(seed):
        params = SamplingParams(temperature=0.7, top_k=20, seed=seed, max_tokens=24)
        return [t for chunk in engine.stream(prompt(seed, 18)[0], params) for t in chunk.token_ids]

    def scored():
        prefix = prompt(9, 30)[0]
        return [round(s.total, 3) for s in engine.score(prefix, [[1, 2, 3], [4], [5, 6, 7, 8, 9]])]

    return [
        lambda: model.generate(prompt(1, 33), **greedy).tolist(),
        lambda: model.generate(padded, attention_mask=mask, **greedy).tolist(),
        lambda: model.generate(prompt(3, 17), repetition_penalty=1.3, **greedy).tolist(),
        lambda: model.generate(prompt(4, 8), logits_processor=LogitsProcessorList([Favour()]), **greedy).tolist(),
        lambda: model.generate(prompt(4, 8), do_sample=True, top_k=1, max_new_tokens=19).tolist(),
        streamed_generate,
        scores,
        lambda: sampled(7),
        lambda: sampled(8),
        lambda: streamed(10),
        lambda: streamed(11),
        scored,
    ]
