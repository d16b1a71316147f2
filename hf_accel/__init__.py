"""Paged, prefix-sharing, continuously batched generation for HuggingFace models, in your own process."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_accel.config import EngineConfig as EngineConfig
    from hf_accel.engine.engine import Engine as Engine
    from hf_accel.engine.outputs import CompletionOutput as CompletionOutput
    from hf_accel.engine.outputs import ContinuationScore as ContinuationScore
    from hf_accel.engine.outputs import EngineStats as EngineStats
    from hf_accel.engine.outputs import RequestOutput as RequestOutput
    from hf_accel.engine.outputs import StreamChunk as StreamChunk
    from hf_accel.engine.patch import get_engine as get_engine
    from hf_accel.engine.patch import is_patched as is_patched
    from hf_accel.engine.patch import patch as patch
    from hf_accel.engine.patch import unpatch as unpatch
    from hf_accel.patching.registry import UnsupportedModelError as UnsupportedModelError
    from hf_accel.pipeline import AcceleratedPipeline as AcceleratedPipeline
    from hf_accel.sampling_params import SamplingParams as SamplingParams
    from hf_accel.structured.constraint import Constraint as Constraint
    from hf_accel.structured.logits_processor import ChoiceLogitsProcessor as ChoiceLogitsProcessor
    from hf_accel.structured.logits_processor import ConstraintLogitsProcessor as ConstraintLogitsProcessor
    from hf_accel.structured.logits_processor import GrammarLogitsProcessor as GrammarLogitsProcessor
    from hf_accel.structured.logits_processor import JSONSchemaLogitsProcessor as JSONSchemaLogitsProcessor
    from hf_accel.structured.logits_processor import RegexLogitsProcessor as RegexLogitsProcessor

__version__ = "0.1.0"

_EXPORTS = {
    "AcceleratedPipeline": "hf_accel.pipeline",
    "ChoiceLogitsProcessor": "hf_accel.structured.logits_processor",
    "CompletionOutput": "hf_accel.engine.outputs",
    "Constraint": "hf_accel.structured.constraint",
    "ConstraintLogitsProcessor": "hf_accel.structured.logits_processor",
    "ContinuationScore": "hf_accel.engine.outputs",
    "Engine": "hf_accel.engine.engine",
    "EngineConfig": "hf_accel.config",
    "EngineStats": "hf_accel.engine.outputs",
    "GrammarLogitsProcessor": "hf_accel.structured.logits_processor",
    "JSONSchemaLogitsProcessor": "hf_accel.structured.logits_processor",
    "RegexLogitsProcessor": "hf_accel.structured.logits_processor",
    "RequestOutput": "hf_accel.engine.outputs",
    "SamplingParams": "hf_accel.sampling_params",
    "StreamChunk": "hf_accel.engine.outputs",
    "UnsupportedModelError": "hf_accel.patching.registry",
    "get_engine": "hf_accel.engine.patch",
    "is_patched": "hf_accel.engine.patch",
    "patch": "hf_accel.engine.patch",
    "unpatch": "hf_accel.engine.patch",
}

__all__ = ["__version__", *sorted(_EXPORTS)]


def __getattr__(name: str) -> Any:
    """Import an exported name when it is first used, so that `import hf_accel` costs nothing."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'hf_accel' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
