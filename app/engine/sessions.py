"""ONNX Runtime sessions: one thread each, shared by all threads, on the device that was asked for.

One thread per photo and as many photos as cores: on two cores 47-51 photos a second, against 15-18 with ONNX Runtime's
own two threads and their spinning (docs/adr/0011).
"""

import os
from typing import Any, Literal, Protocol, cast

import numpy as np
import numpy.typing as npt

from app.errors import ModelUnavailable

# Faces are nobody's business but the operator's: no usage reports. Read when the native library is first loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime

#: cpu; cuda: that or nothing; auto: cuda where onnxruntime offers it and it works, else cpu.
Device = Literal["cpu", "cuda", "auto"]

Floats = npt.NDArray[np.float32]

_CUDA, _CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
_ERRORS_ONLY = 3  # SCRFD's graph names the output sizes of 640 pixels, and every other size would be a warning


class NamedTensor(Protocol):
    """An input or output of a session."""

    @property
    def name(self) -> str:
        """Its name in the graph."""


class Session(Protocol):
    """What the engine uses of an `onnxruntime.InferenceSession`; `run` may be called by many threads at once."""

    def run(self, output_names: list[str] | None, inputs: dict[str, Floats]) -> list[Floats]:
        """The named outputs (all when None)."""

    def get_inputs(self) -> list[NamedTensor]:
        """The graph's inputs."""

    def get_providers(self) -> list[str]:
        """What really runs it, most preferred first."""


class _Running:
    """A session whose failure while it runs, a card that is lost or out of memory, is told as what it is."""

    def __init__(self, session: Session, what: str) -> None:
        self._session = session
        self._what = what

    def run(self, output_names: list[str] | None, inputs: dict[str, Floats]) -> list[Floats]:
        """See Session. Raises ModelUnavailable."""
        try:
            return self._session.run(output_names, inputs)
        except Exception as error:  # onnxruntime's own kinds have no common base
            message = f"{self._what} failed while it ran"
            raise ModelUnavailable(message) from error

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - InsightFace asks for more than Session has
        return getattr(self._session, name)


def open_session(weights: bytes, *, device: Device, what: str) -> Session:
    """A session over an ONNX model's bytes.

    what: names the model in errors. Raises ModelUnavailable when the bytes do not load, or when `cuda` was asked for and
    is not what would run it: a processor in the place of a graphics card is never silent.
    """
    is_offered = _CUDA in onnxruntime.get_available_providers()
    if device == "cuda" and not is_offered:
        message = f"{what}: CUDA was asked for, and this onnxruntime does not offer it (install the extra `gpu`)"
        raise ModelUnavailable(message)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = _ERRORS_ONLY
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    wanted = [_CUDA, _CPU] if is_offered and device != "cpu" else [_CPU]
    if wanted[0] == _CUDA and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()
    try:
        # Imported here: `onnx` costs half a second and memory, and a process without networks does not need it.
        from app.engine.activations import with_quick_prelu  # noqa: PLC0415

        # CUDA's own PRelu is quick.
        model = weights if wanted[0] == _CUDA else with_quick_prelu(weights)
        loaded = onnxruntime.InferenceSession(model, sess_options=options, providers=wanted)
    except Exception as error:
        message = f"{what} does not load: {str(error).splitlines()[0]}"
        raise ModelUnavailable(message) from error
    session = cast("Session", _Running(loaded, what))
    if device == "cuda" and session.get_providers()[0] != _CUDA:
        message = f"{what}: CUDA was asked for, and onnxruntime could not start it: driver, CUDA and cuDNN must fit"
        raise ModelUnavailable(message)
    return session


def device_of(session: Session) -> Literal["cpu", "cuda"]:
    """What really runs the session."""
    return "cuda" if session.get_providers()[0] == _CUDA else "cpu"
