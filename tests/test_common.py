"""common.py: data, schedule, checkpoints."""

import itertools
import multiprocessing
import os
import pickle
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset
from torchvision import datasets
from torchvision.transforms import v2

import common

# ------------------------------------------------------------------ data


def in_process(monkeypatch, rank, world_size):
    monkeypatch.setattr(common, "rank", lambda: rank)
    monkeypatch.setattr(common, "world_size", lambda: world_size)


@pytest.mark.parametrize("length, batch_size, processes", [(50, 8, 2), (64, 16, 4), (35, 12, 4)])
def test_a_step_has_the_same_images_for_any_number_of_processes(
        length, batch_size, processes, monkeypatch):
    dataset = TensorDataset(torch.arange(length))
    args = SimpleNamespace(batch_size=batch_size, accum=1, seed=3, workers=0)

    def steps(epoch, rank, world_size):
        in_process(monkeypatch, rank, world_size)
        loader = common.make_loader(dataset, args, train=True)
        loader.sampler.set_epoch(epoch)
        return [batch.tolist() for batch, in loader]

    for epoch in (0, 1):
        alone = steps(epoch, 0, 1)
        shares = [steps(epoch, rank, processes) for rank in range(processes)]
        assert {len(alone), *map(len, shares)} == {length // batch_size}
        for step, batch in enumerate(alone):
            together = sum((share[step] for share in shares), [])
            assert sorted(together) == sorted(batch) and len(set(batch)) == batch_size
    assert steps(0, 0, 1) != steps(1, 0, 1)  # reshuffled


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_validation_image_is_loaded_once(processes, monkeypatch):
    args = SimpleNamespace(batch_size=6, accum=1, seed=0, workers=0)
    seen = []
    for rank in range(processes):
        in_process(monkeypatch, rank, processes)
        loader = common.make_loader(TensorDataset(torch.arange(20)), args, train=False)
        seen += sum((batch.tolist() for batch, in loader), [])
    assert sorted(seen) == list(range(20))


def test_fractions_are_nested_balanced_and_keep_every_class():
    labels = np.repeat(np.arange(5), [40, 40, 20, 10, 1])
    subsets = [set(common.class_balanced_subset(labels, f).tolist()) for f in (0.1, 0.25, 0.5, 1)]
    assert subsets[0] < subsets[1] < subsets[2] < subsets[3] == set(range(111))
    assert np.bincount(labels[sorted(subsets[1])]).tolist() == [10, 10, 5, 2, 1]


def test_augmentation_depends_on_seed_epoch_and_index_alone(photos):
    base = datasets.ImageFolder(photos / "train")
    transform = common.train_transform(16, rand_augment=9, random_erasing=0.5)

    def images(epoch, seed=0, workers=0):
        dataset = common.Images(base, range(len(base)), transform, seed)
        args = SimpleNamespace(batch_size=8, accum=1, seed=0, workers=workers)
        loader = common.make_loader(dataset, args, train=True)
        next(iter(loader))  # workers live on: they must see the new epoch
        dataset.epoch.fill_(epoch)
        torch.rand(workers + 1)  # the loop's random numbers do not matter
        return torch.cat([batch for batch, _ in loader])

    assert torch.equal(images(1), images(1, workers=2))
    assert not torch.equal(images(1), images(2))
    assert not torch.equal(images(1), images(1, seed=1))


def test_unreadable_images_are_named_and_replaced(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(6):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "a" / f"{i}.png")
    (tmp_path / "a" / "2.png").write_bytes((tmp_path / "a" / "2.png").read_bytes()[:40])
    (tmp_path / "a" / "3.png").write_bytes(b"")
    dataset = common.Images(datasets.ImageFolder(tmp_path), range(6), v2.PILToTensor())
    with pytest.warns(UserWarning, match="unreadable image .*2.png, the next one is taken") as seen:
        red = [int(dataset[i][0][0, 0, 0]) for i in range(6)]
    assert red == [0, 1, 4, 4, 4, 5] and len(seen) == 3  # 2; 3 for its sake; 3
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match="none of the images"):
        common.Images(dataset.base, [2, 3], None)[1]


def test_transforms_have_the_recipes_form():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 40, 3), np.uint8))
    transform = common.val_transform(28)
    x = transform(image)
    assert x.shape == (3, 28, 28) and x.dtype == torch.float32
    resized = v2.functional.resize(v2.functional.pil_to_tensor(image), 32,
                                   v2.InterpolationMode.BICUBIC)          # 32 = 28 * 256 / 224
    expected = v2.functional.center_crop(resized, 28).double() / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in (common.MEAN, common.STD))
    assert torch.allclose(x.double(), (expected - mean) / std, atol=1e-5)
    # Two draws, each applied with probability 0.5: at least a quarter of the images unchanged
    augment = v2.Compose(common.train_transform(28, rand_augment=9).transforms[3:5])
    x = torch.randint(0, 255, (3, 28, 28), dtype=torch.uint8)
    unchanged = sum(torch.equal(augment(x), x) for _ in range(600)) / 600
    assert 0.25 < unchanged + 0.04 and unchanged < 0.40


def test_erasing_puts_noise_into_a_quarter_of_the_images():
    erase = common.train_transform(64, random_erasing=0.25).transforms[-1]
    images = [erase(torch.zeros(3, 64, 64)) for _ in range(400)]
    noise = [image[image != 0] for image in images if image.any()]
    assert 70 < len(noise) < 130
    assert torch.cat(noise).std() == pytest.approx(1, abs=0.01)


# ------------------------------------------------------------------ schedule


def test_learning_rate_in_closed_form():
    args = SimpleNamespace(lr=2.0, min_lr=0.5, epochs=100, warmup_epochs=5)
    rates = [common.learning_rate(epoch, args) for epoch in (0, 2.5, 5, 52.5, 100)]
    assert rates == pytest.approx([0, 1.0, 2.0, 1.25, 0.5])
    args.epochs = 20  # then at most a tenth of the run
    assert common.learning_rate(2, args) == pytest.approx(2.0)
    args.lr = 0.1  # below min_lr: then it is constant
    assert [common.learning_rate(epoch, args) for epoch in (2, 20)] == pytest.approx([0.1, 0.1])


def test_no_weight_decay_on_biases_norms_tokens_and_positions():
    model = torch.nn.ModuleDict({"fc": torch.nn.Linear(2, 3), "norm": torch.nn.LayerNorm(3)})
    model.cls_token = torch.nn.Parameter(torch.zeros(1, 1, 3))
    model.pos_embed = torch.nn.Parameter(torch.zeros(1, 4, 3))
    decayed, exempt = common.parameter_groups(model, 0.05)
    assert decayed == {"params": [model["fc"].weight], "weight_decay": 0.05}
    assert len(exempt["params"]) == 5 and exempt["weight_decay"] == 0


def test_evaluate_counts_every_image_of_a_small_last_batch():
    images, target = torch.eye(7), torch.tensor([0, 1, 2, 3, 4, 0, 0])
    loader = torch.utils.data.DataLoader(TensorDataset(images, target), batch_size=3)
    autocast = lambda: torch.autocast("cpu", enabled=False)  # noqa: E731
    top1 = common.evaluate(torch.nn.Identity(), loader, torch.device("cpu"), autocast)
    assert top1 == pytest.approx(100 * 5 / 7)


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
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps(Malicious(), protocol=2))
    (tmp_path / "cut.pth").write_bytes((tmp_path / "code.pth").read_bytes()[:300])
    (tmp_path / "empty.pth").write_bytes(b"")
    for name in ("code.pth", "pickle.pth", "cut.pth", "empty.pth", "missing.pth"):
        with pytest.raises(ValueError, match=f"{name} is missing, damaged, or holds code"):
            common.load_checkpoint(tmp_path / name)
    assert not (tmp_path / "code-ran").exists()
