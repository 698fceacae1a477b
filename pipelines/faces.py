"""A picture → its largest face: what tells it from other people's, and where its five points lie.

insightface (https://github.com/deepinsight/insightface) is an extra of its own, `darkroom[faces]`, and
imported only here. Its models are ONNX files. These are no pickles, but they are programs for ONNX Runtime
that nobody checks beforehand, so they are for sources that the operator has named; whoever calls `load`
sees to that.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Self

import cv2
import numpy as np
import torch
from PIL import Image
from PIL.Image import Image as Picture
from torch import Tensor

from pipelines.adapters.tensor_file import invalid
from schemas.errors import AssetError

UNAVAILABLE = "unavailable"
EMBEDDING = 512  # numbers
_DETECTION_SIZE = (640, 640)
_TASKS = ("detection", "recognition")


@dataclass(frozen=True, slots=True, eq=False)
class Face:
    """One face. Places are pixels of the picture, x before y."""

    embedding: Tensor  # [512], float32, as the model gives it: InstantID reads this
    keypoints: (
        Tensor  # [5, 2], float32: the eyes, the nose, the corners of the mouth; those on the left first
    )
    box: tuple[float, float, float, float]  # left, top, right, bottom

    @property
    def normed(self) -> Tensor:
        """The embedding at length 1: IP-Adapter FaceID reads this."""
        normed: Tensor = self.embedding / self.embedding.norm()
        return normed

    @property
    def area(self) -> float:
        left, top, right, bottom = self.box
        return (right - left) * (bottom - top)


class FaceAnalyser:
    """Finds faces by a detector and describes them by a recogniser. Used by one thread."""

    def __init__(self, app: Any) -> None:
        """`app` is an insightface.app.FaceAnalysis, or whatever has its `get`."""
        self._app = app

    @classmethod
    def load(cls, folder: Path, device: str) -> Self:
        """A pack of models, such as antelopev2 or buffalo_l: a folder of .onnx files.

        On the CPU if ONNX Runtime was built without the device. Never reaches the network. Raises AssetError:
        "unavailable" if insightface is not installed, "invalid_weights" for a folder that is no such pack.
        """
        insightface, runtime = _libraries()
        # insightface would look for what is not there on the internet
        if not any(folder.glob("*.onnx")):
            raise invalid("The face analysis is not a folder of ONNX files, such as antelopev2 or buffalo_l.")
        try:
            app = insightface.FaceAnalysis(
                name=str(folder.resolve()),
                allowed_modules=list(_TASKS),
                providers=_providers(torch.device(device), runtime.get_available_providers()),
            )
        except _faults() as error:
            raise invalid(
                f"The face analysis has no detector, or a file that is no model: {str(error)[:300]}"
            ) from error
        if missing := [task for task in _TASKS if task not in app.models]:
            raise invalid(f"The face analysis has no ONNX file for {missing[0]}.")
        app.prepare(ctx_id=0, det_size=_DETECTION_SIZE)
        return cls(app)

    def largest(self, picture: Picture) -> Face | None:
        """The face with the largest box in an RGB picture, if there is any.

        Raises AssetError ("invalid_weights") if the recogniser is of another kind.
        """
        blue_first = np.ascontiguousarray(np.asarray(picture)[:, :, ::-1])  # as OpenCV has pictures
        faces = [_face(found) for found in self._app.get(blue_first)]
        return max(faces, key=lambda face: face.area, default=None)


def _libraries() -> tuple[Any, Any]:
    """insightface.app and onnxruntime."""
    try:
        return import_module("insightface.app"), import_module("onnxruntime")
    except ImportError as error:
        message = "This server has no face analysis. Its operator can install it: pip install darkroom[faces]"
        raise AssetError(message, UNAVAILABLE) from error


def _faults() -> tuple[type[Exception], ...]:
    """What insightface and ONNX Runtime raise for files that are not theirs.

    An assertion fails where there is no detector. The runtime's classes have no other base than Exception.
    """
    state = vars(import_module("onnxruntime.capi.onnxruntime_pybind11_state")).values()
    theirs = (each for each in state if isinstance(each, type) and issubclass(each, Exception))
    return AssertionError, IndexError, *theirs


def _providers(device: torch.device, available: Sequence[str]) -> list[Any]:
    """What ONNX Runtime is to run on, the best first."""
    if device.type == "cuda" and "CUDAExecutionProvider" in available:
        return [("CUDAExecutionProvider", {"device_id": device.index or 0}), "CPUExecutionProvider"]
    return ["CPUExecutionProvider"]


def _face(found: Any) -> Face:
    embedding = torch.tensor(found.embedding, dtype=torch.float32)
    keypoints = torch.tensor(found.kps, dtype=torch.float32)
    if embedding.shape != (EMBEDDING,):
        raise invalid(f"The face analysis describes a face by {embedding.numel()} numbers, not {EMBEDDING}.")
    left, top, right, bottom = map(float, found.bbox)
    return Face(embedding, keypoints, (left, top, right, bottom))


# As InstantID's ControlNet was trained (https://github.com/instantX-research/InstantID, draw_kps): a colour
# for each of the five points, and pixels at any size of the picture.
_COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255))
_NOSE = 2
_LIMB_HALF_WIDTH, _LIMB_BRIGHTNESS, _POINT_RADIUS = 4, 0.6, 10


def draw_keypoints(face: Face, size: tuple[int, int]) -> Picture:
    """The five points on black, each joined to the nose, RGB: InstantID's control image.

    `size` is the width and height of the picture that the face was found in.
    """
    width, height = size
    canvas = np.zeros((height, width, 3), np.uint8)
    points = face.keypoints.tolist()
    for point, colour in zip(points, _COLOURS, strict=True):
        if point is not points[_NOSE]:
            cv2.fillConvexPoly(canvas, _limb(point, points[_NOSE]), colour)
    canvas = (canvas * _LIMB_BRIGHTNESS).astype(np.uint8)
    for (x, y), colour in zip(points, _COLOURS, strict=True):
        cv2.circle(canvas, (int(x), int(y)), _POINT_RADIUS, colour, -1)
    return Image.fromarray(canvas)


def _limb(start: Sequence[float], end: Sequence[float]) -> Any:
    """The outline of a thin ellipse from one point to another."""
    across, down = start[0] - end[0], start[1] - end[1]
    centre = int((start[0] + end[0]) / 2), int((start[1] + end[1]) / 2)
    axes = int(math.hypot(across, down) / 2), _LIMB_HALF_WIDTH
    return cv2.ellipse2Poly(centre, axes, int(math.degrees(math.atan2(down, across))), 0, 360, 1)
