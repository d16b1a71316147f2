"""EngineConfig: bad values are refused with a message that says what is allowed."""

from __future__ import annotations

import dataclasses

import pytest

from hf_accel.config import ATTENTION_BACKENDS, POLICIES, EngineConfig, FaultInjection


def test_defaults_are_valid_and_frozen():
    config = EngineConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.page_size = 32
    assert config == EngineConfig() and hash(config) == hash(EngineConfig())


@pytest.mark.parametrize(
    "name", ["page_size", "max_num_seqs", "max_num_batched_tokens", "num_pages", "max_prefill_chunk"]
)
@pytest.mark.parametrize("value", [0, -1, 1.5, "16", True])
def test_counts_are_positive_integers(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a positive integer, got"):
        EngineConfig(**{name: value})


@pytest.mark.parametrize("name", ["page_size", "max_num_seqs", "max_num_batched_tokens"])
def test_counts_without_a_default_meaning_cannot_be_none(name):
    with pytest.raises(ValueError, match=name):
        EngineConfig(**{name: None})


@pytest.mark.parametrize("name", ["memory_fraction", "cuda_graph_memory_fraction"])
@pytest.mark.parametrize("value", [0.0, -0.1, 1.01, float("nan")])
def test_memory_fractions(name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be in \(0, 1\]"):
        EngineConfig(**{name: value})


@pytest.mark.parametrize("value", [(), (0, 1), (1, 1), (4, 2), [1, 2], (1.0, 2), (True, 2), 8])
def test_batch_sizes_of_graphs(value):
    with pytest.raises(ValueError, match="cuda_graph_batch_sizes must be a tuple of ascending positive integers"):
        EngineConfig(cuda_graph_batch_sizes=value)
    assert hash(EngineConfig(cuda_graph_batch_sizes=(1, 3))) != hash(EngineConfig())


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("policy", POLICIES),
        ("attention_backend", ATTENTION_BACKENDS),
        ("pack_weights", ("True", "auto")),
        ("cuda_graphs", ("True", "auto")),
    ],
)
def test_choices_are_named_in_the_message(name, choices):
    with pytest.raises(ValueError, match="fastest") as error:
        EngineConfig(**{name: "fastest"})
    assert all(choice in str(error.value) for choice in choices)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("backend", ATTENTION_BACKENDS)
def test_every_named_choice_is_accepted(policy, backend):
    config = EngineConfig.from_kwargs(policy=policy, attention_backend=backend, memory_fraction=1.0, num_pages=3)
    assert (config.policy, config.attention_backend, config.num_pages) == (policy, backend, 3)


def test_unknown_option_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown engine option\(s\) pagesize, zebra; known: .*page_size"):
        EngineConfig.from_kwargs(zebra=1, pagesize=16)


def test_faults_are_off_by_default():
    assert EngineConfig().faults == FaultInjection(retract_every=0, force_miss=False, check_integrity=False)
