"""The engine for ONNX packs: SCRFD or YuNet finds, any recogniser embeds."""

import threading
from dataclasses import dataclass

import cv2
import numpy as np

from app.domain.alignment import aligned_crop
from app.domain.faces import Embedding, Face, ModelCard, Pixels
from app.engine.cards import Preprocessing
from app.engine.detectors import Detector, ScrfdDetector, YunetDetector
from app.engine.liveness import LivenessModels, LivenessWeights
from app.engine.packs import Pack
from app.engine.port import Search
from app.engine.sessions import Device, Floats, Session, device_of, open_session
from app.engine.vectors import unit_embedding
from app.errors import Advice, LowQuality, ModelUnavailable

_WARM_SIDE = 256
#: Times the 1% point of the card that a raw vector must reach to be upright. 99% of upside-down faces reach at most 1.0
#: (w600k_mbf) or 1.1 (foamliu's MobileFaceNet, where the detector's score finds the others).
UPRIGHT_LENGTH = 1.08


class Recogniser:
    """An embedding network over aligned crops; always a batch of one, so no face depends on another."""

    def __init__(self, session: Session, preprocessing: Preprocessing) -> None:
        self._session = session
        self._input = session.get_inputs()[0].name
        self._size = preprocessing.input_size
        self._channels = preprocessing.channels
        self._dimension = preprocessing.dimension
        self._mean = np.array(preprocessing.mean, dtype=np.float32)
        self._scale = np.array(preprocessing.scale, dtype=np.float32)

    def raw(self, pixels: Pixels, face: Face) -> Floats:
        """The network's own vector (d,), neither centred nor scaled. Raises ModelUnavailable on another dimension."""
        crop = aligned_crop(pixels, face.landmarks, self._size)
        ordered = crop if self._channels == "rgb" else crop[..., ::-1]
        batch = np.ascontiguousarray(((ordered - self._mean) * self._scale).transpose(2, 0, 1)[None], dtype=np.float32)
        vector = self._session.run(None, {self._input: batch})[0].reshape(-1)
        if vector.shape != (self._dimension,):
            message = f"the recogniser gives {vector.size} numbers, its pack says {self._dimension}"
            raise ModelUnavailable(message)
        return vector


@dataclass(frozen=True, slots=True)
class _Loaded:
    detector: Detector
    recogniser: Recogniser
    liveness: LivenessModels | None
    device: str


class OnnxEngine:
    """A FaceEngine over an ONNX pack. Making one is cheap; the weights are loaded by `warm` or the first use."""

    def __init__(self, pack: Pack, liveness: tuple[LivenessWeights, ...], device: Device) -> None:
        self._pack = pack
        self._liveness = liveness
        self._device: Device = device
        self._mean = None if pack.centring_mean is None else np.array(pack.centring_mean, dtype=np.float32)
        self._lock = threading.Lock()
        self._loaded: _Loaded | None = None

    @property
    def card(self) -> ModelCard:
        """The model's card."""
        return self._pack.card

    @property
    def has_liveness(self) -> bool:
        """Whether both liveness models are there."""
        return bool(self._liveness)

    @property
    def device(self) -> str:
        """What runs the recogniser: `cpu` or `cuda`; loads the weights to know."""
        return self._ready().device

    def warm(self) -> None:
        """Load the weights and run each network once. Raises ModelUnavailable when a file is missing, cut or another."""
        loaded = self._ready()
        grey = np.full((_WARM_SIDE, _WARM_SIDE, 3), 128, dtype=np.uint8)
        loaded.detector.detect(grey)
        middle = _WARM_SIDE / 2
        landmarks = np.array([[-30, -30], [30, -30], [0, 0], [-25, 30], [25, 30]], dtype=np.float32) + np.float32(
            middle
        )
        face = Face((middle - 50, middle - 50, 100.0, 100.0), landmarks, 1.0)
        loaded.recogniser.raw(grey, face)
        if loaded.liveness is not None:
            loaded.liveness.score(grey, face)

    def detect(self, pixels: Pixels, *, search: Search = "usual") -> list[Face]:
        """All upright faces in these pixels, largest first."""
        return self._ready().detector.detect(pixels, search=search)

    def is_upright(self, face: Face, length: float | None) -> bool:
        """Whether score and length are high enough; the score alone, if the face or the card has no length."""
        detector, usual = self._ready().detector, self.card.usual_length
        if length is None or usual is None:
            return face.detection_score >= detector.upright_score
        is_long = face.detection_score >= detector.upright_score_of_long and length >= UPRIGHT_LENGTH * usual[0]
        # Both together, if the score adds something to the length: none of 1,419 turned copies and 551 negatives has both.
        tells = detector.upright_score > detector.upright_score_of_long
        return is_long or (tells and face.detection_score >= detector.upright_score and length >= usual[0])

    def embed(self, pixels: Pixels, face: Face) -> tuple[Embedding, float]:
        """The face's unit embedding and the raw vector's length; LowQuality when the face has no usable features."""
        try:
            raw = self._ready().recogniser.raw(pixels, face)
        except ValueError as error:
            advice = Advice("photo", "no-features", "The eyes, nose and mouth cannot be told apart. Face the camera.")
            message = "The face's landmarks do not fit a face."
            raise LowQuality(message, errors=(advice,)) from error
        return unit_embedding(raw, self._mean)

    def liveness(self, pixels: Pixels, face: Face) -> float | None:
        """The mean of the two models' probability of a live face; None without them."""
        models = self._ready().liveness
        return None if models is None else models.score(pixels, face)

    def close(self) -> None:
        """Let go of the networks."""
        with self._lock:
            self._loaded = None

    def _ready(self) -> _Loaded:
        loaded = self._loaded
        if loaded is not None:
            return loaded
        with self._lock:
            if self._loaded is None:
                self._loaded = self._load()
            return self._loaded

    def _load(self) -> _Loaded:
        # OpenCV's own threads would fight with the executor's: one thread per photo.
        cv2.setNumThreads(1)
        # YuNet makes OpenCV 5 warn of a target that nobody asked for, once a thread.
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)
        pack = self._pack
        # Both are read and checked before either is loaded.
        detector_weights, recogniser_weights = pack.detector.read(), pack.recogniser.read()
        detector: Detector
        if pack.detector_kind == "scrfd":
            session = open_session(detector_weights, device=self._device, what=pack.detector.path.name)
            detector = ScrfdDetector(session, pack.detection_sizes)
        else:
            detector = YunetDetector(detector_weights, pack.detection_sizes)
        recogniser = open_session(recogniser_weights, device=self._device, what=pack.recogniser.path.name)
        models = LivenessModels(self._liveness, self._device) if self._liveness else None
        return _Loaded(detector, Recogniser(recogniser, pack.preprocessing), models, device_of(recogniser))
