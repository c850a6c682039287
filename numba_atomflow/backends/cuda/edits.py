"""Edits of activations by device functions: compiled for the GPU, and captured into decode steps.

A device function has two ways to run. In a step with an observer, as every prompt under edits is, it gets rows that
were copied to the host, and back; any layout of activations will do. In a captured decode step it works in place: its
kernel follows the op's, so that steps run ahead of the host as they do without edits. Such decode steps are those of
the graph path, kernel after kernel, also where others run in the persistent kernel.
"""

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from numba_atomflow.backends.cuda.graphs import StepGraphs
from numba_atomflow.backends.cuda.model import DeviceModel
from numba_atomflow.backends.hooks import LEAST_LOGIT, Rows
from numba_atomflow.device.resources import DeviceResources, Resources
from numba_atomflow.errors import BackendError, OptionError
from numba_atomflow.files.untrusted import short
from numba_atomflow.memory.view import View
from numba_atomflow.model.activations import Activation
from numba_atomflow.model.step import SAMPLE, Op
from numba_atomflow.ops.cuda.runtime.build import assemble, make_ptx
from numba_atomflow.ops.cuda.runtime.graph import Graph
from numba_atomflow.ops.cuda.runtime.launch import Kernel, Launch
from numba_atomflow.ops.cuda.runtime.loaded import LoadedKernels
from numba_atomflow.ops.cuda.token.edit import EditArguments, HalfEditArguments, edit_spec, make_edit

_ROWS = 64  # of a prompt's chunk, edited at a time
_CAUSE = re.compile(r"(?:\w+Error: |(?<=ptxas error   : )).*")
_COLOURS = re.compile(r"\x1b\[[\d;]*m")


class DeviceEdit:
    """A device function for one activation. It can be called like an edit on the host."""

    def __init__(self, activation: Activation, function: Any, block: "EditBlock") -> None:
        self.activation, self.function, self.block = activation, function, block

    def __call__(self, rows: Rows, position: int) -> Rows:
        """What the function makes of rows [tokens, width] on the host."""
        return self.block.run(self, rows, position)

    def launch(self, op: Op, position: View) -> Launch:
        """The launch that follows the op in a decode step. position: [1], of the step's token."""
        return self.block.in_place(self, op, position)


class EditBlock:
    """The device functions of one `with engine.edit(...)`, and the memory that they need.

    Args:
        edits: activations and functions.

    Attributes:
        edits: the same, compiled.

    Raises:
        OptionError: a function cannot be compiled.
        BackendError: the GPU has too little memory.
    """

    def __init__(
        self,
        model: DeviceModel,
        owner: DeviceResources,
        capability: tuple[int, int],
        edits: Sequence[tuple[Activation, Any]],
    ) -> None:
        self._model, self._owner, self._capability = model, owner, capability
        self._kernels: dict[tuple[Any, bool, bool], Kernel] = {}
        with owner.current(), ExitStack() as on_error:
            self._resources: Resources = on_error.enter_context(owner.resources.scope(model.stream))
            width = max(activation.width for activation, _ in edits)
            self._values, self._old = (self._allocate((_ROWS, width), "float32") for _ in range(2))
            self._position, self.fault = self._allocate((1,), "int64"), self._allocate((1,), "int32")
            model.memory.write(self.fault, np.zeros(1, np.int32))
            self.edits = [(activation, DeviceEdit(activation, function, self)) for activation, function in edits]
            for _, edit in self.edits:
                self._kernel(edit, half=False)  # what cannot be compiled is refused before anything runs
            self._release = on_error.pop_all()

    def close(self) -> None:
        """Free the memory and the kernels, once the steps that are queued have ended."""
        with self._owner.current():
            self._release.close()

    def run(self, edit: DeviceEdit, rows: Rows, position: int) -> Rows:
        """An edit of rows on the host."""
        memory, (count, width) = self._model.memory, rows.shape
        edited = np.empty_like(rows)
        with self._owner.current():
            for start in range(0, count, _ROWS):
                part = rows[start : start + _ROWS]
                values = View("edit.values", self._values.address, part.shape, "float32")
                memory.write(values, part)
                memory.write(self._position, np.array([position + start]))
                arguments = EditArguments(values, self._old, self._position, self.fault, width, width, is_cached=0)
                Launch(self._kernel(edit, half=False), len(part), arguments, self._model.stream).run()
                edited[start : start + _ROWS] = memory.read(values)
        return edited

    def in_place(self, edit: DeviceEdit, op: Op, position: View) -> Launch:
        """The launch that edits what the op of a decode step has written.

        Raises:
            BackendError: no kernel reads the activation's number format.
        """
        activation = edit.activation
        view: View = getattr(op, activation.field)
        item = np.dtype(view.dtype).itemsize
        pitch, cached = view.strides[0] // item, int(activation.is_cached)
        rest = self._old, position, self.fault, activation.width, pitch, cached
        match view.dtype:
            case "float32":
                return Launch(self._kernel(edit, half=False), 1, EditArguments(view, *rest), self._model.stream)
            case "float16":
                return Launch(self._kernel(edit, half=True), 1, HalfEditArguments(view, *rest), self._model.stream)
        raise BackendError(
            f"{activation.name} is {view.dtype} here, which device functions cannot edit; "
            "use a function of NumPy arrays."
        )

    def has_failed(self) -> bool:
        """Whether a function has returned NaN or infinity since the last call; waits for the steps that are queued."""
        with self._owner.current():
            failed = bool(self._model.memory.read(self.fault)[0])
            if failed:
                self._model.memory.write(self.fault, np.zeros(1, np.int32))
        return failed

    def _allocate(self, shape: tuple[int, ...], dtype: str) -> View:
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return View("edit", int(self._resources.call("cuMemAlloc", nbytes, undo="cuMemFree")), shape, dtype)

    def _kernel(self, edit: DeviceEdit, *, half: bool) -> Kernel:
        is_logits = edit.activation.name == "logits"
        key = edit.function, is_logits, half
        if key not in self._kernels:
            spec = edit_spec(half=half)
            code = compile_edit(edit, float(LEAST_LOGIT) if is_logits else None, self._capability, half=half)
            self._kernels[key] = Kernel(spec, code, self._resources)
        return self._kernels[key]


def compile_edit(edit: DeviceEdit, least: float | None, capability: tuple[int, int], *, half: bool) -> bytes:
    """Machine code of the kernel of an edit.

    Args:
        least: as in `make_edit`.

    Raises:
        OptionError: the function cannot be compiled.
    """
    try:
        ptx = make_ptx(make_edit(edit.function, least, half=half), edit_spec(half=half), capability)
        return assemble(ptx, capability)[0]
    except Exception as error:  # whatever numba and the assembler find in the caller's function
        raise OptionError(
            f"The device function of {edit.activation.name} cannot be compiled ({short(_reason(error))}); it must take "
            "(row, column, position) and return a number."
        ) from error


def _reason(error: Exception) -> str:
    """The line of a compiler's message that names the cause."""
    text = _COLOURS.sub("", str(error))
    if cause := _CAUSE.search(text):
        return cause[0].rstrip('". ')
    lines = (line.strip() for line in text.splitlines())
    return next((line for line in lines if line and not line.startswith("Failed in")), type(error).__name__)


class DeviceEdits:
    """Edits by device functions, of one backend.

    Args:
        loaded: kernels by name.
        capture: replay graphs; otherwise kernels are launched one by one.
    """

    def __init__(
        self,
        model: DeviceModel,
        graphs: StepGraphs,
        loaded: LoadedKernels,
        owner: DeviceResources,
        capability: tuple[int, int],
        *,
        capture: bool,
    ) -> None:
        self._model, self._graphs, self._loaded, self._owner = model, graphs, loaded, owner
        self._capability, self._capture = capability, capture
        self._captured: Sequence[tuple[Activation, DeviceEdit]] = ()
        self._release = ExitStack()  # of the captured steps

    def compile(self, edits: Sequence[tuple[Activation, Any]]) -> EditBlock:
        """The edits of a block, ready to run."""
        return EditBlock(self._model, self._owner, self._capability, edits)

    def capture(self, edits: Sequence[tuple[Activation, DeviceEdit]]) -> None:
        """Make decode steps run under these edits, in this order; without any, as they were."""
        with self._owner.current():
            self._graphs.edited_decode = None
            self._release.close()
            self._captured = edits
            if edits:
                resources = self._release.enter_context(self._owner.resources.scope(self._model.stream))
                self._graphs.edited_decode = self._runner(edits, resources)

    def check(self) -> None:
        """Raise if a function has returned what no step can go on with.

        Raises:
            OptionError: it has.
        """
        for block in {edit.block for _, edit in self._captured}:
            if block.has_failed():
                names = " or ".join(dict.fromkeys(activation.name for activation, _ in block.edits))
                raise OptionError(
                    f"The edit of {short(names)} returned NaN, infinity, or a number too large for the activation; "
                    "it must return finite ones."
                )

    def _runner(self, edits: Sequence[tuple[Activation, DeviceEdit]], resources: Resources) -> Callable[[], None]:
        """What puts a decode step under these edits into the stream."""
        kernels = self._model.kernels
        self._loaded.require(kernel.spec for kernel in [*kernels.layer_kernels(1), kernels.planned["lm_head_x1"]])
        graphs: dict[bool, Graph] = {}  # by whether log-probabilities are computed

        def run() -> None:
            logprobs = self._graphs.logprobs
            if not self._capture:
                for launch in self._launches(edits, logprobs):
                    launch.run()
                return
            if logprobs not in graphs:
                graphs[logprobs] = Graph(self._launches(edits, logprobs), self._model.stream, resources)
            graphs[logprobs].replay()

        return run

    def _launches(self, edits: Sequence[tuple[Activation, DeviceEdit]], logprobs: bool) -> list[Launch]:
        """The launches of a decode step under these edits."""
        position, launches = self._model.buffers["position"], list[Launch]()
        for op in self._model.step(1, SAMPLE):
            launches += self._graphs.bind(op, sampled=True, logprobs=logprobs)
            launches += [edit.launch(op, position) for activation, edit in edits if activation.op == op.name]
        return launches
