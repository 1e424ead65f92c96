"""CUDA graphs for decode: a layer's twenty small kernels as one launch, captured once per shape of the batch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

import torch
from veriattn.prover.cuda.memory import Slot
from veriattn.prover.cuda.step import Inputs, LayerPlaces, Stepper

_MOST_SHAPES = 16


def pages_room(pages: int) -> int:
    """Length of the block tables of a captured step: a power of two, so that a growing sequence rarely needs a new one."""
    return max(8, 1 << (pages - 1).bit_length())


class DecodeGraphs:
    """Layers of decode steps, captured. One graph per layer, so that each layer's claims leave while the next one runs.

    Only for steps whose inputs lie at the same addresses whenever `key` is the same. The first step of a shape runs
    without a graph:
    it compiles the kernels and lets buffers grow; the second is captured.
    """

    def __init__(self, stepper: Stepper) -> None:
        self._stepper = stepper
        self._graphs: OrderedDict[Hashable, dict[int, torch.cuda.CUDAGraph]] = OrderedDict()
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def layers(self, key: Hashable) -> dict[int, torch.cuda.CUDAGraph] | None:
        """Graphs of a shape by layer, to be filled; None where this is the first step of that shape."""
        s = self._stepper
        key = (key, s.cache.moves, s.workspace.moves, s.outbox.moves)
        if key in self._graphs:
            self._graphs.move_to_end(key)
            return self._graphs[key]
        self._graphs[key] = {}
        while len(self._graphs) > _MOST_SHAPES:
            self._graphs.popitem(last=False)
        return None

    def run(
        self, graphs: dict[int, torch.cuda.CUDAGraph], i: int, inputs: Inputs, slot: Slot, places: LayerPlaces
    ) -> None:
        """`Stepper.layer_work` by its graph, which is captured where there is none yet."""
        if i not in graphs:
            graph = torch.cuda.CUDAGraph()
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                self._stepper.layer_work(i, inputs, slot, places)
            graphs[i] = graph
        graphs[i].replay()
