"""The fused CPU step against HF's own forward: every admitted family, chunked and mixed batches, and every refusal."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from hf_accel.patching.llama import FusedDecoderModel, fused_decoder_for
from hf_accel_kernels.cpu import library

pytestmark = pytest.mark.skipif(library.load()[0] is None, reason=f"no CPU ops: {library.load()[1]}")

VOCAB, PAGE_SIZE, NUM_PAGES = 97, 4, 64
BASE = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
WINDOWED = ["sliding_attention", "full_attention", "sliding_attention"]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama tied, biased": ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama3 rope": ("Llama", {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }}),
    "linear rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "yarn rope": ("Llama", {"rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16,
    }}),
    "mistral": ("Mistral", {"sliding_window": 7}),
    "mistral, no window": ("Mistral", {"sliding_window": None}),
    "ministral": ("Ministral", {"sliding_window": 6, "layer_types": WINDOWED}),
    "qwen2": ("Qwen2", {}),
    "qwen2, windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "layer_types": WINDOWED}),
    "qwen3": ("Qwen3", {}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0, 1]}),
    "cwm": ("Cwm", {"sliding_window": 6, "layer_types": WINDOWED, "bos_token_id": 0, "eos_token_id": 1}),
    "seed_oss": ("SeedOss", {}),
    "granite": ("Granite", {
        "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 2.5, "attention_multiplier": 0.2,
    }),
}  # fmt: skip


def make(name: str = "llama", dtype: torch.dtype = torch.float32, **overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    prefix, options = MODELS[name]
    config = getattr(transformers, f"{prefix}Config")(**(BASE | options | overrides))
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.mul_(8)
    return model


def fuse(model: nn.Module) -> FusedDecoderModel:
    fused, reason = fused_decoder_for(model, page_size=PAGE_SIZE, max_positions=64)
    assert fused is not None, reason
    return fused


class Pages:
    """A pool with scattered pages for a few sequences."""

    def __init__(self, model: nn.Module, sequences: list[torch.Tensor]) -> None:
        attention = model.model.layers[0].self_attn
        shape = (NUM_PAGES, attention.k_proj.out_features // attention.head_dim, PAGE_SIZE, attention.head_dim)
        pools = [torch.full(shape, 9.0, dtype=model.dtype) for _ in range(2 * len(model.model.layers))]
        self.k_pages, self.v_pages = pools[::2], pools[1::2]
        self.sequences, self.done = sequences, [0] * len(sequences)
        width = max(-(-len(s) // PAGE_SIZE) for s in sequences)
        self.table = torch.randperm(NUM_PAGES)[: width * len(sequences)].view(len(sequences), width).int()

    def step(self, fused: FusedDecoderModel, counts: list[int]) -> torch.Tensor:
        active = [i for i, count in enumerate(counts) if count]
        positions = [torch.arange(self.done[i], self.done[i] + counts[i]) for i in active]
        slots = [self.table[i].long()[p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE for i, p in zip(active, positions)]
        for i in active:
            self.done[i] += counts[i]
        starts = torch.tensor([0, *(counts[i] for i in active)]).cumsum(0).int()
        return fused.forward(
            torch.cat([self.sequences[i][p] for i, p in zip(active, positions)]), torch.cat(positions), torch.cat(slots),
            self.table[active], torch.tensor([self.done[i] for i in active]).int(), starts, torch.arange(int(starts[-1])),
            self.k_pages, self.v_pages,
        )  # fmt: skip


def fused_logits(fused: FusedDecoderModel, model: nn.Module, sequences: list[torch.Tensor]) -> list[torch.Tensor]:
    """Logits of each sequence, computed in chunks, decode steps and mixed batches."""
    pages = Pages(model, sequences)
    parts: list[list[torch.Tensor]] = [[] for _ in sequences]
    for counts in ([14, 0, 3], [1, 6, 1], [1, 1, 0], [9, 1, 13], [1, 1, 1]):
        logits = pages.step(fused, counts)
        for part, chunk in zip(parts, logits.split(counts)):
            part.append(chunk)
    return [torch.cat(part) for part in parts]


def sequences() -> list[torch.Tensor]:
    return [torch.randint(0, VOCAB, (length,)) for length in (26, 9, 18)]


def assert_same(fused: FusedDecoderModel, model: nn.Module, tolerance: float = 1e-5) -> None:
    batch = sequences()
    for logits, ids in zip(fused_logits(fused, model, batch), batch):
        with torch.no_grad():
            expected = model(ids.unsqueeze(0)).logits[0].float()
        error = ((logits - expected).abs().max() / expected.abs().max()).item()
        assert error < tolerance, f"relative error {error:.2e}"


@pytest.mark.parametrize("name", MODELS)
def test_float32_equals_the_models_own_forward(name: str) -> None:
    model = make(name)
    assert_same(fuse(model), model)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "granite"])
def test_bfloat16_differs_by_rounding_only(name: str) -> None:
    model = make(name, torch.bfloat16)
    wide = make(name).to(torch.bfloat16).float()
    batch = sequences()
    for logits, ids in zip(fused_logits(fuse(model), model, batch), batch):
        with torch.no_grad():
            exact, own = wide(ids.unsqueeze(0)).logits[0], model(ids.unsqueeze(0)).logits[0].float()
        assert (logits - exact).norm() < 1.5 * (own - exact).norm() + 1e-3 * exact.norm()
        assert torch.equal(logits, logits.bfloat16().float())


def test_the_model_is_left_alone() -> None:
    model = make()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    weights = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    assert_same(fuse(model), model)
    for name, module in model.named_modules():
        assert module.__dict__.keys() == before[name].keys()
        assert all(module.__dict__[key] is value for key, value in before[name].items())
    assert all(p is weights[name][0] and torch.equal(p, weights[name][1]) for name, p in model.named_parameters())


def test_rope_tables_grow_with_the_sequence() -> None:
    model = make()
    fused, _ = fused_decoder_for(model, page_size=PAGE_SIZE, max_positions=5)
    assert fused is not None
    assert_same(fused, model)


def test_a_deleted_model_is_freed() -> None:
    model = make()
    fused, ref = fuse(model), weakref.ref(model)
    gc.collect()
    del model
    gc.collect()
    assert ref() is None
    assert fused.refresh() == "the model is gone"


@pytest.mark.parametrize("name", ["llama", "llama tied, biased", "qwen3"])
def test_refresh_follows_the_weights(name: str) -> None:
    model = make(name)
    fused, ids = fuse(model), sequences()
    stale = fused_logits(fused, model, ids)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * parameter.std().nan_to_num(1.0) * torch.randn_like(parameter))
    assert fused.refresh() == ""
    assert_same(fused, model)
    assert (fused_logits(fused, model, ids)[0] - stale[0]).abs().max() > 1e-2


def test_refresh_by_name_takes_each_parameter() -> None:
    model = make("llama tied, biased")
    fused = fuse(model)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.add_(0.5 * torch.randn_like(parameter))
        assert fused.refresh({name}) == ""
        assert_same(fused, model)


def test_refresh_follows_new_storage() -> None:
    model = make()
    fused = fuse(model)
    model.model.embed_tokens.weight.data = torch.randn(VOCAB, 48)
    model.lm_head.weight = nn.Parameter(torch.randn(VOCAB, 48))
    assert fused.refresh() == ""
    assert_same(fused, model)


def lora(model: nn.Module) -> None:
    peft = pytest.importorskip("peft")
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"], r=2), model)


def hook(model: nn.Module) -> None:
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: output + 1)


def pre_hook(model: nn.Module) -> None:
    model.lm_head.register_forward_pre_hook(lambda module, args: None)


def own_forward(model: nn.Module) -> None:
    model.model.norm.forward = lambda x: x


def training(model: nn.Module) -> None:
    model.model.layers[2].self_attn.train()


def replaced_module(model: nn.Module) -> None:
    model.model.layers[0].mlp.down_proj = nn.Sequential(nn.Linear(80, 48))


def parametrized(model: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)


def half(model: nn.Module) -> None:
    model.lm_head.half()


def one_bfloat16(model: nn.Module) -> None:
    model.model.layers[0].mlp.up_proj.bfloat16()


def removed_layer(model: nn.Module) -> None:
    del model.model.layers[1]
    model.config.num_hidden_layers = 2


def changed_scale(model: nn.Module) -> None:
    model.model.layers[0].self_attn.scaling = 0.5


def changed_rope(model: nn.Module) -> None:
    model.model.rotary_emb.inv_freq.mul_(0.5)


def new_layer_order(model: nn.Module) -> None:
    layers = model.model.layers
    model.model.layers = nn.ModuleList([layers[1], layers[0], layers[2]])


REFUSED = [lora, hook, pre_hook, own_forward, training, replaced_module, parametrized, half, one_bfloat16]
REASONS = {
    lora: "q_proj is a", hook: "hook", pre_hook: "hook", own_forward: "forward of its own", training: "training mode",
    replaced_module: "down_proj is a Sequential", parametrized: "up_proj is a", half: "float16", one_bfloat16: "bfloat16",
}  # fmt: skip


@pytest.mark.parametrize("change", REFUSED, ids=lambda f: f.__name__)
def test_refused_from_the_start(change: Any) -> None:
    model = make()
    change(model)
    fused, reason = fused_decoder_for(model, page_size=PAGE_SIZE, max_positions=64)
    assert fused is None
    assert REASONS[change] in reason


@pytest.mark.parametrize(
    "change",
    [*REFUSED[:-1], removed_layer, changed_scale, changed_rope, new_layer_order],
    ids=lambda f: f.__name__,
)
def test_noticed_later(change: Any) -> None:
    model = make()
    fused = fuse(model)
    assert fused.still_valid(model)
    change(model)
    assert not fused.still_valid(model)
    assert fused.refresh() != ""


def test_a_changed_dtype_is_noticed_by_refresh() -> None:
    model = make()
    fused = fuse(model)
    one_bfloat16(model)
    assert "bfloat16" in fused.refresh()


def test_global_hooks_and_autocast_are_noticed() -> None:
    model = make()
    fused = fuse(model)
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    assert not fused.still_valid(model)
    assert "global" in fused_decoder_for(model, page_size=4, max_positions=8)[1]
    handle.remove()
    assert fused.still_valid(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert not fused.still_valid(model)
    assert not fused.still_valid(make())


def test_a_replaced_class_forward_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    fused = fuse(model)
    kind = type(model.model.norm)
    monkeypatch.setattr(kind, "forward", lambda self, x: x)
    assert not fused.still_valid(model)
    assert "forward of LlamaRMSNorm" in fused_decoder_for(model, page_size=4, max_positions=8)[1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_act": "gelu"}, "act_fn is a"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope type dynamic"),
    ],
)
def test_refused_configurations(overrides: dict[str, Any], message: str) -> None:
    fused, reason = fused_decoder_for(make(**overrides), page_size=4, max_positions=8)
    assert fused is None
    assert message in reason


def test_other_families_are_refused() -> None:
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=VOCAB)
    fused, reason = fused_decoder_for(transformers.GPT2LMHeadModel(config).eval(), page_size=4, max_positions=8)
    assert fused is None
    assert "GPT2LMHeadModel" in reason


def test_a_subclass_is_refused() -> None:
    class Mine(transformers.LlamaForCausalLM):
        pass

    model = Mine(transformers.LlamaConfig(**BASE)).eval()
    assert fused_decoder_for(model, page_size=4, max_positions=8)[0] is None
