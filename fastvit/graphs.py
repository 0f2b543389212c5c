"""CUDA graphs, captured so that a capture that fails leaves the process usable."""

from __future__ import annotations

from collections.abc import Callable

import torch

_broken: list[object] = []  # graphs whose capture failed: PyTorch's allocators may go on pointing to them


def capture(work: Callable[[], object], pool: tuple[int, int], **where) -> Callable[[], None]:
    """`work`, captured into a graph with its memory in `pool` (torch.cuda.graph_pool_handle()): what replays it.
    where: the stream of the capture, if not PyTorch's. Raises what the capture raises, and leaves that pool for good.
    """
    current = torch.cuda.current_stream()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool, **where):
            work()
    except BaseException:
        # After an illegal call PyTorch fails to end the capture, and goes on recording into the pool, whose memory
        # would never be free again, nor could anything else be captured.
        device = torch.cuda.current_device()
        try:
            torch._C._cuda_endAllocateToPool(device, pool)
            torch._C._cuda_releasePool(device, pool)
            _broken.append(graph)
        except (AttributeError, RuntimeError):  # the capture had ended
            graph.reset()
        raise
    finally:
        torch.cuda.set_stream(current)  # a capture that failed leaves its own in force
    return graph.replay
