"""The ways in which a changed model is asked for tokens, and what its own code gives."""

from __future__ import annotations

import copy

import torch
from torch import nn

import hf_accel
from hf_accel import Engine, SamplingParams
from hf_accel.config import FaultInjection

from ...tiny import make_tiny_llama

PROMPT = torch.randint(0, 256, (1, 41), generator=torch.Generator().manual_seed(3))
LENGTH = 10
CONFIG = {"num_pages": 128, "page_size": 8, "faults": FaultInjection(check_integrity=True)}
ON_DEVICE = {"faults": FaultInjection(check_integrity=True, device_forward=True)}


def make_llama(tied: bool = False):
    torch.manual_seed(0)
    return make_tiny_llama(initializer_range=0.15, tie_word_embeddings=tied)


def hf_tokens(model) -> list[int]:
    """What the model's own code gives: from a copy, which is not patched."""
    twin = copy.deepcopy(model)
    assert not hf_accel.is_patched(twin)
    return twin.generate(PROMPT, do_sample=False, max_new_tokens=LENGTH)[0, PROMPT.shape[1] :].tolist()


def backward(model: nn.Module) -> None:
    model(input_ids=PROMPT, labels=PROMPT).loss.backward()


class DataSGD(torch.optim.Optimizer):
    """A custom optimizer of the kind found in research code: it writes one element through `.data`, not in the sample."""

    def __init__(self, params, step_size: float):
        super().__init__(params, {"step_size": step_size})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.view(-1)[p.numel() // 2 + 1] += group["step_size"]


class Generate:
    """Our answers through `model.generate` of a patched model."""

    def __init__(self, model, **options):
        self.model = hf_accel.patch(model, **(CONFIG | options))
        self.engine = hf_accel.get_engine(model)

    def tokens(self) -> list[int]:
        return self.model.generate(PROMPT, do_sample=False, max_new_tokens=LENGTH)[0, PROMPT.shape[1] :].tolist()


class ByHand:
    """Our answers through an Engine."""

    def __init__(self, model, **options):
        self.engine = Engine(model, **(CONFIG | options))

    def tokens(self) -> list[int]:
        return (
            self.engine.generate([PROMPT[0]], SamplingParams(temperature=0, max_tokens=LENGTH))[0].outputs[0].token_ids
        )


WAYS = {
    "generate-fused": lambda model: Generate(model, fused=True),
    "generate-device": lambda model: Generate(model, **ON_DEVICE),
    "generate-layers": lambda model: Generate(model, fused=False),
    "engine-fused": lambda model: ByHand(model, fused=True),
    "engine-layers": lambda model: ByHand(model, fused=False),
}
