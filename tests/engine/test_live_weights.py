"""After each way in which weights can change, the next call is right, with the prompt's old KV still in the cache."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import hf_accel
from hf_accel import Engine, SamplingParams
from hf_accel.config import FaultInjection

PROMPT = torch.randint(0, 256, (1, 41), generator=torch.Generator().manual_seed(3))
LENGTH = 10
CONFIG = {"num_pages": 128, "page_size": 8, "faults": FaultInjection(check_integrity=True)}


def make_llama(tied: bool = False):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        max_position_embeddings=512,
        initializer_range=0.15,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def hf_tokens(model) -> list[int]:
    """What the model's own code gives: from a copy, which is not patched."""
    twin = copy.deepcopy(model)
    assert not hf_accel.is_patched(twin)
    return twin.generate(PROMPT, do_sample=False, max_new_tokens=LENGTH)[0, PROMPT.shape[1] :].tolist()


class Generate:
    """Our answers through `model.generate` of a patched model."""

    def __init__(self, model, fused: bool):
        self.model = hf_accel.patch(model, fused=fused, **CONFIG)
        self.engine = hf_accel.get_engine(model)

    def tokens(self) -> list[int]:
        return self.model.generate(PROMPT, do_sample=False, max_new_tokens=LENGTH)[0, PROMPT.shape[1] :].tolist()


class ByHand:
    """Our answers through an Engine."""

    def __init__(self, model, fused: bool):
        self.engine = Engine(model, fused=fused, **CONFIG)

    def tokens(self) -> list[int]:
        return (
            self.engine.generate([PROMPT[0]], SamplingParams(temperature=0, max_tokens=LENGTH))[0].outputs[0].token_ids
        )


WAYS = {
    "generate-fused": lambda model: Generate(model, fused=True),
    "generate-layers": lambda model: Generate(model, fused=False),
    "engine-fused": lambda model: ByHand(model, fused=True),
    "engine-layers": lambda model: ByHand(model, fused=False),
}


@pytest.fixture(params=WAYS)
def way(request):
    return WAYS[request.param]


def backward(model: nn.Module) -> None:
    model(input_ids=PROMPT, labels=PROMPT).loss.backward()


class DataSGD(torch.optim.Optimizer):
    """A custom optimizer that writes through `.data`, one element of each parameter: only its step can be noticed."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.view(-1)[p.numel() // 2 + 1] += 30.0


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
    "custom-data-optimizer": stepped(DataSGD),
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


# -- adapters --


@pytest.fixture
def lora(way):
    """A model with two random adapters, 'one' active, and our answers on it."""
    peft = pytest.importorskip("peft")
    model = make_llama()
    config = {"r": 4, "lora_alpha": 32, "target_modules": "all-linear", "init_lora_weights": False}
    torch.manual_seed(5)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**config), adapter_name="one").eval()
    wrapped.add_adapter("two", peft.LoraConfig(**config))
    return wrapped, way(wrapped)


def cached_tokens(ours) -> int:
    return ours.engine.stats().num_cached_tokens


def test_switching_adapters_hits_the_old_cache_again(lora):
    model, ours = lora
    answers = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        answers[name] = hf_tokens(model.base_model.model)
        assert ours.tokens() == answers[name]
    assert answers["one"] != answers["two"]
    for name in ("one", "two", "one"):
        model.set_adapter(name)
        before = cached_tokens(ours)
        assert ours.tokens() == answers[name]
        assert cached_tokens(ours) - before == 40  # the prompt's full pages


def test_disabling_an_adapter_and_enabling_it_again(lora):
    model, ours = lora
    active = hf_tokens(model.base_model.model)
    assert ours.tokens() == active
    with model.disable_adapter():
        base = hf_tokens(model.base_model.model)
        assert base != active
        assert ours.tokens() == base
    before = cached_tokens(ours)
    assert ours.tokens() == active
    assert cached_tokens(ours) > before


def test_merging_and_unmerging(lora):
    model, ours = lora
    assert ours.tokens() == hf_tokens(model.base_model.model)
    model.merge_adapter()
    assert ours.tokens() == hf_tokens(model.base_model.model)
    model.unmerge_adapter()
    assert ours.tokens() == hf_tokens(model.base_model.model)


def test_training_an_adapter(lora):
    model, ours = lora
    before = ours.tokens()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.3, fused=True)
    backward(model)
    optimizer.step()
    assert ours.tokens() == hf_tokens(model.base_model.model) != before


def test_merge_and_unload(lora):
    model, ours = lora
    adapted = ours.tokens()
    base = model.merge_and_unload()
    assert ours.tokens() == hf_tokens(base) == adapted


def test_adding_an_adapter_to_a_model_in_use(way):
    peft = pytest.importorskip("peft")
    model = make_llama()
    ours = way(model)
    before = hf_tokens(model)
    assert ours.tokens() == before
    peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", init_lora_weights=False)
    )
    assert ours.tokens() == hf_tokens(model) != before
