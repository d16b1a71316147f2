"""Runs one step on the user's model: pools, attention backend, the packed forward. Does not know the scheduler."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_accel.attention.base import AttentionBackend, AttentionMetadata
from hf_accel.attention.select import select_backend
from hf_accel.config import EngineConfig
from hf_accel.engine.cuda_graph import CudaGraphRunner
from hf_accel.engine.forward_batch import ForwardBatch
from hf_accel.engine.graph_setup import make_graphs, wants_graphs
from hf_accel.engine.host_memory import available_memory
from hf_accel.engine.layer_attention import LatentStep, PagedStep
from hf_accel.kv_cache.mla_pool import FP8, LatentShape, MLAPool
from hf_accel.kv_cache.pool import MHAPool
from hf_accel.patching.attention import paged_attention_on
from hf_accel.patching.deepseek import LatentLayers
from hf_accel.patching.experts import experts_configs, experts_on
from hf_accel.patching.forward_state import TensorAddresses, forward_state
from hf_accel.patching.llama import FusedDecoderModel, fused_decoder_for
from hf_accel.patching.llama_device import DeviceForward, device_forward_for
from hf_accel.patching.packed_linears import PackedLinears
from hf_accel.patching.registry import ModelSpec
from hf_accel_kernels.mla import mla_gather

logger = logging.getLogger("hf_accel")

CPU_POOL_LIMIT = 4 << 30
"""Bytes that an automatically sized pool takes at most on CPU; `num_pages` goes past it."""
FIRST_POSITIONS = 1 << 17
"""Positions that a device's rope tables cover before a longer sequence comes."""


class ModelRunner:
    """The mechanism of an engine: given a ForwardBatch, logits.

    Raises (from the constructor):
        ValueError: a requested backend or pool cannot be had.
    """

    def __init__(self, model_ref: weakref.ref[PreTrainedModel], spec: ModelSpec, config: EngineConfig) -> None:
        self._model_ref = model_ref  # weak: a patched model must not be kept alive by its engine
        self.config = config
        self.spec = spec
        self.device = self.model.device
        self.dtype = self.model.dtype
        self.backend: AttentionBackend = select_backend(config.attention_backend, self.device, self.dtype)
        self.kv_dtype = kv_storage_dtype(spec, config, self.dtype)
        self._has_graphs = wants_graphs(config, self.backend, self.device)
        self.num_pages = config.num_pages or self._fit_num_pages()
        self.pool = self._make_pool()
        self.graphs: CudaGraphRunner | None = None
        if self._has_graphs:
            self.graphs = make_graphs(config, self.backend, self.device, self.num_pages, spec.max_positions)
        self._latent: LatentLayers | None = None
        self._experts_configs: list[Any] = []
        self._fused: FusedDecoderModel | None = None
        self._linears: PackedLinears | None = None
        self._device_forward: DeviceForward | None = None
        self._version: Hashable = None
        self._layout_version: Hashable = None
        self._fused_reason: str | None = None
        self._no_mask = torch.zeros(1, 1, 1, 1, dtype=self.dtype, device=self.device)

    @property
    def model(self) -> PreTrainedModel:
        """The model itself."""
        model = self._model_ref()
        if model is None:
            raise RuntimeError("the engine's model was deleted")
        return model

    @property
    def fused(self) -> bool:
        """Whether steps run through the fused decoder, or on a device through our own loop over the layers, at present."""
        return self._fused is not None or self._device_forward is not None

    @property
    def layout_version(self) -> int | None:
        """Changes whenever weights that a captured step reads may have moved; None where steps run the model's own layers."""
        return None if self._device_forward is None else self._device_forward.layout_version

    @property
    def moved_parameters(self) -> bool:
        """Whether some of the model's parameters lie in tensors of this runner, until `release`."""
        return self._device_forward is not None

    @property
    def matches_model(self) -> bool:
        """Whether the model still has the device and dtype that the pool was made for."""
        return self.model.device == self.device and self.model.dtype == self.dtype

    def prepare(self, weights_version: Hashable) -> bool:
        """Bring derived weights up to date; called when a call begins, never during a step. `prepare_graphs` follows.

        Returns:
            whether the model's parameters may have moved to other memory, with their values as they were.
        """
        changed, self._version = weights_version != self._version, weights_version
        self._prepare_latent(changed)
        if changed and self.backend.name == "cpu":
            self._experts_configs = experts_configs(self.model)
        if self.device.type == "cuda" or self.config.faults.device_forward:
            return self._prepare_device_forward(changed)
        if self.device.type == "cpu" and self.config.pack_weights is not False:
            self._prepare_packed(changed)
        return False

    def _prepare_device_forward(self, changed: bool) -> bool:
        moved, held = False, self._device_forward
        if held is not None:
            reason = held.why_not_valid(self.model) or (held.refresh() if changed else "")
            moved = changed or bool(reason)
            if reason:
                held.close()
                self._device_forward = None
        if self._device_forward is None and self.config.fused and isinstance(self.pool, MHAPool):
            most = min(self.spec.max_positions, self.num_pages * self.config.page_size, FIRST_POSITIONS)
            self._device_forward, reason = device_forward_for(self.model, max_positions=most)
            self._log_unfused(reason)
            moved = moved or self._device_forward is not None
        return moved

    def _prepare_packed(self, changed: bool) -> None:
        if self._fused is not None:
            reason = self._fused.why_not_valid(self.model) or (self._fused.refresh() if changed else "")
            if reason:
                self._fused = None
        elif self._linears is not None and changed and not self._linears.refresh(self.model):
            self._linears = None
        if self._fused is None and self.config.fused:
            self._fused = self._make_fused()  # cheap to refuse; a removed hook or adapter makes it possible again
        if self._fused is not None:
            self._linears = None
        elif self._linears is None and not self._why_not_packed():
            self._linears = PackedLinears(self.model)

    def _make_fused(self) -> FusedDecoderModel | None:
        reason, fused = self._why_not_packed(), None
        if not reason:
            fused, reason = fused_decoder_for(
                self.model, page_size=self.config.page_size, max_positions=self.spec.max_positions
            )
        self._log_unfused(reason)
        return fused

    def _log_unfused(self, reason: str) -> None:
        if reason and reason != self._fused_reason:
            logger.info("hf_accel runs the model's own layers: %s", reason)
            self._fused_reason = reason

    def _why_not_packed(self) -> str:
        num_bytes = sum(p.nbytes for p in self.model.parameters())
        held = self._linears.num_bytes if self._linears is not None else 0
        if self.config.pack_weights == "auto" and num_bytes > (available_memory() + held) // 2:
            return f"packed weights of {num_bytes >> 20} MiB would take over half of the free memory (pack_weights=True insists)"
        return PackedLinears.why_not()

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Logits of the tokens in `batch.logits_indices`: [num_logits, vocab_size] float32, the caller's own."""
        batch.upload()
        if self._device_forward is not None:
            self._cover_positions(self._device_forward, max(batch.seq_lens_cpu))
        logits = self.graphs.run(batch, self.compute) if self.graphs is not None else None
        if logits is None:
            logits = self._forward_fused(batch) if self._fused is not None else None
        return self.compute(batch, self.backend.plan(batch)).float() if logits is None else logits

    def _forward_fused(self, batch: ForwardBatch) -> torch.Tensor:
        assert self._fused is not None and isinstance(self.pool, MHAPool)
        return self._fused.forward(
            batch.input_ids,
            batch.positions,
            batch.slot_mapping,
            batch.page_table,
            batch.seq_lens,
            batch.query_start_loc,
            batch.logits_indices,
            self.pool.k_pages,
            self.pool.v_pages,
            num_positions=max(batch.seq_lens_cpu),
        )

    def _cover_positions(self, device_forward: DeviceForward, num_positions: int) -> None:
        """Rope tables that move take the graphs that read them with them."""
        before = device_forward.layout_version
        device_forward.ensure_positions(num_positions)
        if device_forward.layout_version != before:
            self.prepare_graphs(self._layout_version)

    def compute(self, batch: ForwardBatch, metadata: AttentionMetadata) -> torch.Tensor:
        """The forward that graphs capture: logits [num_logits, vocab_size] of the model's dtype.

        Nothing here, or below, may read the batch's host lengths but through `metadata`.
        """
        if self._device_forward is not None:
            return self._forward_on_device(self._device_forward, batch, metadata)
        packed = self._linears.on() if self._linears is not None else contextlib.nullcontext()
        latent = self._latent.on() if self._latent is not None else contextlib.nullcontext()
        seams = (paged_attention_on(self.spec.configs), experts_on(self._experts_configs), packed, latent)
        with torch.no_grad(), _no_autocast(self.device), contextlib.ExitStack() as stack:
            for seam in seams:
                stack.enter_context(seam)
            output = self.model(
                input_ids=batch.input_ids[None],
                position_ids=batch.positions[None],
                attention_mask=self._no_mask,
                use_cache=False,
                logits_to_keep=batch.logits_indices,
                forward_batch=self._step(metadata),
            )
        return output.logits[0]

    @torch.no_grad()
    def _forward_on_device(
        self, device_forward: DeviceForward, batch: ForwardBatch, metadata: AttentionMetadata
    ) -> torch.Tensor:
        with _no_autocast(self.device):
            return device_forward.forward(
                batch.input_ids,
                batch.positions,
                batch.logits_indices,
                self.backend,
                metadata,
                self.pool.k_pages,
                self.pool.v_pages,
            )

    def _step(self, metadata: AttentionMetadata) -> PagedStep | LatentStep:
        if isinstance(self.pool, MHAPool):
            return PagedStep(self.backend, self.pool, metadata)
        assert self._latent is not None, "prepare comes before the first step"
        return LatentStep(self.backend, self._latent.over(self.pool), metadata)

    def read_kv(self, layer: int, page_ids: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Contiguous copies of what HF's cache would hold of a sequence: keys and values [num_kv_heads, num_tokens,
        head_dim], or latents [1, num_tokens, rank] and rotated keys [1, num_tokens, rope_dim]."""
        if isinstance(self.pool, MLAPool):
            rank, scales = self.pool.layers[layer].rank, self.pool.scales[layer]
            parts = mla_gather(self.pool.pages[layer], page_ids, num_tokens, scales, dtype=self.dtype, rank=rank)
            return parts[0][None], parts[1][None]

        def contiguous(pages: torch.Tensor) -> torch.Tensor:
            return pages[page_ids].transpose(0, 1).flatten(1, 2)[:, :num_tokens]  # from [pages, heads, page_size, dim]

        return contiguous(self.pool.k_pages[layer]), contiguous(self.pool.v_pages[layer])

    def close(self) -> None:
        """Give every byte back; the runner is of no use afterwards."""
        self.release()
        self._fused = self._linears = self._latent = None

    def release(self) -> None:
        """Give the pool's and the graphs' memory back, and the model's parameters memory of their own; until `pool.restore`
        and `prepare`."""
        if self.graphs is not None:
            self.graphs.release()
        self.pool.release()
        if self._device_forward is not None:
            self._device_forward.close()
            self._device_forward = None

    def warm_up(self) -> None:
        """Capture a graph of every batch size now; `prepare` comes first. Nothing without graphs."""
        if self.graphs is not None:
            self.graphs.warm_up(self.compute)

    def prepare_graphs(self, layout_version: Hashable) -> None:
        """Give up graphs of what the forward is no longer; called after `prepare`.

        Args:
            layout_version: changes when a forward could read other memory, or run other modules.
        """
        self._layout_version = layout_version
        if self.graphs is None:
            return
        model, reason = self.model, ""
        state, watched = forward_state(model, self.spec.configs)
        latent = self._latent.addresses() if self._latent is not None else []
        if None in latent:
            reason = "the latents of some layer are expanded, at lengths that the host knows"
        if self._fused is not None:
            reason = "the fused CPU step has none"
        own_loop = self._device_forward.layout_version if self._device_forward is not None else None
        addresses = [latent, self.pool.addresses(), own_loop]
        self.graphs.follow([layout_version, state, addresses], lambda: TensorAddresses(model), reason or watched)

    def _prepare_latent(self, changed: bool) -> None:
        if not isinstance(self.pool, MLAPool):
            return
        if self._latent is None:
            packed = self.config.pack_weights is not False and self.backend.name == "cpu" and not self._why_not_packed()
            self._latent = LatentLayers(self.model, packed=packed)
        else:
            self._latent.refresh(changed)

    def _make_pool(self) -> MHAPool | MLAPool:
        kind = MLAPool if isinstance(self.spec.layers[0], LatentShape) else MHAPool
        shape = (self.num_pages, self.config.page_size, self.kv_dtype, self.device)
        return kind(self.spec.layers, *shape, num_reserved=int(self._has_graphs))

    def _fit_num_pages(self) -> int:
        """Pages that fit in the configured share of the device's free memory."""
        kind = MLAPool if isinstance(self.spec.layers[0], LatentShape) else MHAPool
        page_bytes = kind.bytes_per_token_for(self.spec.layers, self.kv_dtype) * self.config.page_size
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            budget = int(free * self.config.memory_fraction)
        else:
            budget = min(int(available_memory() * self.config.memory_fraction), CPU_POOL_LIMIT)
        most = self.config.max_num_seqs * -(-self.spec.max_positions // self.config.page_size)
        num_pages = min(budget // page_bytes - self._has_graphs, most)
        if num_pages < 1:
            raise ValueError(
                f"{budget} bytes of free memory hold no KV page of {page_bytes} bytes: free some memory, raise memory_fraction or lower page_size"
            )
        return num_pages


def kv_storage_dtype(spec: ModelSpec, config: EngineConfig, model_dtype: torch.dtype) -> torch.dtype:
    """What the pool's values are kept in. Raises ValueError for a storage that the model's layers cannot have."""
    if config.kv_cache_dtype == "auto":
        return model_dtype
    if not isinstance(spec.layers[0], LatentShape):
        raise ValueError('kv_cache_dtype="fp8" is for models with multi-head latent attention (DeepSeek): use "auto"')
    return FP8


@contextlib.contextmanager
def _no_autocast(device: torch.device) -> Iterator[None]:
    if torch.is_autocast_enabled(device.type):
        with torch.autocast(device.type, enabled=False):
            yield
    else:
        yield
