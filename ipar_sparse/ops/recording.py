"""Steps of fixed shapes, replayed as CUDA graphs: many small kernels at the cost of one launch."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


class Recorder:
    """Computes a step at its first call, records it at the second, and replays it from then on.

    A step is a function without arguments. It reads tensors that stay where they are, and writes
    its results to such tensors or returns them; a returned tensor is overwritten by the next call
    of any step. It must not wait for the device, and its kernels and shapes must not depend on
    values. Random numbers come from generators that are named here or torch's default one; they
    may be seeded anew before each call, and are those of the plain call. Elsewhere than on a GPU
    every call is plain.

    Args:
        device: where steps are computed.
        generators: on the device, that steps draw from.
        enabled: whether to record at all.
    """

    def __init__(
        self, device: torch.device, *generators: torch.Generator, enabled: bool = True
    ) -> None:
        self.enabled = enabled and device.type == "cuda"
        self._generators = generators
        self._known: dict[Hashable, tuple[torch.cuda.CUDAGraph, Any] | None] = {}
        if self.enabled:
            self._stream = torch.cuda.Stream(device)
            self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, key: Hashable, step: Callable[[], Result]) -> Result:
        """The result of a step.

        Args:
            key: names the step; the function of the first two calls is the one that counts.
            step: the function.
        """
        if not self.enabled:
            return step()
        recorded = self._known.get(key)
        if recorded is None:
            # Gradients are accumulated on the stream of the forward pass: it must be this one.
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                if key not in self._known:
                    self._known[key] = None
                    result = step()
                else:
                    recorded = self._known[key] = self._record(step)
            torch.cuda.current_stream().wait_stream(self._stream)
            if recorded is None:
                return result
        graph, result = recorded
        graph.replay()
        return result

    def _record(self, step: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
        graph = torch.cuda.CUDAGraph()
        for generator in self._generators:
            graph.register_generator_state(generator)
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            result = step()
        finally:
            graph.capture_end()
        return graph, result
