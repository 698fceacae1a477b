"""The largest face of a picture is described; what is missing, the extra or files, is said in a sentence."""

import socket
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.faces import Face, FaceAnalyser, draw_keypoints
from schemas.errors import AssetError

KEYPOINTS = [[40.0, 40.0], [80.0, 40.0], [60.0, 60.0], [45.0, 80.0], [75.0, 80.0]]
GREY = Image.new("RGB", (128, 128), "grey")


def found(left: float, top: float, right: float, bottom: float, size: int = 512) -> Any:
    """A face as insightface gives it; its first number is its left side."""
    embedding = np.zeros(size, np.float32)
    embedding[:2] = left, 4
    return SimpleNamespace(
        embedding=embedding,
        kps=np.array(KEYPOINTS, np.float32),
        bbox=np.array([left, top, right, bottom], np.float32),
    )


class Faces:
    """An analysis that finds the same faces in every picture."""

    def __init__(self, *faces: Any) -> None:
        self.faces = faces
        self.seen: list[np.ndarray[Any, Any]] = []

    def get(self, picture: np.ndarray[Any, Any]) -> Sequence[Any]:
        self.seen.append(picture)
        return list(self.faces)


def test_a_face_is_described_by_tensors() -> None:
    face = FaceAnalyser(Faces(found(3, 5, 23, 45))).largest(GREY)
    assert face is not None
    assert (face.embedding.shape, face.embedding.dtype) == ((512,), torch.float32)
    assert face.embedding[:3].tolist() == [3, 4, 0]
    assert face.normed[:3].tolist() == pytest.approx([0.6, 0.8, 0])
    assert (face.keypoints.tolist(), face.keypoints.dtype) == (KEYPOINTS, torch.float32)
    assert face.box == (3, 5, 23, 45)
    assert face.area == 800


def test_of_several_faces_the_largest_is_taken() -> None:
    small, wide, tall = found(1, 0, 11, 10), found(2, 0, 62, 10), found(3, 0, 13, 50)
    for faces in ((small, wide, tall), (tall, wide, small), (wide, small)):
        face = FaceAnalyser(Faces(*faces)).largest(GREY)
        assert face is not None
        assert face.embedding[0] == 2


def test_a_picture_without_a_face_has_none() -> None:
    assert FaceAnalyser(Faces()).largest(GREY) is None


def test_the_analysis_sees_blue_first() -> None:
    faces = Faces()
    FaceAnalyser(faces).largest(Image.new("RGB", (6, 4), (10, 20, 30)))
    (seen,) = faces.seen
    assert (seen.shape, seen.dtype) == ((4, 6, 3), np.uint8)
    assert seen.flags["C_CONTIGUOUS"]
    assert seen[0, 0].tolist() == [30, 20, 10]


def test_a_recogniser_of_another_kind_is_refused() -> None:
    with pytest.raises(AssetError) as refusal:
        FaceAnalyser(Faces(found(1, 2, 3, 4, size=256))).largest(GREY)
    assert refusal.value.message == "The face analysis describes a face by 256 numbers, not 512."
    assert refusal.value.kind == "invalid_weights"


class RuntimeFault(Exception):
    """As ONNX Runtime's: of no base but Exception."""


class Library:
    """insightface and ONNX Runtime, as far as loading touches them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tasks = ["detection", "recognition"]
        self.fault: Exception | None = None
        self.available = ["CUDAExecutionProvider", "CPUExecutionProvider"]
        self.made: list[dict[str, Any]] = []
        self.prepared: list[dict[str, Any]] = []
        for name in ("insightface", "insightface.app", "onnxruntime", "onnxruntime.capi"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        name = "onnxruntime.capi.onnxruntime_pybind11_state"
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        vars(sys.modules[name])["InvalidProtobuf"] = RuntimeFault
        vars(sys.modules["insightface.app"])["FaceAnalysis"] = self.analysis
        vars(sys.modules["onnxruntime"])["get_available_providers"] = lambda: self.available

    def analysis(self, **given: Any) -> Any:
        self.made.append(given)
        if self.fault is not None:
            raise self.fault
        models = dict.fromkeys(self.tasks)
        return SimpleNamespace(models=models, prepare=lambda **how: self.prepared.append(how))


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    return Library(monkeypatch)


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    for name in ("det_10g.onnx", "w600k_r50.onnx"):
        (tmp_path / name).write_bytes(b"a model")
    return tmp_path


def refusal_of(folder: Path) -> tuple[str, str]:
    with pytest.raises(AssetError) as refusal:
        FaceAnalyser.load(folder, "cpu")
    return refusal.value.message, refusal.value.kind


def test_a_pack_is_loaded_from_its_folder(library: Library, pack: Path) -> None:
    assert isinstance(FaceAnalyser.load(pack, "cpu"), FaceAnalyser)
    (made,) = library.made
    assert made["name"] == str(pack.resolve())  # of a folder that is there, insightface fetches nothing
    assert made["allowed_modules"] == ["detection", "recognition"]
    assert made["providers"] == ["CPUExecutionProvider"]
    assert library.prepared == [{"ctx_id": 0, "det_size": (640, 640)}]


@pytest.mark.parametrize(
    ("device", "available", "expected"),
    [
        ("cuda:1", ["CUDAExecutionProvider"], [("CUDAExecutionProvider", {"device_id": 1})]),
        ("cuda", ["CUDAExecutionProvider"], [("CUDAExecutionProvider", {"device_id": 0})]),
        ("cuda", ["AzureExecutionProvider"], []),  # a runtime without CUDA
        ("cpu", ["CUDAExecutionProvider"], []),
    ],
)
def test_it_runs_on_the_device_if_the_runtime_can(
    library: Library, pack: Path, device: str, available: list[str], expected: list[Any]
) -> None:
    library.available = [*available, "CPUExecutionProvider"]
    FaceAnalyser.load(pack, device)
    assert library.made[0]["providers"] == [*expected, "CPUExecutionProvider"]


@pytest.mark.parametrize("module", ["insightface.app", "onnxruntime"])
def test_without_the_extra_the_operator_is_told_what_to_install(
    library: Library, pack: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert refusal_of(pack) == (
        "This server has no face analysis. Its operator can install it: pip install darkroom[faces]",
        "unavailable",
    )


@pytest.mark.parametrize("kind", ["nothing", "a file", "an empty folder", "a folder of other files"])
def test_what_is_no_pack_never_reaches_the_library(library: Library, tmp_path: Path, kind: str) -> None:
    place = tmp_path / "antelopev2"
    if kind == "a file":
        place.write_bytes(b"")
    elif kind != "nothing":
        place.mkdir()
    if kind == "a folder of other files":
        (place / "README.md").write_text("")
        (place / "antelopev2").mkdir()
    message = "The face analysis is not a folder of ONNX files, such as antelopev2 or buffalo_l."
    assert refusal_of(place) == (message, "invalid_weights")
    assert not library.made


def test_a_pack_without_a_recogniser_is_refused(library: Library, pack: Path) -> None:
    library.tasks = ["detection"]
    message = "The face analysis has no ONNX file for recognition."
    assert refusal_of(pack) == (message, "invalid_weights")


@pytest.mark.parametrize(
    "fault", [AssertionError(), RuntimeFault("Protobuf parsing failed."), IndexError("2")]
)
def test_a_pack_with_a_broken_file_is_refused(library: Library, pack: Path, fault: Exception) -> None:
    library.fault = fault
    message = f"The face analysis has no detector, or a file that is no model: {fault}"
    assert refusal_of(pack) == (message, "invalid_weights")


BLACK, RED, GREEN, BLUE = (0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255)
YELLOW, MAGENTA = (255, 255, 0), (255, 0, 255)
FACE = Face(torch.ones(512), torch.tensor(KEYPOINTS) * 4, (0.0, 0.0, 512.0, 512.0))


def test_five_points_are_drawn_and_joined_to_the_nose() -> None:
    drawn = draw_keypoints(FACE, (512, 480))
    assert (drawn.mode, drawn.size) == ("RGB", (512, 480))
    points = [(int(x), int(y)) for x, y in FACE.keypoints.tolist()]
    colours = (RED, GREEN, BLUE, YELLOW, MAGENTA)
    assert tuple(drawn.getpixel(point) for point in points) == colours
    for (x, y), colour in zip(points, colours, strict=True):
        if colour != BLUE:
            between = drawn.getpixel(((x + points[2][0]) // 2, (y + points[2][1]) // 2))
            assert between == tuple(int(0.6 * each) for each in colour)
    assert drawn.getpixel((points[0][0] - 10, points[0][1])) == RED  # the radius of a point
    assert drawn.getpixel((points[0][0] - 11, points[0][1])) == BLACK
    assert drawn.getpixel((0, 0)) == BLACK


def test_points_outside_of_the_picture_are_left_out() -> None:
    away = Face(FACE.embedding, FACE.keypoints - 1000, FACE.box)
    assert draw_keypoints(away, (64, 64)).getbbox() is None


def save_models(folder: Path) -> None:
    """A detector of two faces in pictures of 640 × 640, and a recogniser that tells the mean colour."""
    onnx = import_module("onnx")  # comes with insightface
    helper, to_tensor, float32 = onnx.helper, onnx.numpy_helper.from_array, onnx.TensorProto.FLOAT

    def save(
        name: str, sides: list[Any], outputs: dict[str, Any], nodes: list[Any], values: dict[str, Any]
    ) -> None:
        graph = helper.make_graph(
            nodes,
            name,
            [helper.make_tensor_value_info("x", float32, sides)],
            [helper.make_tensor_value_info(out, float32, shape) for out, shape in outputs.items()],
            [to_tensor(value.astype(np.float32), key) for key, value in values.items()],
        )
        opset = [helper.make_opsetid("", 13)]
        onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), folder / f"{name}.onnx")

    values: dict[str, Any] = {"zero": np.zeros(())}
    anchors = {stride: (640 // stride) ** 2 * 2 for stride in (8, 16, 32)}
    for stride, count in anchors.items():
        values[f"score {stride}"] = np.zeros((count, 1))
        values[f"box {stride}"] = np.ones((count, 4))
        values[f"points {stride}"] = np.tile([-1.0, -1, 1, -1, 0, 0, -1, 1, 1, 1], (count, 1))
    for cell, score, reach in ((4 * 20 + 4, 0.9, 1), (10 * 20 + 10, 0.8, 2)):  # the larger is less certain
        values["score 32"][2 * cell] = score
        values["box 32"][2 * cell] = reach
    names = [f"{what} {stride}" for what in ("score", "box", "points") for stride in anchors]
    nodes = [helper.make_node("ReduceMean", ["x"], ["mean"], keepdims=0)]
    nodes += [helper.make_node("Mul", ["mean", "zero"], ["nothing"])]
    nodes += [helper.make_node("Add", [name, "nothing"], [f"{name} out"]) for name in names]
    outputs = {f"{name} out": list(values[name].shape) for name in names}
    save("detector", [1, 3, "h", "w"], outputs, nodes, values)

    nodes = [helper.make_node("ReduceMean", ["x"], ["mean"], axes=[2, 3], keepdims=0)]
    nodes += [helper.make_node("MatMul", ["mean", "spread"], ["y"])]
    save("recogniser", ["n", 3, 112, 112], {"y": ["n", 512]}, nodes, {"spread": np.eye(3, 512)})


@pytest.mark.filterwarnings("ignore")  # insightface's own
def test_the_real_library_finds_the_larger_of_two_faces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("insightface", reason="darkroom[faces] is not installed")
    save_models(tmp_path)

    def refuse(*given: Any) -> None:
        raise AssertionError("the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    face = FaceAnalyser.load(tmp_path, "cpu").largest(Image.new("RGB", (640, 480), (255, 0, 0)))

    assert face is not None
    assert face.box == (256, 256, 384, 384)
    assert face.keypoints.tolist() == [[288, 288], [352, 288], [320, 320], [288, 352], [352, 352]]
    assert face.embedding[:4].tolist() == [1, -1, -1, 0]  # red first again: 255 becomes 1, 0 becomes -1
    assert face.normed[:4].tolist() == pytest.approx([3**-0.5, -(3**-0.5), -(3**-0.5), 0])
    (tmp_path / "detector.onnx").write_bytes(b"nothing")
    assert "no detector, or a file that is no model" in refusal_of(tmp_path)[0]
    (tmp_path / "detector.onnx").unlink()
    assert "no detector, or a file that is no model" in refusal_of(tmp_path)[0]
