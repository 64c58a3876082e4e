"""Which engine runs here, and why."""

from dataclasses import dataclass

from app.config import Settings
from app.domain.photo import FORMATS, PhotoReader
from app.engine.decoders import IsolatedDecoders
from app.engine.dlib_engine import DlibEngine
from app.engine.liveness import find_liveness
from app.engine.onnx_engine import OnnxEngine
from app.engine.packs import Pack, choose
from app.engine.port import FaceEngine
from app.engine.sessions import Device


@dataclass(frozen=True, slots=True)
class OpenedEngine:
    """An engine that is not loaded yet, its pack, and why it is this one."""

    engine: FaceEngine
    pack: Pack
    reason: str


def open_engine(settings: Settings, *, device: Device = "auto") -> OpenedEngine:
    """The engine that the settings name. Cheap: files are hashed, no network is loaded before `warm` or the first use.

    device: `cpu`, `cuda` (that or ModelUnavailable), or `auto`: CUDA where onnxruntime offers it and it works.
    Raises ModelUnavailable when the pack is missing, or a file is not the one that was meant.
    """
    pack, reason = choose(settings.face_model, settings.model_dir)
    liveness = find_liveness(settings.model_dir)
    engine: FaceEngine
    if pack.kind == "dlib":
        engine = DlibEngine(pack, liveness, device, processes=settings.compute_threads)
    else:
        engine = OnnxEngine(pack, liveness, device)
    return OpenedEngine(engine, pack, reason)


def open_reader(settings: Settings) -> PhotoReader:
    """What reads photos by the limits of the settings. `PhotoReader.close` ends its process."""
    return PhotoReader(
        max_pixels=settings.max_photo_pixels,
        max_jpeg_pixels=settings.max_jpeg_pixels,
        max_side=settings.max_photo_side,
        formats=frozenset(kind for kind in FORMATS if kind in settings.accepted_formats),
        isolated=IsolatedDecoders(),
    )
