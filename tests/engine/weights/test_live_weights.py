"""After each way in which weights can change, the next call is right, with the prompt's old KV still in the cache."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from .ways import LENGTH, PROMPT, DataSGD, backward, hf_tokens, make_llama


def stepped(make):
    def change(model):
        optimizer = make(model.parameters())
        backward(model)
        optimizer.step()
        optimizer.zero_grad()

    return change


def data_add(model):
    for p in model.parameters():
        p.data.add_(0.2 * torch.randn_like(p))


def data_add_one_matrix(model):
    weight = model.model.layers[0].self_attn.v_proj.weight
    weight.data.add_(torch.randn_like(weight))


def data_assign(model):
    for p in model.parameters():
        p.data = p.data + 0.2 * torch.randn_like(p)


def no_grad_write(model):
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(-2.0)


def inference_mode_write(model):
    with torch.inference_mode():
        model.model.embed_tokens.weight.add_(torch.randn_like(model.model.embed_tokens.weight))


def other_state(model):
    return {k: v + 0.2 * torch.randn_like(v) for k, v in model.state_dict().items()}


def load_state_dict(model):
    model.load_state_dict(other_state(model))


def load_state_dict_assign(model):
    model.load_state_dict(other_state(model), assign=True)


def change_buffer(model):
    model.model.rotary_emb.inv_freq.mul_(0.5)


def replace_buffer(model):
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 0.5


def replace_linear(model):
    old = model.model.layers[0].mlp.up_proj
    model.model.layers[0].mlp.up_proj = nn.Linear(old.in_features, old.out_features, bias=False)


def replace_linear_by_a_subclass(model):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model.model.layers[0].mlp.up_proj = Doubled(64, 128, bias=False)


def add_biases(model):
    model.model.layers[0].mlp.up_proj.bias = nn.Parameter(torch.randn(128))
    model.lm_head.bias = nn.Parameter(torch.randn(256))


def smaller_mlp(model):
    mlp = model.model.layers[1].mlp
    for linear in (mlp.gate_proj, mlp.up_proj):
        linear.weight = nn.Parameter(linear.weight[:64] * 5)
    mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight[:, :64] * 5)


def more_tokens(model):
    model.resize_token_embeddings(300, mean_resizing=False)
    model.lm_head.weight.data[256:] = model.lm_head.weight.data[:44] * 1.5


def replace_norm_weight(model):
    model.model.norm.weight = nn.Parameter(torch.rand(64) * 3)


def replace_activation(model):
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.Sigmoid()


def prune_a_head_of_the_weights(model):
    model.model.layers[0].self_attn.q_proj.weight.data[:16].zero_()


CHANGES = {
    "adamw-fused": stepped(lambda p: torch.optim.AdamW(p, lr=0.1, fused=True)),
    "adamw-foreach": stepped(lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True)),
    "adamw-loop": stepped(lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False)),
    "sgd-fused": stepped(lambda p: torch.optim.SGD(p, lr=3.0, fused=True)),
    "custom-data-optimizer": stepped(lambda parameters: DataSGD(parameters, 30.0)),
} | {
    f.__name__: f
    for f in (
        data_add, data_add_one_matrix, data_assign, no_grad_write, inference_mode_write, load_state_dict,
        load_state_dict_assign, change_buffer, replace_buffer, replace_linear, replace_linear_by_a_subclass,
        add_biases, smaller_mlp, more_tokens, replace_norm_weight, replace_activation, prune_a_head_of_the_weights,
    )
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_after_a_change(way, change):
    model = make_llama()
    ours = way(model)
    before = hf_tokens(model)
    assert ours.tokens() == before
    assert ours.tokens() == before  # from the cache
    assert ours.engine.stats().num_cached_tokens > 0
    CHANGES[change](model)
    expected = hf_tokens(model)
    assert expected != before, "the change is too small to test anything"
    assert ours.tokens() == expected
    assert ours.tokens() == expected
    ours.engine.check_integrity()


def test_training_and_generating_in_turns(way):
    model = make_llama()
    ours = way(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.03, fused=True)
    answers = set()
    for _ in range(4):
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
        expected = hf_tokens(model)
        assert ours.tokens() == expected
        answers.add(tuple(expected))
    assert len(answers) > 1


def test_tied_embeddings(way):
    model = make_llama(tied=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ours = way(model)
    before = hf_tokens(model)
    assert ours.tokens() == before
    model.lm_head.weight.data.add_(0.3 * torch.randn(256, 64))
    assert hf_tokens(model) != before
    assert ours.tokens() == hf_tokens(model)
    model.lm_head.weight = nn.Parameter(torch.randn(256, 64))  # untied
    assert ours.tokens() == hf_tokens(model)


def test_another_dtype_and_back(way):
    model = make_llama()
    ours = way(model)
    before = hf_tokens(model)
    assert ours.tokens() == before
    model.to(torch.bfloat16)
    first = ours.tokens()
    assert ours.engine.core.executor.runner.pool.dtype == torch.bfloat16
    logits = (
        copy.deepcopy(model)(torch.tensor([PROMPT[0].tolist() + first])).logits[0, PROMPT.shape[1] - 1 : -1].float()
    )
    gap = logits.max(dim=-1).values - logits[torch.arange(LENGTH), first]
    assert bool((gap <= 2**-6 * logits.abs().max()).all())  # each token is HF's own, but for near ties
    model.to(torch.float32)
    assert ours.tokens() == hf_tokens(model)
    ours.engine.check_integrity()


def test_one_element_through_data_needs_a_word(way):
    model = make_llama()
    ours = way(model)
    assert ours.tokens() == hf_tokens(model)
    last = ours.tokens()[-1]
    model.model.embed_tokens.weight.data[int(PROMPT[0, -1]), 5] += 40.0
    model.lm_head.weight.data[last, 7] += 1.0
    ours.engine.invalidate_weights()
    assert ours.tokens() == hf_tokens(model)
