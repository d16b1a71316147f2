"""Every family on the engine gives HF's own tokens; what cannot run is refused by name; nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

import hf_accel
from hf_accel.config import FaultInjection

from .configs import FAMILIES, SLIDING, left_padded, make_model

LENGTHS = [3, 17, 29, 1]
NEW_TOKENS = 24
BF16_ULPS = 8
DENSE = [name for name, (_, options) in FAMILIES.items() if not any("expert" in option for option in options)]
"""A router has near ties of its own, and after one the logits are those of other experts: no bound on one token's logits
says anything then. Families with experts are held to the fp32 answer instead, over many prompts."""
CONFIG: dict[str, Any] = {"page_size": 4, "num_pages": 96, "max_num_batched_tokens": 13}
CHECKED = {**CONFIG, "faults": FaultInjection(check_integrity=True)}


def generate(model: PreTrainedModel, input_ids: torch.Tensor, mask: torch.Tensor, **options: Any) -> Any:
    """Greedy, without eos unless the options name one."""
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(input_ids, attention_mask=mask, **options)


def assert_no_fallback(model: PreTrainedModel) -> None:
    assert hf_accel.get_engine(model).stats().fallback_reasons == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_hfs(family: str) -> None:
    """Left-padded rows of mixed lengths, past windows, pages and chunks; the second call is served by the prefix cache."""
    model = make_model(family)
    input_ids, mask = left_padded(LENGTHS)
    expected = generate(model, input_ids, mask)
    continuations = {tuple(row) for row in expected[:, input_ids.shape[1] :].tolist()}
    assert len(continuations) == len(LENGTHS) and min(len(set(c)) for c in continuations) > 3, "the test is too easy"
    eos = int(expected[1, input_ids.shape[1] + 5])
    expected_until_eos = generate(model, input_ids, mask, eos_token_id=eos)
    with hf_accel.patch(model, **CHECKED):
        assert torch.equal(generate(model, input_ids, mask), expected)
        assert torch.equal(generate(model, input_ids, mask, eos_token_id=eos), expected_until_eos)
        assert_no_fallback(model)
        assert hf_accel.get_engine(model).stats().num_cached_tokens > 0
    assert torch.equal(generate(model, input_ids, mask), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_own_layers_give_hfs_tokens(family: str) -> None:
    """The same on plain torch ops and the model's own layers, where a family would otherwise take a fused path."""
    model = make_model(family, seed=1)
    input_ids, mask = left_padded(LENGTHS, seed=1)
    expected = generate(model, input_ids, mask)
    with hf_accel.patch(model, **CONFIG, fused=False, attention_backend="torch"):
        assert torch.equal(generate(model, input_ids, mask), expected)
        assert_no_fallback(model)


@pytest.mark.parametrize("family", DENSE)
def test_bf16_differs_only_at_near_ties(family: str) -> None:
    model = make_model(family, torch.bfloat16)
    input_ids, mask = left_padded(LENGTHS)
    expected = generate(model, input_ids, mask)
    with hf_accel.patch(model, **CONFIG):
        got = generate(model, input_ids, mask)
        assert_no_fallback(model)
    width = input_ids.shape[1]
    for row, length in enumerate(LENGTHS):
        assert_near_tie(model, got[row, width - length :], expected[row, width - length :])


@torch.no_grad()
def assert_near_tie(model: PreTrainedModel, got: torch.Tensor, expected: torch.Tensor) -> None:
    """Where two greedy continuations part, both tokens' logits are within a few roundings of bf16."""
    parted = (got != expected).nonzero()
    if not len(parted):
        return
    at = int(parted[0])
    logits = model(expected[None, :at]).logits[0, -1].float()
    ulp = torch.finfo(torch.bfloat16).eps * float(logits.abs().max())
    difference = abs(float(logits[got[at]] - logits[expected[at]]))
    assert difference <= BF16_ULPS * ulp, f"token {at}: logits differ by {difference / ulp:.1f} ulps, no near tie"


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_is_as_close_to_fp32_as_hfs(family: str) -> None:
    """We round at other places than HF; it must not be worse. The median passes over the prompts where a router flips."""
    input_ids, _ = left_padded([40] * 32, seed=9)
    options = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_logits": True, "do_sample": False}
    exact = make_model(family, torch.bfloat16).float().generate(input_ids, **options).logits[0]
    model = make_model(family, torch.bfloat16)
    theirs = model.generate(input_ids, **options).logits[0]
    with hf_accel.patch(model, page_size=16, num_pages=256):
        ours = model.generate(input_ids, **options).logits[0]
        assert_no_fallback(model)
    error, allowed = (float((x - exact).norm(dim=1).div(exact.norm(dim=1)).median()) for x in (ours, theirs))
    assert error <= 1.4 * allowed


def forward_and_gradients(model: PreTrainedModel, input_ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """Logits of a scoring forward, the loss of a training forward, and every gradient."""
    with torch.no_grad():
        logits = model(input_ids, attention_mask=mask).logits
    model.train()
    loss = model(input_ids, attention_mask=mask, labels=input_ids.masked_fill(mask == 0, -100)).loss
    loss.backward()
    model.eval()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return [logits, loss.detach(), *gradients]


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_forward_and_unpatch_are_exact(family: str) -> None:
    model = make_model(family)
    input_ids, mask = left_padded(LENGTHS)
    torch.manual_seed(1)
    before = forward_and_gradients(model, input_ids, mask)
    attributes, class_attributes = dict(vars(model)), dict(vars(type(model)))
    config, state = model.config.to_dict(), dict(model.state_dict())
    implementation = model.config._attn_implementation
    hf_accel.patch(model, **CONFIG)
    generate(model, input_ids, mask)
    torch.manual_seed(1)
    while_patched = forward_and_gradients(model, input_ids, mask)
    hf_accel.unpatch(model)
    assert len(while_patched) == len(before) and all(torch.equal(a, b) for a, b in zip(while_patched, before))
    assert vars(model) == attributes and dict(vars(type(model))) == class_attributes
    assert model.config.to_dict() == config and model.config._attn_implementation == implementation
    after = model.state_dict()
    assert list(after) == list(state) and all(after[name].data_ptr() == state[name].data_ptr() for name in state)


@pytest.mark.parametrize("family", SLIDING)
def test_windows_matter_in_these_models(family: str) -> None:
    """Guards the tests above: with a wide window the same weights give other tokens."""
    input_ids, mask = left_padded(LENGTHS)
    narrow = generate(make_model(family), input_ids, mask)
    wide = generate(make_model(family, sliding_window=256), input_ids, mask)
    assert not torch.equal(narrow, wide)


TINY = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
UNSUPPORTED = {
    "t5": ("encoder-decoder", {"vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}),
    "bart": ("encoder-decoder", {"vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1}),
    "mamba": ("linear_attention", {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}),
    "qwen3_next": ("linear", {**TINY, "num_key_value_heads": 1, "head_dim": 16, "num_experts": 2, "moe_intermediate_size": 16}),
    "lfm2": ("conv", {**TINY, "num_key_value_heads": 1, "layer_types": ["conv", "full_attention"]}),
    "deepseek_v32": ("latent attention \\(deepseek_v32\\) is not supported", {**TINY, "kv_lora_rank": 8, "index_topk": 4}),
    "longcat_flash": ("latent attention", {**TINY, "kv_lora_rank": 8}),
    "diffllama": ("attends more than once", {**TINY, "num_key_value_heads": 2}),
    "phimoe": ("mask is not the one", {**TINY, "num_key_value_heads": 2, "num_local_experts": 2, "sliding_window": 8}),
    "doge": ("mask in its own way", {**TINY, "num_key_value_heads": 2}),
    "moshi": ("cache forgets", {**TINY, "num_key_value_heads": 2, "ffn_dim": 48, "sliding_window": 8}),
    "bert": ("not causal", {**TINY, "is_decoder": False}),
    "bloom": ("AttentionInterface", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 2}),
}  # fmt: skip


@pytest.mark.parametrize("model_type", UNSUPPORTED)
def test_unsupported_models_are_refused_by_name_and_left_alone(model_type: str) -> None:
    reason, options = UNSUPPORTED[model_type]
    config = AutoConfig.for_model(model_type, **options)
    factory = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = factory.from_config(config).eval()
    check_refused(model, reason)


def test_multimodal_models_are_refused() -> None:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=4
    )
    text = LlamaConfig(**TINY)
    check_refused(
        LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text)).eval(), "multimodal"
    )


def test_a_layer_that_mixes_tokens_is_refused() -> None:
    """Attention through the interface is not enough: what else looks at the neighbours would see other requests."""
    model = make_model("llama")
    mlp = type(model.model.layers[1].mlp)

    class ShiftingMLP(mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x + x.roll(1, dims=1))

    model.model.layers[1].mlp.__class__ = ShiftingMLP
    check_refused(model, "outside of attention")


def check_refused(model: PreTrainedModel, reason: str) -> None:
    attributes, class_attributes = dict(vars(model)), dict(vars(type(model)))
    config = model.config.to_dict()
    with pytest.raises(hf_accel.UnsupportedModelError, match=reason) as caught:
        hf_accel.patch(model)
    assert type(model).__name__ in str(caught.value)
    assert not hf_accel.is_patched(model)
    assert vars(model) == attributes and dict(vars(type(model))) == class_attributes
    assert model.config.to_dict() == config
