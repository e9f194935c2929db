"""Options and fixtures: small photos, a small teacher."""

import os
import sys

if not any("test_gpu" in word for word in sys.argv):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same tests everywhere: on a CPU

import helpers  # noqa: F401 - puts the repository on the path
import numpy as np
import pytest
import torch
from PIL import Image

import common
import vitkd


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the long tests, too")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes long; runs with --slow only")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="long: pytest --slow runs it"))


@pytest.fixture(autouse=True)
def one_thread_and_seed():
    torch.set_num_threads(1)  # sums in the same order as in the processes that tests start
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder train/CLASS/*.jpg, val/CLASS/*.jpg: 3 classes, 32 + 11 images each, 20 x 24 px."""
    folder = tmp_path_factory.mktemp("data") / "photos"
    rng = np.random.default_rng(0)
    for split, count in (("train", 32), ("val", 11)):
        for c, name in enumerate(("ant", "bee", "cat")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 160, (20, 24, 3))
                pixels[..., c] += 90  # each class has a tint, so that it can be learned
                image = Image.fromarray(pixels.astype(np.uint8))
                image.save(folder / split / name / f"{i:03d}.jpg")
    return folder


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """A small ViT of random weights, as a student.pth of vitkd.py: ten classes, 16 px.

    Beside it lies a folder of images, shapes: 160 for training and 40 for validation.
    helpers.cnn_beside(teacher) adds cnn.pth, a teacher for dearkd.py.
    """
    torch.manual_seed(1)
    arch = {"image_size": 16, "patch_size": 4, "dim": 48, "depth": 2, "num_heads": 4,
            "num_classes": 10}
    folder = tmp_path_factory.mktemp("teacher")
    common.save_checkpoint(folder / "student.pth", model=vitkd.ViT(**arch).state_dict(), arch=arch,
                           script="vitkd")
    for split, count in (("train", 160), ("val", 40)):
        shapes = common.Shapes(count, 16, seed=count)
        for i in range(count):
            pixels, label = shapes[i]
            path = folder / "shapes" / split / str(label) / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)
    return folder / "student.pth"
