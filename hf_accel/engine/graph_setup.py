"""Whether an engine's decode steps go through graphs, and the runner of the graphs that its configuration asks for."""

from __future__ import annotations

import torch

from hf_accel.attention.base import AttentionBackend
from hf_accel.config import EngineConfig
from hf_accel.engine.cuda_graph import PATIENCE, CudaGraphRunner, batch_sizes
from hf_accel.engine.decode_buffers import DecodeBuffers, PassedEvent
from hf_accel.engine.graph_capture import CudaGraphMaker, GraphMaker, RerunMaker
from hf_accel.engine.host_memory import available_memory


def wants_graphs(config: EngineConfig, backend: AttentionBackend, device: torch.device) -> bool:
    """Whether steps are to be captured. Raises ValueError where they are asked for and the backend cannot be."""
    if config.cuda_graphs is True and not backend.supports_graphs:
        raise ValueError(
            f'cuda_graphs=True needs an attention backend that can be captured, not "{backend.name}": use cuda_graphs="auto"'
        )
    on = config.cuda_graphs is True or (config.cuda_graphs == "auto" and device.type == "cuda")
    return on and backend.supports_graphs


def make_graphs(
    config: EngineConfig, backend: AttentionBackend, device: torch.device, num_pages: int, max_positions: int
) -> CudaGraphRunner:
    """The runner, with its buffers; the pool has one page more than `num_pages`, for padding.

    A sequence that outgrows `max_positions` makes its steps run without graphs.
    """
    most = config.max_num_seqs
    sizes = sorted({min(n, most) for n in config.cuda_graph_batch_sizes or batch_sizes(most)})
    on_cuda = device.type == "cuda"
    buffers = DecodeBuffers(
        max_batch=sizes[-1],
        num_slots=most,
        width=min(num_pages, -(-max_positions // config.page_size)),
        page_size=config.page_size,
        padding_page=num_pages,
        device=device,
        make_event=torch.cuda.Event if on_cuda else PassedEvent,
    )
    memory = torch.cuda.get_device_properties(device).total_memory if on_cuda else available_memory()
    most_bytes = int(memory * config.cuda_graph_memory_fraction)
    return CudaGraphRunner(buffers, backend, make_maker(device), sizes, most_bytes, PATIENCE)


def make_maker(device: torch.device) -> GraphMaker:
    """CUDA graphs on CUDA; on CPU a stand-in that computes each step again."""
    return CudaGraphMaker(device) if device.type == "cuda" else RerunMaker()
