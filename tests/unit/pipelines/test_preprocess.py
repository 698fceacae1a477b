"""Edges are where a picture changes; depth is what the model says, from black to white."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps
from PIL.Image import Image as Picture
from transformers import DepthAnythingForDepthEstimation, DPTImageProcessorPil

from pipelines import zoo
from pipelines.preprocess import DepthEstimator, canny

Pixels = NDArray[np.uint8]


def noise(width: int, height: int, seed: int = 0) -> Picture:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def grey(picture: Picture) -> Pixels:
    """The one channel of a picture whose three are equal."""
    assert picture.mode == "RGB"
    pixels = np.asarray(picture)
    assert (pixels == pixels[..., :1]).all()
    channel: Pixels = pixels[..., 0]
    return channel


SIZES = [(1, 1), (3, 7), (96, 64), (33, 50), (5, 400), (200, 1)]


@pytest.mark.parametrize("size", SIZES)
def test_edges_are_white_on_black_at_the_pictures_size(size: tuple[int, int]) -> None:
    edges = canny(noise(*size))

    assert edges.size == size
    assert set(np.unique(grey(edges))) <= {0, 255}


@pytest.mark.parametrize("colour", ["black", "white", "teal"])
def test_a_plain_picture_has_no_edges(colour: str) -> None:
    assert not grey(canny(Image.new("RGB", (64, 48), colour))).any()


def disc() -> Picture:
    """Of radius 30 around (64, 48)."""
    picture = Image.new("RGB", (128, 96), "navy")
    ImageDraw.Draw(picture).ellipse((34, 18, 94, 78), fill="yellow")
    return picture


def test_the_edge_of_a_disc_is_its_circle() -> None:
    rows, columns = np.nonzero(grey(canny(disc())))
    radius = np.hypot(columns - 64, rows - 48)
    angles = np.sort(np.arctan2(rows - 48, columns - 64))

    assert (abs(radius - 30) < 2).all()
    assert np.diff(angles).max() < 0.1  # all the way round


def test_a_negative_has_the_same_edges() -> None:
    assert canny(ImageOps.invert(disc())) == canny(disc())


def test_a_change_of_colour_alone_is_an_edge() -> None:
    picture = Image.new("RGB", (64, 64), (255, 0, 0))
    picture.paste((0, 130, 0), (32, 0, 64, 64))  # as bright: OpenCV's grey is 76 here and there
    assert grey(canny(picture))[:, 31:33].any()


def step(*heights: int) -> Picture:
    """Dark on the left, brighter on the right, by each of `heights` levels for 16 rows."""
    pixels = np.full((16 * len(heights), 32, 3), 100, dtype=np.uint8)
    for index, height in enumerate(heights):
        pixels[16 * index : 16 * (index + 1), 16:] += np.uint8(height)
    return Image.fromarray(pixels)


def test_a_step_of_more_than_fifty_levels_is_an_edge() -> None:
    """The gradient across a step is four times its height (Sobel 3 × 3), the upper threshold 200."""
    assert grey(canny(step(51))).any()
    assert not grey(canny(step(50))).any()


def test_an_edge_goes_on_where_it_is_weak() -> None:
    """The lower threshold is 50: a step of 13 levels continues an edge, one of 12 does not."""
    on, off = grey(canny(step(60, 13))), grey(canny(step(60, 12)))

    assert on[20:30].any(axis=1).all()
    assert not off[20:30].any()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.locate("depth-anything", tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def estimator(folder: Path) -> DepthEstimator:
    return DepthEstimator.load(folder, "cpu")


@pytest.fixture
def parts(folder: Path) -> tuple[Any, Any]:
    """A model and a processor of one's own, to change."""
    model = DepthAnythingForDepthEstimation.from_pretrained(folder)
    return model.eval(), DPTImageProcessorPil.from_pretrained(folder)


PICTURES = [
    noise(40, 30),  # smaller than the model's map, the others larger
    disc().resize((256, 192)),
    Image.radial_gradient("L").convert("RGB"),
]


@pytest.mark.parametrize("picture", PICTURES)
def test_depth_is_what_the_model_says_fitted_to_the_picture(
    estimator: DepthEstimator, parts: tuple[Any, Any], picture: Picture
) -> None:
    """A relative Depth-Anything gives inverse depth: much is near, and near is white.

    Pillow resizes as torch does with antialiasing.
    """
    model, processor = parts
    with torch.inference_mode():
        nearness = model(**processor(picture, return_tensors="pt")).predicted_depth[0].numpy()
    fitted = np.asarray(Image.fromarray(nearness).resize(picture.size, Image.Resampling.BICUBIC))
    expected = 255 * (fitted - fitted.min()) / (fitted.max() - fitted.min())
    depth = grey(estimator.depth(picture))

    assert (depth.min(), depth.max()) == (0, 255)
    assert abs(depth - expected).max() < 0.51


@pytest.mark.parametrize("size", [*SIZES, (1024, 576), (3000, 16), (16, 3000)])
def test_depth_has_the_pictures_size_however_long(estimator: DepthEstimator, size: tuple[int, int]) -> None:
    picture = noise(*size)
    before = picture.copy()

    assert estimator.depth(picture).size == size
    assert picture == before


def test_a_long_picture_costs_little_and_no_graph_is_kept(parts: tuple[Any, Any]) -> None:
    model, processor = parts
    seen: list[tuple[int, int]] = []

    def see(head: Any, arguments: Any, depth: torch.Tensor) -> None:
        assert not depth.requires_grad
        seen.append(arguments[1:])

    model.head.register_forward_hook(see)
    DepthEstimator(model, processor).depth(noise(20_000, 130))

    assert seen == [(8, 8 * 8)]  # patches of 14 pixels: 112 × 896


def test_other_pictures_have_other_depths(estimator: DepthEstimator) -> None:
    first, second = (grey(estimator.depth(noise(96, 64, seed))).astype(int) for seed in (1, 2))

    assert abs(first - second).mean() > 5
    assert np.array_equal(first, grey(estimator.depth(noise(96, 64, 1))))


@pytest.mark.parametrize("distance", [0.0, 0.3, 255.0, 1e6])
@pytest.mark.parametrize("size", [(96, 64), (1, 1), (300, 500)])
def test_where_all_is_equally_near_all_is_black(
    parts: tuple[Any, Any], distance: float, size: tuple[int, int]
) -> None:
    model, processor = parts
    with torch.no_grad():
        model.head.conv3.weight.zero_()
        model.head.conv3.bias.fill_(distance)
    assert not grey(DepthEstimator(model, processor).depth(noise(*size))).any()


@pytest.mark.parametrize("colour", ["black", "white", "teal"])
def test_a_plain_picture_has_a_depth_too(estimator: DepthEstimator, colour: str) -> None:
    assert estimator.depth(Image.new("RGB", (64, 48), colour)).size == (64, 48)


def test_a_coarser_dtype_gives_nearly_the_same_depth(folder: Path, estimator: DepthEstimator) -> None:
    coarse = DepthEstimator.load(folder, "cpu", torch.bfloat16)
    for picture in PICTURES:
        gap = grey(coarse.depth(picture)).astype(int) - grey(estimator.depth(picture))
        assert abs(gap).mean() < 5


def test_a_metric_model_is_refused(folder: Path, tmp_path: Path) -> None:
    metric = shutil.copytree(folder, tmp_path / "metric")
    config = json.loads((metric / "config.json").read_text())
    (metric / "config.json").write_text(json.dumps({**config, "depth_estimation_type": "metric"}))

    with pytest.raises(ValueError, match="is metric, it must be relative"):
        DepthEstimator.load(metric, "cpu")
