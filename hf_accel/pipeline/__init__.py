"""The accelerated `text-generation` pipeline."""

from __future__ import annotations

from hf_accel.pipeline.pipeline import AcceleratedPipeline

__all__ = ["AcceleratedPipeline"]
