"""common.py: images, data, schedule, moving average, checkpoints, progress."""

import argparse
import importlib.util
import inspect
import itertools
import math
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
import time
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2

import common
import dearkd
import vitkd

# ------------------------------------------------------------------ batches


def in_process(monkeypatch, rank, world_size):
    monkeypatch.setattr(common, "rank", lambda: rank)
    monkeypatch.setattr(common, "world_size", lambda: world_size)


@pytest.mark.parametrize("length, batch_size, processes", [(50, 8, 2), (64, 16, 4), (35, 12, 4)])
def test_a_step_has_the_same_images_for_any_number_of_processes(
        length, batch_size, processes, monkeypatch):
    dataset = TensorDataset(torch.arange(length))

    def steps(epoch, rank, world_size, seed=3):
        in_process(monkeypatch, rank, world_size)
        loader = common.train_loader(dataset, batch_size, accum=1, workers=0, seed=seed)
        loader.sampler.set_epoch(epoch)
        return [batch.tolist() for batch, in loader]

    for epoch in (0, 1):
        alone = steps(epoch, 0, 1)
        shares = [steps(epoch, rank, processes) for rank in range(processes)]
        assert {len(alone), *map(len, shares)} == {length // batch_size}
        for step, batch in enumerate(alone):
            together = [i for share in shares for i in share[step]]
            assert sorted(together) == sorted(batch)
            assert len(set(batch)) == batch_size
    assert steps(0, 0, 1) != steps(1, 0, 1)  # reshuffled
    assert steps(0, 0, 1) != steps(0, 0, 1, seed=4)


@pytest.mark.parametrize("batch_size, accum, processes, message", [
    (6, 4, 1, "--batch-size 6 is not divisible by processes x --accum = 4"),
    (6, 2, 2, "--batch-size 6 is not divisible by processes x --accum = 4"),
    (24, 1, 2, "--batch-size 24 is more than the 20 training images: lower it"),
])
def test_a_batch_that_cannot_be_divided_or_filled_is_refused(
        batch_size, accum, processes, message, monkeypatch):
    in_process(monkeypatch, 0, processes)
    with pytest.raises(common.InputError) as error:
        common.train_loader(TensorDataset(torch.arange(20)), batch_size, accum, 0, 0)
    assert str(error.value) == message


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_validation_image_is_loaded_once(processes, monkeypatch):
    seen = []
    for rank in range(processes):
        in_process(monkeypatch, rank, processes)
        loader = common.val_loader(TensorDataset(torch.arange(20)), batch_size=6, workers=0)
        seen += [i for batch, in loader for i in batch.tolist()]
    assert sorted(seen) == list(range(20))


def test_fractions_are_nested_balanced_and_keep_every_class():
    labels = np.repeat(np.arange(5), [40, 40, 20, 10, 1])
    subsets = [set(common.class_balanced_subset(labels, fraction).tolist())
               for fraction in (0.0, 0.1, 0.25, 0.5, 1)]
    assert subsets[0] < subsets[1] < subsets[2] < subsets[3] < subsets[4] == set(range(111))
    assert np.bincount(labels[sorted(subsets[0])]).tolist() == [1, 1, 1, 1, 1]
    assert np.bincount(labels[sorted(subsets[2])]).tolist() == [10, 10, 5, 2, 1]


# ------------------------------------------------------------------ reading an image


def rgb(path):
    image = common.load_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


UPRIGHT = {  # EXIF's orientation -> what makes the stored pixels upright
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: np.rot90(stored, 1),
}


@pytest.mark.parametrize("ending", ["png", "webp", "tif", "jpg"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_images_are_turned_as_exif_says(orientation, ending, tmp_path):
    stored = np.zeros((16, 32, 3), np.uint8)
    for i, colour in enumerate([(250, 20, 20), (20, 250, 20), (20, 20, 250), (250, 250, 250)]):
        stored[8 * (i // 2):8 * (i // 2) + 8, 16 * (i % 2):16 * (i % 2) + 16] = colour
    exif = Image.Exif()
    exif[0x0112] = orientation
    how = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}.get(ending, {})
    Image.fromarray(stored).save(tmp_path / f"x.{ending}", exif=exif, **how)
    found = rgb(tmp_path / f"x.{ending}").astype(int)
    expected = UPRIGHT[orientation](stored).astype(int)
    assert found.shape == expected.shape
    assert abs(found - expected).max() <= (4 if ending == "jpg" else 0)


@pytest.mark.parametrize("orientation", [5, 6, 8])
def test_grey_tiffs_without_compression_are_turned_as_exif_says(orientation, tmp_path):
    """Pillow turns them wrongly if it opens them by their path."""
    stored = np.arange(16 * 32).reshape(16, 32).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "x.tif", exif=exif)
    assert np.array_equal(rgb(tmp_path / "x.tif")[..., 0], UPRIGHT[orientation](stored))


GREY = np.array([[0, 128, 129], [1000, 32768, 65535]])
DARK = GREY // 64  # the same scale, so it stays dark


@pytest.mark.parametrize("grey", [GREY, DARK], ids=["full range", "dark"])
@pytest.mark.parametrize("dtype, name", [
    ("<u2", "16.png"), ("<u2", "16.tif"), (">u2", "16-big-endian.tif"), ("<i4", "32.tif")])
def test_16_bit_grey_is_scaled_by_the_range_of_its_type(grey, dtype, name, tmp_path):
    Image.fromarray(grey.astype(dtype)).save(tmp_path / name)
    with Image.open(tmp_path / name) as image:
        assert image.mode.startswith("I")
    found = rgb(tmp_path / name)
    expected = np.rint(grey * (255 / 65535)).astype(np.uint8)
    assert np.array_equal(found, np.stack([expected] * 3, -1))


def test_16_bit_grey_is_turned_too(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, how in (("x.png", {}), ("x.tif", {"compression": "tiff_lzw"})):
        Image.fromarray(GREY.astype(np.uint16)).save(tmp_path / name, exif=exif, **how)
        expected = np.rot90(np.rint(GREY / 257), -1)
        assert np.array_equal(rgb(tmp_path / name)[..., 0], expected)


@pytest.mark.parametrize("pixels, reason", [
    (np.full((4, 4), 65536, np.int32), "it has more than 16 bits: convert it first"),
    (np.full((4, 4), -1, np.int32), "it has more than 16 bits: convert it first"),
    (np.full((4, 4), 0.5, np.float32),
     "floats have no range that maps to 8 bits: convert it first"),
])
def test_a_range_that_nobody_knows_is_refused_with_the_reason(pixels, reason, tmp_path):
    path = tmp_path / "x.tif"
    Image.fromarray(pixels).save(path)
    with pytest.raises(OSError) as error:
        common.load_image(path)
    assert str(error.value) == f"unreadable image {path}: {reason}"


def palette():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    return image


@pytest.mark.parametrize("name, image, colour", [
    ("palette.png", palette(), (200, 100, 50)),
    ("palette.gif", palette(), (200, 100, 50)),
    ("palette.bmp", palette(), (200, 100, 50)),
    ("rgba.png", Image.new("RGBA", (4, 4), (200, 100, 50, 0)), (200, 100, 50)),
    ("rgba.webp", Image.new("RGBA", (4, 4), (200, 100, 50, 255)), (200, 100, 50)),
    ("cmyk.jpg", Image.new("CMYK", (4, 4), (0, 255, 255, 0)), (255, 0, 0)),
    ("cmyk.tif", Image.new("CMYK", (4, 4), (0, 255, 255, 0)), (255, 0, 0)),
    ("grey.jpg", Image.new("L", (4, 4), 77), (77, 77, 77)),
    ("grey with alpha.png", Image.new("LA", (4, 4), (77, 9)), (77, 77, 77)),
    ("1 bit.png", Image.new("1", (4, 4), 1), (255, 255, 255)),
    ("1 bit.tif", Image.new("1", (4, 4), 0), (0, 0, 0)),
    ("name.JPG", Image.new("RGB", (4, 4), (200, 100, 50)), (200, 100, 50)),
])
def test_every_kind_of_image_becomes_rgb(name, image, colour, tmp_path):
    lossy = name.lower().endswith(("jpg", "webp"))
    image.save(tmp_path / name, **({"quality": 100} if lossy else {}))
    found = rgb(tmp_path / name).astype(int)
    assert found.shape == (4, 4, 3)
    assert abs(found - colour).max() <= (3 if lossy else 0)


@pytest.mark.parametrize("content", [b"", b"no image", "half"])
def test_an_unreadable_image_is_named(content, tmp_path):
    path = tmp_path / "x.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 50, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:4000] if content == "half" else content)
    with pytest.raises(OSError, match=f"^unreadable image {path}: "):
        common.load_image(path)


# ------------------------------------------------------------------ a data set


def test_augmentation_depends_on_seed_epoch_and_index_alone(photos):
    base = common.ImageFolder(photos / "train", ["ant", "bee", "cat"])
    transform = common.train_transform(16, rand_augment=9, random_erasing=0.5)

    def images(epoch, seed=0, workers=0):
        dataset = common.Images(base, range(len(base)), transform, seed)
        loader = common.train_loader(dataset, batch_size=8, accum=1, workers=workers, seed=0)
        next(iter(loader))  # an epoch before, which is another one
        dataset.epoch = epoch
        torch.rand(workers + 1)  # the loop's random numbers do not matter
        return torch.cat([batch for batch, _ in loader])

    assert torch.equal(images(1), images(1, workers=2))
    assert not torch.equal(images(1), images(2))
    assert not torch.equal(images(1), images(1, seed=1))
    dataset = common.Images(base, [5, 70], transform)
    assert torch.equal(dataset[1][0], common.Images(base, range(96), transform)[70][0])


def test_augmentation_leaves_the_loops_random_numbers_alone(photos):
    base = common.ImageFolder(photos / "train", ["ant", "bee", "cat"])
    dataset = common.Images(base, range(96), common.train_transform(16, rand_augment=9))
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    dataset[0]
    assert torch.equal(torch.rand(3), expected)


@pytest.fixture
def half_unreadable(tmp_path):
    """A folder of two classes of 16 images, 16 files that are none between them.

    The red of an image is its number, its class is a for 0 .. 15, b for 16 .. 31.
    """
    for i in range(32):
        path = tmp_path / "data" / "ab"[i // 16] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, 0, 0)).save(path)
        if 8 <= i < 24:
            path.write_bytes(b"no image")
    return common.ImageFolder(tmp_path / "data", ["a", "b"])


def to_red(image):
    return image.getpixel((0, 0))[0]


def test_unreadable_training_images_are_replaced_by_different_ones(half_unreadable):
    dataset = common.Images(half_unreadable, range(32), to_red)
    items = [dataset[i] for i in range(32)]
    good = [*range(8), *range(24, 32)]
    assert [items[i][0] for i in good] == good
    assert all(label == (red >= 16) for red, label in items)  # the picture's own label
    replacements = [items[i][0] for i in range(8, 24)]
    assert set(replacements) <= set(good)
    assert max(Counter(replacements).values()) <= 4  # drawn, not the next one each time
    assert len(set(replacements)) >= 8

    # From (seed, epoch, index) alone
    assert [dataset[i] for i in reversed(range(32))] == items[::-1]
    other_seed = common.Images(half_unreadable, range(32), to_red, seed=1)
    assert [other_seed[i] for i in range(32)] != items
    dataset.epoch = 1
    assert [dataset[i] for i in range(32)] != items


def test_a_replacement_comes_from_the_chosen_fraction(half_unreadable):
    dataset = common.Images(half_unreadable, [3, 10, 11, 12, 30], to_red)
    reds = set()
    for dataset.epoch in range(20):
        reds |= {dataset[i][0] for i in range(5)}
    assert reds == {3, 30}


def test_unreadable_images_are_not_counted_in_evaluation(half_unreadable):
    dataset = common.Images(half_unreadable, range(32), common.val_transform(7),
                            replace_unreadable=False)
    labels = [dataset[i][1] for i in range(32)]
    assert labels == [0] * 8 + [-1] * 16 + [1] * 8
    model = lambda images: torch.eye(2)[[0] * len(images)]  # noqa: E731 - says a to each
    model.eval = lambda: None
    loader = common.val_loader(dataset, 5, workers=0)
    assert common.evaluate(model, loader, torch.device("cpu"), nullcontext()) == 50.0


def test_nothing_to_evaluate_is_an_error(half_unreadable):
    dataset = common.Images(half_unreadable, range(8, 24), common.val_transform(7),
                            replace_unreadable=False)
    loader = common.val_loader(dataset, 5, workers=0)
    with pytest.raises(common.InputError, match="^no validation image can be read$"):
        common.evaluate(torch.nn.Flatten(), loader, torch.device("cpu"), nullcontext())


@pytest.mark.parametrize("replace", [True, False])
def test_an_unreadable_image_is_named_once_in_all_epochs_and_workers(
        replace, half_unreadable, capfd):
    dataset = common.Images(half_unreadable, range(32), v2.PILToTensor(),
                            replace_unreadable=replace)
    for dataset.epoch in (0, 1):
        for _ in DataLoader(dataset, 4, num_workers=2):
            pass
    warnings = capfd.readouterr().err.splitlines()
    named = sorted(line.partition(": it is not")[0] for line in warnings)
    expected = [f"WARNING: unreadable image {path}" for path, _ in half_unreadable.samples[8:24]]
    if replace:
        # Two workers that draw the same replacement at the same moment may both report it
        assert sorted(set(named)) == expected
        assert len(named) < len(expected) + 4  # 32 and more if epochs did not share the memory
    else:
        assert named == expected


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_set_without_a_readable_image_is_one_error(workers, half_unreadable):
    dataset = common.Images(half_unreadable, range(8, 24), v2.PILToTensor())
    with pytest.raises(common.InputError) as error:
        list(DataLoader(dataset, 16, num_workers=workers))
    with pytest.raises(SystemExit) as end:
        common.fail(error.value)  # also without the traceback of the worker
    assert re.fullmatch(
        r"\S+: error: 100 images in a row could not be read, the last because of: unreadable image "
        r"\S+: it is not an image that Pillow knows", str(end.value))


@pytest.mark.slow
def test_spawned_workers_give_the_images_of_the_process_itself(
        half_unreadable, capfd, monkeypatch):
    """As on a Mac and on Windows, where workers are not forked, with another salt for hash()."""
    monkeypatch.setenv("PYTHONHASHSEED", "12345")
    transform = common.train_transform(16, rand_augment=9, random_erasing=0.5)
    dataset = common.Images(half_unreadable, range(32), transform)
    dataset.epoch = 3
    loader = DataLoader(dataset, 8, num_workers=1, multiprocessing_context="spawn")
    spawned = torch.cat([images for images, _ in loader])
    assert torch.equal(spawned, torch.cat([images for images, _ in DataLoader(dataset, 8)]))
    assert capfd.readouterr().err.count("WARNING") == 16  # once, by whichever process


class Labelled(torch.utils.data.Dataset):
    def __init__(self, classes, targets):
        self.classes = classes
        self.targets = targets

    def __len__(self):
        return len(self.targets)


@pytest.mark.parametrize("validated, remark", [
    ([0, 1, 2, 0], ""), ([0, 0, 2, 2, 2], ", 1 of them without validation images")])
def test_counts_are_those_of_the_images_that_are_used(validated, remark, capsys):
    classes = ["ant", "bee", "cat"]
    train = common.Images(Labelled(classes, [0, 1, 2] * 10), range(12), None)
    val = common.Images(Labelled(classes, validated), range(len(validated)), None)
    common.print_counts(train, val)
    assert capsys.readouterr().out == (
        f"12 training and {len(validated)} validation images of 3 classes{remark}\n")


def test_shapes_are_ten_classes_that_differ_by_petals_and_filling():
    shapes = common.Shapes(400, 32, seed=1)
    assert len(shapes.classes) == 10
    assert np.bincount(shapes.targets).tolist() == [40] * 10
    assert torch.equal(shapes[3][0], common.Shapes(10, 32, seed=1)[3][0])
    assert not torch.equal(shapes[3][0], common.Shapes(10, 32, seed=2)[3][0])
    for index in range(400):
        image, label = shapes[index]
        assert label == shapes.targets[index] == index % 10
        # Two colours: that of the ground lies in the corners, the other inside
        inside = (image != image[:, :1, :1]).any(0)
        assert len(image.flatten(1).unique(dim=1).T) == 2
        hollow = label % 2 == 1
        filled_area = common.Shapes(400, 32, seed=1)
        filled_area.targets[index] = label - hollow
        whole = filled_area[index][0]
        whole = (whole != whole[:, :1, :1]).any(0)
        assert (inside & ~whole).sum() == 0
        assert (inside.sum() < whole.sum()) == hollow


# ------------------------------------------------------------------ transforms


def test_validation_images_have_the_recipes_size_and_normalisation():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 40, 3), np.uint8))
    x = common.val_transform(28)(image)
    assert x.shape == (3, 28, 28) and x.dtype == torch.float32
    resized = v2.functional.resize(v2.functional.pil_to_tensor(image), 32,
                                   v2.InterpolationMode.BICUBIC)          # 32 = 28 * 256 / 224
    expected = v2.functional.center_crop(resized, 28).double() / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in (common.MEAN, common.STD))
    assert torch.allclose(x.double(), (expected - mean) / std, atol=1e-5)


def test_training_images_are_normalised_and_mirrored_every_other_time():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    whole = common.train_transform(16, (1, 1))  # a crop of the whole image
    image = (torch.tensor(pixels) / 255 - torch.tensor(common.MEAN)) / torch.tensor(common.STD)
    image = image.permute(2, 0, 1)
    mirrored = 0
    for _ in range(100):
        found = whole(Image.fromarray(pixels))
        is_mirrored = not torch.allclose(found, image, atol=1e-5)
        assert not is_mirrored or torch.allclose(found, image.flip(2), atol=1e-5)
        mirrored += is_mirrored
    assert 30 < mirrored < 70


def test_crops_have_the_areas_that_were_asked_for():
    column = torch.arange(64, dtype=torch.uint8).expand(3, 64, 64)
    crop = common.train_transform(64, (0.25, 0.5)).transforms[1]
    widths = [(x.max() - x.min() + 1).item() for x in (crop(column)[0, 0] for _ in range(100))]
    # Widths of areas of 1/4 to 1/2, at aspect ratios of 3/4 to 4/3
    assert 64 * 0.43 - 2 < min(widths) < 32 and 40 < max(widths) < 64 * 0.82 + 2


def test_rand_augment_has_the_recipes_operations():
    """timm's rand-m9-mstd0.5-inc1 without SolarizeAdd, which torchvision lacks."""
    assert set(common.RandAugment._AUGMENTATION_SPACE) == {
        "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "Color",
        "Contrast", "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY"}


@pytest.mark.parametrize("magnitude", range(11))
def test_posterize_leaves_the_recipes_bits_and_invert_inverts(magnitude, monkeypatch):
    space = common.RandAugment._AUGMENTATION_SPACE
    x = torch.arange(256, dtype=torch.uint8).expand(3, 4, 256)

    def only(name):
        monkeypatch.setattr(common.RandAugment, "_AUGMENTATION_SPACE", {name: space[name]})
        return common.train_transform(28, rand_augment=magnitude or 1).transforms[3].transforms[0]

    assert torch.equal(only("Invert")(x), 255 - x)
    if magnitude:
        bits = 4 - int(magnitude / 10 * 4)  # timm: _posterize_increasing_level_to_arg
        assert torch.equal(only("Posterize")(x), x & (256 - 2**(8 - bits)))


def test_rand_augment_leaves_the_recipes_share_of_images_unchanged():
    augment = v2.Compose(common.train_transform(28, rand_augment=9).transforms[3:5])
    x = torch.randint(0, 256, (3, 28, 28), dtype=torch.uint8)
    x[:, 0, 0], x[:, 0, 1] = 0, 255  # the full range: AutoContrast changes nothing
    unchanged = [torch.equal(augment(x), x) for _ in range(3000)]
    # Each of two draws is off with probability 1/2 or, one time in 14, AutoContrast
    assert np.mean(unchanged) == pytest.approx((1 / 2 + 1 / 28)**2, abs=0.02)  # 28.7 %


def test_erasing_puts_noise_into_a_quarter_of_the_images():
    erase = common.train_transform(64, random_erasing=0.25).transforms[-1]
    images = [erase(torch.zeros(3, 64, 64)) for _ in range(400)]
    noise = [image[image != 0] for image in images if image.any()]
    assert 70 < len(noise) < 130
    assert torch.cat(noise).std() == pytest.approx(1, abs=0.01)


# ------------------------------------------------------------------ schedule and weights


def test_learning_rate_in_closed_form():
    rates = [common.learning_rate(epoch, 100, 2.0, 0.5, 5) for epoch in (0, 2.5, 5, 52.5, 100)]
    assert rates == pytest.approx([0, 1.0, 2.0, 1.25, 0.5])
    quarter = 0.5 + 1.5 * (1 + math.sqrt(0.5)) / 2
    assert common.learning_rate(5 + 95 / 4, 100, 2.0, 0.5, 5) == pytest.approx(quarter)
    # The warm-up is at most a tenth of the run
    assert common.learning_rate(2, 20, 2.0, 0.5, 5) == pytest.approx(2.0)
    # Below min_lr it is constant
    rates = [common.learning_rate(epoch, 20, 0.1, 0.5, 5) for epoch in (2, 20)]
    assert rates == pytest.approx([0.1, 0.1])
    assert common.learning_rate(0, 20, 0.1, 0.0, 0) == 0.1  # no warm-up


def test_no_weight_decay_on_biases_norms_tokens_and_positions():
    model = torch.nn.ModuleDict({
        "student": dearkd.ViT(8, 4, 12, 1, 3, 5, mhca_blocks=1),
        "vitkd_loss": vitkd.ViTKDLoss(12, 18)})
    decay, no_decay = common.parameter_groups(model, 0.05)
    names = {parameter: name for name, parameter in model.named_parameters()}
    matrices = {names[parameter].removesuffix(".weight") for parameter in decay["params"]}
    block = "student.blocks.0"
    assert matrices == {
        "student.patch_embed.proj", f"{block}.attn.qkv", f"{block}.attn.proj", f"{block}.mlp.fc1",
        f"{block}.mlp.fc2", "student.head", "student.head_dist", "vitkd_loss.align_shallow.0",
        "vitkd_loss.align_shallow.1", "vitkd_loss.align_deep", "vitkd_loss.generator.0",
        "vitkd_loss.generator.2"}
    assert len(decay["params"]) + len(no_decay["params"]) == len(names)
    assert decay["weight_decay"] == 0.05
    assert no_decay["weight_decay"] == 0


@pytest.mark.parametrize("max_decay", [0.0, 0.3, 0.99996])
def test_the_moving_average_equals_a_float64_recursion(max_decay):
    model = torch.nn.Linear(3, 2)
    start = model.weight.detach().clone()
    average = common.moving_average(model, max_decay)
    assert torch.equal(average.module.weight, start)  # a resumed run may evaluate it at once
    expected = None
    for n in range(60):
        model.weight.data.normal_()
        average.update_parameters(model)
        weight = model.weight.detach().double()
        decay = min(max_decay, (1 + n) / (10 + n))
        # The first step replaces the random start
        expected = weight if n == 0 else decay * expected + (1 - decay) * weight
        assert torch.allclose(average.module.weight.double(), expected, rtol=1e-5, atol=1e-6)
        if n == 0 or max_decay == 0:
            assert torch.equal(average.module.weight, model.weight)
    assert not average.module.weight.requires_grad or average.module.weight is not model.weight

    # It continues after a checkpoint
    again = common.moving_average(torch.nn.Linear(3, 2), max_decay)
    again.load_state_dict(average.state_dict())
    model.weight.data.normal_()
    for part in (average, again):
        part.update_parameters(model)
    assert torch.equal(again.module.weight, average.module.weight)


def test_evaluate_counts_every_image_of_a_small_last_batch():
    images, target = torch.eye(7), torch.tensor([0, 1, 2, 3, 4, 0, 0])
    loader = DataLoader(TensorDataset(images, target), batch_size=3)
    top1 = common.evaluate(torch.nn.Identity(), loader, torch.device("cpu"), nullcontext())
    assert top1 == pytest.approx(100 * 5 / 7)


# ------------------------------------------------------------------ the machine


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="not on Linux")
def test_workers_are_as_many_as_the_cpus_that_may_be_used(monkeypatch):
    """As under taskset or Slurm, shared among the processes on a machine."""
    usable = os.sched_getaffinity(0)

    def workers(processes):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        spec = importlib.util.spec_from_file_location("common_again", common.__file__)
        again = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(again)
        return again.WORKERS

    assert workers(1) == min(24, len(usable))
    assert workers(len(usable)) == 1
    assert workers(8 * len(usable)) == 1  # at least one
    try:
        os.sched_setaffinity(0, [min(usable)])
        assert workers(1) == common.available_cpus() == 1
    finally:
        os.sched_setaffinity(0, usable)


def test_a_machine_without_affinity_counts_its_cpus(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # a Mac, Windows
    assert common.available_cpus() == os.cpu_count()


def test_seeds_are_the_same_in_every_process_and_differ_from_each_other():
    program = f"{inspect.getsource(common.seed_of)}\nprint(seed_of(1, 2, 3))"
    for salt in ("1", "2"):
        out = subprocess.check_output([sys.executable, "-c", program],
                                      env={**os.environ, "PYTHONHASHSEED": salt})
        assert int(out) == common.seed_of(1, 2, 3)
    seeds = {common.seed_of(*numbers) for numbers in itertools.product(range(10), repeat=3)}
    assert len(seeds) == 1000


def test_peak_memory_is_in_gib_on_linux_and_mac_and_unknown_on_windows(monkeypatch):
    resource = pytest.importorskip("resource")
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert common.peak_memory_gb() == pytest.approx(kib / 2**20, rel=0.01)
    monkeypatch.setattr(sys, "platform", "darwin")  # there the system counts bytes
    assert common.peak_memory_gb() == pytest.approx(kib / 2**30, rel=0.01)
    monkeypatch.setitem(sys.modules, "resource", None)  # the import fails
    assert math.isnan(common.peak_memory_gb())


@pytest.mark.parametrize("info, precision, name", [
    ("model name\t: AMD EPYC 9B14\nflags\t\t: fpu avx512_bf16 sse\n", "bf16", "CPU: AMD EPYC 9B14"),
    ("model name\t: Intel(R) Xeon(R)\nflags\t\t: amx_bf16\n", "bf16", "CPU: Intel(R) Xeon(R)"),
    ("model name\t: Intel(R) Xeon(R)\nflags\t\t: avx512f\n", "off", "CPU: Intel(R) Xeon(R)"),
    ("processor : 0\nFeatures : fp asimd\n", "off", "CPU"),  # ARM
    ("", "off", "CPU"),  # a Mac
])
def test_the_cpu_is_named_and_computes_in_what_it_multiplies(
        info, precision, name, monkeypatch, capsys):
    monkeypatch.setattr(common, "cpu_info", lambda: info)
    device = torch.device("cpu")
    assert common.best_precision(device) == precision
    common.describe_run(device, precision)
    assert capsys.readouterr().out == (
        f"{name}, 1 process(es), amp {precision}, torch {torch.__version__}\n")


# ------------------------------------------------------------------ flags


@pytest.mark.parametrize("flag_type, text, value", [
    ("positive_int", "1", 1),
    ("positive_int", "0", "0 is not between 1 and 1e+09"),
    ("positive_int", "-3", "-3 is not between 1 and 1e+09"),
    ("positive_int", "1.5", "invalid positive_int value: '1.5'"),
    ("positive_int", "many", "invalid positive_int value: 'many'"),
    ("non_negative_int", "0", 0),
    ("non_negative_int", "-1", "-1 is not between 0 and 1e+09"),
    ("non_negative", "0", 0.0),
    ("non_negative", "1e-3", 0.001),
    ("non_negative", "-0.1", "-0.1 is not between 0 and 1e+09"),
    ("non_negative", "nan", "nan is not between 0 and 1e+09"),
    ("non_negative", "inf", "inf is not between 0 and 1e+09"),
    ("fraction", "0", 0.0),
    ("fraction", "1", 1.0),
    ("fraction", "1.01", "1.01 is not between 0 and 1"),
    ("fraction", "nan", "nan is not between 0 and 1"),
])
def test_types_of_flags(flag_type, text, value, capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--flag", type=getattr(common, flag_type))
    if isinstance(value, str):
        with pytest.raises(SystemExit):
            parser.parse_args([f"--flag={text}"])
        assert capsys.readouterr().err.endswith(f"error: argument --flag: {value}\n")
    else:
        found = parser.parse_args([f"--flag={text}"]).flag
        assert (found, type(found)) == (value, type(value))


# ------------------------------------------------------------------ checkpoints


def save_forever(path):
    for i in itertools.count():
        common.save_checkpoint(path, i=i, zeros=torch.full((10**6,), i))


def test_a_kill_while_saving_leaves_a_whole_file(tmp_path):
    process = multiprocessing.get_context("fork").Process(
        target=save_forever, args=[tmp_path / "x.pth"])
    process.start()
    while not (tmp_path / "x.pth").exists():
        time.sleep(0.05)
    for _ in range(100):  # a reader never sees half a file
        state = common.load_checkpoint(tmp_path / "x.pth")
        assert (state["zeros"] == state["i"]).all()
    process.kill()
    process.join()
    state = common.load_checkpoint(tmp_path / "x.pth")
    assert (state["zeros"] == state["i"]).all()


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("code-ran",)


def test_code_in_a_checkpoint_never_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Malicious()}, "code.pth")
    torch.save({"model": Malicious()}, "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps(Malicious(), protocol=2))
    (tmp_path / "cut.pth").write_bytes((tmp_path / "code.pth").read_bytes()[:300])
    for name in ("code.pth", "old.pth", "pickle.pth", "cut.pth"):
        with pytest.raises(common.InputError, match=f"^{name} (holds|is not a)"):
            common.load_checkpoint(name)
    assert not (tmp_path / "code-ran").exists()


# ------------------------------------------------------------------ progress


@pytest.fixture
def clock(monkeypatch):
    """A clock for common.py that the test itself moves on: clock[0] is the time in seconds."""
    seconds = [1000.0]
    monkeypatch.setattr(common, "time", SimpleNamespace(perf_counter=lambda: seconds[0]))
    return seconds


class SlowLoader:
    """Batches that take 3 s each to load."""

    def __init__(self, clock):
        self.clock = clock

    def __len__(self):
        return 4

    def __iter__(self):
        for batch in "abcd":
            self.clock[0] += 3
            yield batch


def test_only_the_loaders_seconds_count_as_waiting(clock):
    batches = common.TimedBatches(SlowLoader(clock), epoch=0, epochs=2, batch_size=20)
    seen = []
    for batch in batches:
        seen.append(batch)
        clock[0] += 1  # the step
        assert batches.seconds_waiting == 3 * len(seen)
        assert batches.speed() == pytest.approx(
            {"images_per_second": 20 / 4, "waiting_for_data": 3 / 4})
    assert seen == list("abcd") and batches.steps == 4


def test_a_progress_line_says_where_the_run_is_and_how_fast(clock, capsys):
    batches = common.TimedBatches(SlowLoader(clock), epoch=1, epochs=3, batch_size=20)
    for _ in batches:
        clock[0] += 1
        if batches.steps == 2:
            batches.print_progress({"ce": torch.tensor(5.0), "nkd": torch.tensor(3.0)}, lr=1e-3)
    # Left: 2 + 4 steps of 4 s
    assert capsys.readouterr().out == (
        "epoch 2/3  step 2/4  loss 4.0000  lr 1.00e-03  5 images/s  waiting for data 75%  "
        "left 0:00:24\n")


def test_an_epoch_is_a_line_and_a_record(tmp_path, capsys):
    log = [{"epoch": 1, "ce": 2.5, "seconds": 90.0},
           {"epoch": 2, "ce": 1.23456789, "images_per_second": 12345.6, "seconds": 30.0}]
    common.log_epoch(tmp_path, log, epochs=4)
    out = capsys.readouterr().out
    assert out == "epoch 2  ce 1.235  images_per_second 12346  seconds 30  left 0:02:00\n"
    assert (tmp_path / "log.jsonl").read_text() == (
        '{"epoch": 1, "ce": 2.5, "seconds": 90.0}\n'
        '{"epoch": 2, "ce": 1.23456789, "images_per_second": 12345.6, "seconds": 30.0}\n')
