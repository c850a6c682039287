"""Our kernels in PyTorch's context, on its tensors: both sides are captured in graphs and timed in turns.

Weights rotate over copies that L2 cannot hold, as a layer's do in a model.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from numba_atomflow.device.resources import DeviceResources, Resources
from numba_atomflow.ops.cuda.layout.activations import BLOCK_WORDS, ActivationTiles
from numba_atomflow.ops.cuda.layout.prepack import prepack_arguments, prepack_ctas, prepack_kernel
from numba_atomflow.ops.cuda.layout.weights import PrepackedLayout
from numba_atomflow.ops.cuda.runtime.build import build
from numba_atomflow.ops.cuda.runtime.chip import Chip, chip_of
from numba_atomflow.ops.cuda.runtime.launch import Kernel, Launch
from numba_atomflow.ops.cuda.runtime.spec import KernelSpec, Planned

ROTATED_BYTES = 150e6  # of all copies of a weight together: 2.5 times the L2 of an H200
ROUNDS, DISCARDED = 12, 2
GRAPH_SECONDS = 1.5e-3  # of a replay, about
_MOST_LAUNCHES = 400
_SWIZZLE_ROWS = 8

Run = Callable[[int], object]  # launches number i, which uses copy i


@dataclass(frozen=True)
class Span:
    """A tensor's memory, as an argument of a launch."""

    address: int
    extent: int


def span(tensor: torch.Tensor) -> Span:
    """The memory of a contiguous tensor."""
    if not tensor.is_contiguous():
        raise ValueError("a kernel's argument must be contiguous")
    return Span(tensor.data_ptr(), tensor.numel() * tensor.element_size())


@dataclass(frozen=True)
class TensorLaunch:
    """A launch, and the tensors whose memory it uses: PyTorch would give it to others if no one referred to them."""

    launch: Launch
    tensors: tuple[torch.Tensor, ...]

    def run(self) -> None:
        """Launch it in its stream."""
        self.launch.run()


class TorchGpu:
    """GPU 0 in PyTorch's context.

    Attributes:
        chip: what kernels are tiled for. stream: of all launches. device: PyTorch's name.
    """

    device = "cuda"

    def __init__(self) -> None:
        with DeviceResources() as owner:
            self.chip: Chip = chip_of(owner.open())
        torch.zeros(1, device="cuda")  # PyTorch's context is current from here on
        self.stream = torch.cuda.Stream()
        self._resources = Resources()
        self._kernels: dict[KernelSpec, Kernel] = {}

    def load(self, *planned: Planned) -> None:
        """Compile kernels, in parallel, or take them from the cache."""
        specs = [each.spec for each in planned if each.spec not in self._kernels]
        for spec, code in build(specs, self.chip.capability).items():
            self._kernels[spec] = Kernel(spec, code, self._resources)

    def launch(self, planned: Planned, arguments: Mapping[str, torch.Tensor | int], ctas: int = 0) -> TensorLaunch:
        """A launch in `stream`.

        Args:
            arguments: by name; more than the kernel takes. ctas: grid size, where the plan leaves it open.
        """
        from cuda.bindings import driver

        self.load(planned)
        signature: Any = planned.spec.signature
        values = {name: arguments[name] for name in signature._fields}
        packed = {name: span(value) if isinstance(value, torch.Tensor) else value for name, value in values.items()}
        stream = driver.CUstream(self.stream.cuda_stream)
        launch = Launch(self._kernels[planned.spec], ctas or planned.ctas, signature(**packed), stream)
        return TensorLaunch(launch, tuple(value for value in values.values() if isinstance(value, torch.Tensor)))

    def run(self, launch: TensorLaunch) -> None:
        """Launch once, and wait."""
        self.stream.wait_stream(torch.cuda.current_stream())
        launch.run()
        self.stream.synchronize()

    def prepack(self, codes: torch.Tensor, scales: torch.Tensor, layout: PrepackedLayout) -> torch.Tensor:
        """Prepacked words of codes uint8 [N, K] and scales float32 [N, K / 128]."""
        words = torch.zeros(layout.words, dtype=torch.int32, device="cuda")
        arguments: Any = prepack_arguments(layout, [codes, scales], words)
        planned = prepack_kernel(layout.format.converter)
        self.run(self.launch(planned, arguments._asdict(), prepack_ctas(layout)))
        return words

    def alternate(self, sides: Mapping[str, tuple[Run, int]]) -> dict[str, list[float]]:
        """Seconds per run of each side in every round; the order rotates from round to round.

        Args:
            sides: by name: what to run, and the number of copies that its runs rotate over.
        """
        torch.cuda.synchronize()  # what runs read was made in PyTorch's own stream
        graphs = {name: self._captured(run, copies) for name, (run, copies) in sides.items()}
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        names = list(sides)
        for number in range(ROUNDS + DISCARDED):
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                graph, runs = graphs[name]
                start.record(self.stream)
                with torch.cuda.stream(self.stream):
                    graph.replay()
                end.record(self.stream)
                end.synchronize()
                if number >= DISCARDED:
                    seconds[name].append(start.elapsed_time(end) / 1e3 / runs)
        return seconds

    def _captured(self, run: Run, copies: int) -> tuple[Any, int]:
        """A graph that is long enough to be timed, and the number of runs in it."""
        graph, seconds = self._capture(run, copies), 0.0
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(2):  # the first replay also uploads the graph
            start.record(self.stream)
            with torch.cuda.stream(self.stream):
                graph.replay()
            end.record(self.stream)
            end.synchronize()
            seconds = start.elapsed_time(end) / 1e3
        passes = min(max(1, round(GRAPH_SECONDS / max(seconds, 1e-6))), max(1, _MOST_LAUNCHES // copies))
        return (graph, copies) if passes == 1 else (self._capture(run, copies * passes), copies * passes)

    def _capture(self, run: Run, runs: int) -> Any:
        with torch.cuda.stream(self.stream):
            run(0)  # a library may allocate or choose an algorithm in its first call
        self.stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.stream):  # `torch.cuda.graph` would also collect garbage, which takes longer
            graph.capture_begin()
            try:
                for i in range(runs):
                    run(i)
            finally:
                graph.capture_end()
        return graph

    def close(self) -> None:
        """Unload the kernels."""
        torch.cuda.synchronize()
        self._kernels.clear()
        self._resources.close()


# --- data ------------------------------------------------------------------------------------------------------------


def tile_index(tiles: ActivationTiles, device: str, tokens: Sequence[int] | None = None) -> torch.Tensor:
    """Where the words of x are in memory: [token, K block, word along K], of these tokens or of all."""
    token = torch.arange(tiles.tokens, device=device) if tokens is None else torch.tensor(tokens, device=device)
    token = token[:, None, None]
    position = torch.as_tensor(tiles.positions(), device=device)[None, None, :]
    start = (torch.arange(tiles.blocks, device=device)[None, :, None] * tiles.tokens + token) * BLOCK_WORDS
    return start + (position // 4 ^ token % _SWIZZLE_ROWS) * 4 + position % 4


def pack_tiles(tiles: ActivationTiles, x: torch.Tensor) -> torch.Tensor:
    """Words of x, float16 [tokens, K] (`ActivationTiles.pack`)."""
    padded = x.new_zeros(tiles.tokens, tiles.blocks * tiles.block_elements)
    padded[: x.shape[0], : x.shape[1]] = x
    words = torch.empty(tiles.words, dtype=torch.int32, device=x.device)
    words[tile_index(tiles, str(x.device)).reshape(-1)] = padded.view(torch.int32).reshape(-1)
    return words


def pack_fp8_tiles(tiles: ActivationTiles, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Words of FP8 activations with codes uint8 [tokens, K] and scales float32 [tokens, K / 128]."""
    words = torch.zeros(tiles.words, dtype=torch.int32, device=codes.device)
    tokens = list(range(codes.shape[0]))
    words[tile_index(tiles, str(codes.device), tokens).reshape(-1)] = codes.view(torch.int32).reshape(-1)
    words[tiles.scales_start :].view(torch.float32).view(tiles.blocks, -1)[:, : codes.shape[0]] = scales.T
    return words


def unpack_tiles(tiles: ActivationTiles, words: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
    """x, float16 [len(tokens), K], of some tokens."""
    found = words[tile_index(tiles, str(words.device), tokens).reshape(-1)]
    return found.view(torch.float16).reshape(len(tokens), -1)[:, : tiles.in_features]


def quantize(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 codes uint8 [N, K] and scales float32 [N, K / 128] of float32 weights; K is a multiple of 128."""
    groups = weights.view(weights.shape[0], -1, 128)
    scales = groups.abs().amax(2) / 448
    codes = (groups / scales[:, :, None]).to(torch.float8_e4m3fn)
    return codes.view(torch.uint8).view(weights.shape), scales


def dequantize(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weights [N, K] that codes and scales stand for."""
    values = codes.view(torch.float8_e4m3fn).to(torch.float32).view(codes.shape[0], -1, 128)
    return (values.to(dtype) * scales.to(dtype)[:, :, None]).view(codes.shape)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 error against float64; NaN if anything is NaN."""
    return float((got.double() - expected).norm() / expected.norm())
