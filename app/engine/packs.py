"""Packs: folders of weights, what they hold, and which one is used.

A folder with a `pack.toml` says everything itself. InsightFace's release folders need none: their networks are told
apart by their graphs, never by file names. `dlib` is built in, its weights come from a package.
"""

import hashlib
import importlib.util
import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.domain.alignment import ALIGNMENT
from app.domain.faces import ModelCard, RatePoint
from app.engine.cards import CardData, Preprocessing, Sha256, generic_card, known_recogniser
from app.engine.graphs import Graph, NotOnnx, read_graph
from app.errors import ModelUnavailable

Kind = Literal["insightface", "opencv", "dlib"]
DetectorKind = Literal["scrfd", "yunet", "dlib-hog"]

MANIFEST = "pack.toml"
DLIB = "dlib"
CONTRACT_PREFIX = b"idem-model-contract-1\n"

#: 320 first: a selfie is a close-up, and at 640 SCRFD-500M misses most of those (docs/adr/0012).
SCRFD_SIZES = (320, 640, 160)
#: YuNet takes photos at their own size; a longer side than this only costs time.
YUNET_SIZES = (640,)
#: Long side that dlib's HOG detector looks at; doubled once when nothing is found.
HOG_SIZES = (640,)

#: Best first, for `auto`. The heavier recogniser wins: a wrong match costs more than 50 ms.
INSIGHTFACE_PREFERENCE = ("buffalo_l", "antelopev2", "buffalo_m", "buffalo_s", "buffalo_sc")

#: Digests that InsightFace publishes for its release files (server/backend/insightface_server/models/packages.py).
#: A file of such a name with other bytes is a cut download or something else under a trusted name.
OFFICIAL_DIGESTS = {
    "det_500m.onnx": "5e4447f50245bbd7966bd6c0fa52938c61474a04ec7def48753668a9d8b4ea3a",
    "det_2.5g.onnx": "041f73f47371333d1d17a6fee6c8ab4e6aecabefe398ff32cca4e2d5eaee0af9",
    "det_10g.onnx": "5838f7fe053675b1c7a08b633df49e7af5495cee0493c7dcf6697200b85b5b91",
    "scrfd_10g_bnkps.onnx": "5838f7fe053675b1c7a08b633df49e7af5495cee0493c7dcf6697200b85b5b91",
    "w600k_mbf.onnx": "9cc6e4a75f0e2bf0b1aed94578f144d15175f357bdc05e815e5c4a02b319eb4f",
    "w600k_r50.onnx": "4c06341c33c2ca1f86781dab0e829f88ad5b64be9fba56e56bc9ebdefc619e43",
    "glintr100.onnx": "4ab1d6435d639628a6f3e5008dd4f929edf4c4124b1a7169e1048f9fef534cdf",
}

#: Part of dlib's contract, as ALIGNMENT is of the others'.
DLIB_ALIGNMENT = "dlib-chip-150-2"
DLIB_PREDICTOR = (
    "shape_predictor_5_face_landmarks.dat",
    "c4b1e9804792707d3a405c2c16a80a20269e6675021f64a41d30fffafbc41888",
)
DLIB_RECOGNISER = (
    "dlib_face_recognition_resnet_model_v1.dat",
    "55533b28a95800a551ba546ba62fe69625c7e95a7061c338adffead08719da30",
)

_SCRFD_OUTPUTS = (9, 15)  # with landmarks; the variants with 6 and 10 outputs have none
_YUNET_OUTPUTS = 12
_CROP_SIDES = (112, 128)
_EMBEDDING_DIMENSIONS = range(64, 2049)


@dataclass(frozen=True, slots=True)
class Weights:
    """A file of weights and the SHA-256 that its bytes have."""

    path: Path
    sha256: str

    def read(self) -> bytes:
        """The bytes, checked. Raises ModelUnavailable when they are missing or not those of the digest."""
        try:
            data = self.path.read_bytes()
        except OSError as error:
            message = f"{self.path.name} cannot be read: {error.strerror}"
            raise ModelUnavailable(message) from error
        found = hashlib.sha256(data).hexdigest()
        if found != self.sha256:
            raise ModelUnavailable(_digest_message(self.path.name, self.sha256, found))
        return data


@dataclass(frozen=True, slots=True)
class Pack:
    """A detector and a recogniser that belong together, with all that their contract holds."""

    name: str
    kind: Kind
    detector_kind: DetectorKind
    detection_sizes: tuple[int, ...]
    detector: Weights
    recogniser: Weights
    preprocessing: Preprocessing
    centring_mean: tuple[float, ...] | None
    card: ModelCard


@dataclass(frozen=True, slots=True)
class FoundPack:
    """A folder under the model directory: usable with its pack, or the reason why not."""

    name: str
    folder: Path | None
    pack: Pack | None
    reason: str

    @property
    def is_usable(self) -> bool:
        """Whether `pack` is there."""
        return self.pack is not None


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _DetectorEntry(_Strict):
    kind: Literal["scrfd", "yunet"]
    file: str
    sha256: Sha256
    sizes: Annotated[tuple[Annotated[int, Field(ge=64, le=1920, multiple_of=32)], ...] | None, Field(min_length=1)] = (
        None
    )


class _RecogniserEntry(Preprocessing):
    file: str
    sha256: Sha256
    centring_mean_file: str | None = None


class _Manifest(_Strict):
    """`pack.toml`; paths are relative to it, or absolute."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")] | None = None
    kind: Literal["insightface", "opencv"]
    detector: _DetectorEntry
    recogniser: _RecogniserEntry
    card: CardData | None = None
    licence: str | None = None
    commercial_use: bool | None = None


class _Unusable(Exception):
    """Why a folder is not a pack."""


def sha256_of(path: Path) -> str:
    """The file's SHA-256 in hex. Raises OSError when it cannot be read."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def discover(model_dir: Path) -> list[FoundPack]:
    """Every folder of the model directory that holds ONNX files or a manifest, and `dlib`; usable ones with their pack."""
    folders = sorted(path for path in model_dir.iterdir() if path.is_dir()) if model_dir.is_dir() else []
    found = [_look(folder) for folder in folders if folder.name != "liveness" and _holds_models(folder)]
    return [*found, _look_at_dlib()]


def choose(face_model: str, model_dir: Path) -> tuple[Pack, str]:
    """The pack to use, and why it is this one.

    `auto`: an InsightFace pack, else OpenCV's, else dlib. A name: that pack and no other; raises ModelUnavailable when it
    is missing or its files are not the ones that its manifest or publisher names (with both digests).
    """
    if face_model != "auto":
        return _named(face_model, model_dir), f"{face_model}: asked for by name"
    found = discover(model_dir)
    usable = [entry.pack for entry in found if entry.pack is not None]
    passed_over = "; ".join(f"{entry.name}: {entry.reason}" for entry in found if entry.pack is None)
    for kind, label in (
        ("insightface", "an InsightFace pack"),
        ("opencv", "an OpenCV pack"),
        ("dlib", "the built-in floor"),
    ):
        candidates = sorted((pack for pack in usable if pack.kind == kind), key=lambda pack: _preference(pack.name))
        if candidates:
            reason = f"{candidates[0].name}: {label}, chosen by FACE_MODEL=auto in {model_dir}"
            return candidates[0], f"{reason} (not usable: {passed_over})" if passed_over else reason
    message = f"no face model is usable: {passed_over}"
    raise ModelUnavailable(message)


def _preference(name: str) -> tuple[int, str]:
    known = INSIGHTFACE_PREFERENCE
    return (known.index(name) if name in known else len(known), name)


def _named(name: str, model_dir: Path) -> Pack:
    if name == DLIB:
        entry = _look_at_dlib()
    else:
        matches = [
            entry for entry in discover(model_dir) if name in (entry.name, entry.folder.name if entry.folder else "")
        ]
        if not matches:
            message = (
                f"the pack {name!r} is not in {model_dir}: `idem models list` shows what is, `idem models pull` fetches"
            )
            raise ModelUnavailable(message)
        entry = next((match for match in matches if match.pack), matches[0])
    if entry.pack is None:
        message = f"the pack {name!r} cannot be used: {entry.reason}"
        raise ModelUnavailable(message)
    return entry.pack


def _holds_models(folder: Path) -> bool:
    return (folder / MANIFEST).is_file() or any(folder.glob("*.onnx"))


def _look(folder: Path) -> FoundPack:
    manifest = folder / MANIFEST
    try:
        pack = _from_manifest(manifest) if manifest.is_file() else _from_graphs(folder)
    except (_Unusable, NotOnnx) as error:
        return FoundPack(folder.name, folder, None, str(error))
    except OSError as error:
        return FoundPack(folder.name, folder, None, f"cannot be read: {error.strerror}")
    return FoundPack(pack.name, folder, pack, "its manifest" if manifest.is_file() else "told by its graphs")


def _from_manifest(file: Path) -> Pack:
    try:
        manifest = _Manifest.model_validate(tomllib.loads(file.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        message = f"{MANIFEST} is not TOML: {error}"
        raise _Unusable(message) from error
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}" for fault in error.errors()
        )
        message = f"{MANIFEST} does not fit: {faults}"
        raise _Unusable(message) from error
    detector, recogniser = manifest.detector, manifest.recogniser
    known = known_recogniser(recogniser.sha256)
    data: CardData = manifest.card or known or generic_card()
    mean = data.centring_mean
    if recogniser.centring_mean_file is not None:
        mean = _mean_from(file.parent / recogniser.centring_mean_file)
    default_sizes = SCRFD_SIZES if detector.kind == "scrfd" else YUNET_SIZES
    return _assemble(
        name=manifest.name or file.parent.name,
        kind=manifest.kind,
        detector_kind=detector.kind,
        detection_sizes=detector.sizes or default_sizes,
        detector=_checked(file.parent / detector.file, detector.sha256),
        recogniser=_checked(file.parent / recogniser.file, recogniser.sha256),
        preprocessing=Preprocessing.model_validate(recogniser.model_dump(include=set(Preprocessing.model_fields))),
        centring_mean=mean,
        data=data,
        licence=manifest.licence,
        commercial_use=manifest.commercial_use,
    )


def _mean_from(file: Path) -> tuple[float, ...]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return tuple(float(value) for value in values)
    except (ValueError, TypeError) as error:
        message = f"{file.name} must be a JSON list of numbers"
        raise _Unusable(message) from error


def _from_graphs(folder: Path) -> Pack:
    detectors: list[tuple[Path, DetectorKind]] = []
    recognisers: list[tuple[Path, Graph]] = []
    for file in sorted(folder.glob("*.onnx")):
        graph = read_graph(file)
        detector_kind = _detector_kind(graph)
        if detector_kind is not None:
            detectors.append((file, detector_kind))
        elif _is_recogniser(graph):
            recognisers.append((file, graph))
    if len(detectors) != 1 or len(recognisers) != 1:
        held = f"{len(detectors)} face detectors and {len(recognisers)} recognisers"
        message = f"it holds {held}, where one of each is needed; a {MANIFEST} may say which"
        raise _Unusable(message)
    (detector_file, detector_kind), (recogniser_file, graph) = detectors[0], recognisers[0]
    detector, recogniser = _official(detector_file), _official(recogniser_file)
    known = known_recogniser(recogniser.sha256)
    if known is None and detector_kind == "yunet":
        unknown = f"{recogniser_file.name} is not known by its SHA-256 ({recogniser.sha256})"
        message = f"{unknown}: a {MANIFEST} must say how it wants pixels"
        raise _Unusable(message)
    preprocessing = known.preprocessing if known else None
    return _assemble(
        name=folder.name,
        kind="insightface" if detector_kind == "scrfd" else "opencv",
        detector_kind=detector_kind,
        detection_sizes=SCRFD_SIZES if detector_kind == "scrfd" else YUNET_SIZES,
        detector=detector,
        recogniser=recogniser,
        preprocessing=preprocessing or _arcface_preprocessing(graph),
        centring_mean=known.centring_mean if known else None,
        data=known or generic_card(),
    )


def _detector_kind(graph: Graph) -> DetectorKind | None:
    if len(graph.inputs) != 1 or len(graph.inputs[0].shape) != 4:  # noqa: PLR2004 - NCHW
        return None
    if len(graph.outputs) in _SCRFD_OUTPUTS:
        return "scrfd"
    return "yunet" if len(graph.outputs) == _YUNET_OUTPUTS else None


def _is_recogniser(graph: Graph) -> bool:
    if len(graph.inputs) != 1 or len(graph.outputs) != 1:
        return False
    shape, output = graph.inputs[0].shape, graph.outputs[0].shape
    is_crop = len(shape) == 4 and shape[2] == shape[3] and shape[2] in _CROP_SIDES  # noqa: PLR2004 - NCHW
    return is_crop and len(output) == 2 and output[1] in _EMBEDDING_DIMENSIONS  # noqa: PLR2004 - (n, d)


def _arcface_preprocessing(graph: Graph) -> Preprocessing:
    """InsightFace's own rule (ArcFaceONNX): a graph that begins with a subtraction and a product normalises by itself."""
    has_subtraction = any(name.startswith(("Sub", "_minus")) for name in graph.first_nodes)
    has_product = any(name.startswith(("Mul", "_mul")) for name in graph.first_nodes)
    size, dimension = graph.inputs[0].shape[2], graph.outputs[0].shape[1]
    if has_subtraction and has_product:
        return Preprocessing(input_size=size, dimension=dimension, mean=(0, 0, 0), scale=(1, 1, 1))
    return Preprocessing(input_size=size, dimension=dimension)


def _official(file: Path) -> Weights:
    found = sha256_of(file)
    expected = OFFICIAL_DIGESTS.get(file.name)
    if expected is not None and found != expected:
        raise _Unusable(_digest_message(file.name, expected, found))
    return Weights(file, found)


def _checked(file: Path, expected: str) -> Weights:
    if not file.is_file():
        message = f"{file.name} is missing (expected SHA-256 {expected})"
        raise _Unusable(message)
    found = sha256_of(file)
    if found != expected:
        raise _Unusable(_digest_message(file.name, expected, found))
    return Weights(file, found)


def _digest_message(name: str, expected: str, found: str) -> str:
    return f"{name} is not the file that was meant: expected SHA-256 {expected}, found {found}"


def _look_at_dlib() -> FoundPack:
    # Found by path: importing face_recognition_models needs pkg_resources, which new setuptools do not bring.
    spec = importlib.util.find_spec("face_recognition_models")
    if spec is None or not spec.submodule_search_locations:
        return FoundPack(DLIB, None, None, "the package face_recognition_models is not installed")
    folder = Path(spec.submodule_search_locations[0]) / "models"
    try:
        predictor = _checked(folder / DLIB_PREDICTOR[0], DLIB_PREDICTOR[1])
        recogniser = _checked(folder / DLIB_RECOGNISER[0], DLIB_RECOGNISER[1])
    except _Unusable as error:
        return FoundPack(DLIB, folder, None, str(error))
    data = known_recogniser(recogniser.sha256)
    if data is None or data.centring_mean is None:  # pragma: no cover - the card is part of the product
        return FoundPack(DLIB, folder, None, "its card is missing")
    pack = _assemble(
        name=DLIB,
        kind="dlib",
        detector_kind="dlib-hog",
        detection_sizes=HOG_SIZES,
        detector=predictor,
        recogniser=recogniser,
        preprocessing=Preprocessing(input_size=150, mean=(0, 0, 0), scale=(1, 1, 1), dimension=128),
        centring_mean=data.centring_mean,
        data=data,
    )
    return FoundPack(DLIB, folder, pack, "built in")


def _assemble(  # noqa: PLR0913 - a pack is made in one place, from named parts
    *,
    name: str,
    kind: Kind,
    detector_kind: DetectorKind,
    detection_sizes: Sequence[int],
    detector: Weights,
    recogniser: Weights,
    preprocessing: Preprocessing,
    centring_mean: tuple[float, ...] | None,
    data: CardData,
    licence: str | None = None,
    commercial_use: bool | None = None,
) -> Pack:
    if centring_mean is not None and len(centring_mean) != preprocessing.dimension:
        message = f"the centring mean has {len(centring_mean)} values, the embedding {preprocessing.dimension}"
        raise _Unusable(message)
    contract = _contract(
        detector_kind=detector_kind,
        detection_sizes=tuple(detection_sizes),
        detector=detector,
        recogniser=recogniser,
        preprocessing=preprocessing,
        centring_mean=centring_mean,
    )
    card = ModelCard(
        pack=name,
        kind=kind,
        dimension=preprocessing.dimension,
        contract=contract,
        licence=licence or data.licence,
        commercial_use=data.commercial_use if commercial_use is None else commercial_use,
        impostor_curve=tuple(RatePoint(fmr, threshold) for fmr, threshold in data.impostor_curve),
        source=data.source,
        verify_fmr=data.verify_fmr,
        identify_fpir=data.identify_fpir,
        dedup_fpir=data.dedup_fpir,
        notes=data.notes,
        usual_length=data.usual_length,
    )
    return Pack(
        name, kind, detector_kind, tuple(detection_sizes), detector, recogniser, preprocessing, centring_mean, card
    )


def _contract(
    *,
    detector_kind: DetectorKind,
    detection_sizes: tuple[int, ...],
    detector: Weights,
    recogniser: Weights,
    preprocessing: Preprocessing,
    centring_mean: tuple[float, ...] | None,
) -> str:
    """The identity of an embedding: any change of what follows makes another space.

    The pack's name, its licence and its rates are not in it: they change no vector.
    """
    parts = {
        "detector": {"kind": detector_kind, "sha256": detector.sha256, "sizes": list(detection_sizes)},
        "recogniser": {"sha256": recogniser.sha256, "dimension": preprocessing.dimension},
        "alignment": DLIB_ALIGNMENT if detector_kind == "dlib-hog" else ALIGNMENT,
        "input": {
            "size": preprocessing.input_size,
            "mean": list(preprocessing.mean),
            "scale": list(preprocessing.scale),
            "channels": preprocessing.channels,
        },
        "normalisation": "l2",
        "centring": None if centring_mean is None else list(centring_mean),
    }
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
    return "sha256:" + hashlib.sha256(CONTRACT_PREFIX + canonical).hexdigest()
