"""Shared by the tests: where things are, a folder of small photos, starting real processes."""

import os
import subprocess
import sys
from pathlib import Path

if not any("test_gpu" in word for word in sys.argv):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same tests everywhere: on a CPU

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import common
import dearkd
import vitkd

# Optional real images and weights, one zip file or .pth each; tests that use them skip without.
DATA = Path(os.environ.get("VIT_DISTILL_DATA", ROOT.parent / "shared" / "data"))

# Flags of a run that takes a second: 16 patches, a small ViT, no augmentation but crop and flip.
TINY = ("--image-size 16 --patch-size 4 --student micro --batch-size 16 --workers 0 --epochs 2 "
        "--lr 1e-3 --amp off").split()
PLAIN = "--mixup 0 --cutmix 0 --rand-augment 0 --random-erasing 0".split()


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
    folder, rng = tmp_path_factory.mktemp("data") / "photos", np.random.default_rng(0)
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
    """A small ViT of random weights, as a student.pth of vitkd.py: ten classes, 16 px. Beside it
    lie cnn.pth, a CNN of random weights, as dearkd.py --train-teacher writes them, and a folder of
    images, shapes: 160 for training and 40 for validation."""
    torch.manual_seed(1)
    arch = {"image_size": 16, "patch_size": 4, "dim": 48, "depth": 2, "num_heads": 4,
            "num_classes": 10}
    folder = tmp_path_factory.mktemp("teacher")
    common.save_checkpoint(folder / "student.pth", model=vitkd.ViT(**arch).state_dict(), arch=arch,
                           script="vitkd")
    state = dearkd.make_cnn("cifar_resnet20", 10).state_dict()
    common.save_checkpoint(folder / "cnn.pth", model=state, cnn="cifar_resnet20")
    for split, count in (("train", 160), ("val", 40)):
        for i, (pixels, label) in zip(range(count), common.Shapes(count, 16, seed=count)):
            path = folder / "shapes" / split / str(label) / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)
    return folder / "student.pth"


def start(*command, **environment):
    """Start a script of this project, or torchrun, in a process of its own."""
    words = [str(word) for word in command]
    if words[0] == "torchrun":
        words[:1] = ["-m", "torch.distributed.run", "--standalone"]
    return subprocess.Popen([sys.executable, *words], cwd=ROOT, text=True, stderr=subprocess.PIPE,
                            stdout=subprocess.PIPE,
                            env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


def run(*command, status=0, **environment):
    """Run a process to its end; return (stdout, stderr)."""
    process = start(*command, **environment)
    out, err = process.communicate(timeout=1200)  # a demo on an old CPU takes minutes
    assert process.returncode == status, out + err
    return out, err
