"""common.py: sampling, images, the schedule, checkpoints - against closed forms and real files."""

import argparse
import io
import itertools
import math
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from conftest import DATA, ROOT
from PIL import Image
from torchvision import datasets
from torchvision.datasets.folder import default_loader
from torchvision.transforms import InterpolationMode, v2

import common


def settings(**changes):
    """The flags that common's functions read."""
    values = {"data": "shapes", "data_root": "data", "data_fraction": 1.0, "image_size": 16,
              "patch_size": 4, "batch_size": 16, "micro_batch": 16, "workers": 0, "seed": 0,
              "epochs": 4, "lr": 1.0, "min_lr": 0.1, "warmup_epochs": 1, "clip_grad": 0.0,
              "eval_every": 1, "dry_run": False, "amp": "off", "out": "out", "resume": None,
              "val": None}
    return argparse.Namespace(**{**values, **changes})


def pretend_processes(monkeypatch, rank, world_size):
    monkeypatch.setattr(common, "rank", lambda: rank)
    monkeypatch.setattr(common, "world_size", lambda: world_size)


# ------------------------------------------------------------------ which images


@pytest.mark.parametrize("length, batch_size", [(100, 16), (96, 16), (7, 100), (129, 128)])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_shards_are_disjoint_complete_and_the_same_batches(length, batch_size, processes,
                                                           monkeypatch):
    def epoch(number, rank, world_size):
        pretend_processes(monkeypatch, rank, world_size)
        sampler = common.ShardedBatches(length, batch_size, seed=5)
        sampler.epoch = number
        batches = list(sampler)
        assert len(batches) == len(sampler) == math.ceil(length / batch_size)
        return sampler, [[key - number * length for key in batch] for batch in batches]

    alone = {number: epoch(number, 0, 1) for number in (0, 1)}
    for number, (sampler, whole) in alone.items():
        shares = [epoch(number, rank, processes)[1] for rank in range(processes)]
        for step, batch in enumerate(whole):
            parts = [share[step] for share in shares]
            assert list(itertools.chain(*parts)) == batch  # the very images of one process
            assert len(batch) == sampler.batch_images(step) <= batch_size
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
        assert sorted(itertools.chain(*whole)) == list(range(length))
        assert max(map(len, whole)) - min(map(len, whole)) <= 1
    assert alone[0][1] != alone[1][1]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_validation_images_are_each_taken_once(processes, monkeypatch):
    data, seen = common.Shapes("val", 16, 101), []
    for rank in range(processes):
        pretend_processes(monkeypatch, rank, processes)
        loader = common.val_loader(data, settings())
        seen += [image.sum().item() for images, _, _ in loader for image in images]
    assert sorted(seen) == sorted(item[0].sum().item() for item in data.__getitems__(range(101)))


def test_fractions_are_nested_balanced_and_keep_every_class():
    labels = np.repeat([0, 1, 2], [100, 40, 3])
    subsets = [common.class_balanced_subset(labels, f) for f in (0.1, 0.25, 0.5, 1.0)]
    for small, large in itertools.pairwise(subsets):
        assert set(small) < set(large)
    assert [np.bincount(labels[s]).tolist() for s in subsets] == [
        [10, 4, 1], [25, 10, 1], [50, 20, 2], [100, 40, 3]]
    assert not np.array_equal(subsets[0][:10], np.arange(10))  # shuffled, not the first files


# ------------------------------------------------------------------ the images themselves


def test_augmentation_depends_on_seed_and_key_alone(photos):
    base = datasets.ImageFolder(photos / "train")
    transform = common.train_transform(16, rand_augment=9, random_erasing=0.5)
    data = common.Photos(base, transform, seed=3)
    state = torch.get_rng_state()
    first = data[17][0]
    assert torch.equal(torch.get_rng_state(), state)  # the loop's random numbers stay put
    torch.rand(5)
    assert torch.equal(data[17][0], first)
    assert not torch.equal(data[17 + len(data)][0], first)  # next epoch: another crop
    assert data[17 + len(data)][1] == data[17][1]
    assert not torch.equal(common.Photos(base, transform, seed=4)[17][0], first)


def test_workers_change_nothing(photos):
    data = common.Photos(datasets.ImageFolder(photos / "train"),
                         common.train_transform(16, rand_augment=9))
    epochs = []
    for workers in (0, 2):
        loader = common.train_loader(data, settings(workers=workers))
        loader.batch_sampler.epoch = 1
        epochs.append([batch[0] for batch in loader])
    assert all(torch.equal(a, b) for a, b in zip(*epochs, strict=True))


def test_transforms_have_the_recipes_form():
    image = Image.fromarray(np.full((60, 100, 3), 255, np.uint8))
    white = (1 - torch.tensor(common.MEAN)) / torch.tensor(common.STD)
    for transform in (common.val_transform(32), common.train_transform(32, rand_augment=0)):
        out = transform(image)
        assert out.shape == (3, 32, 32) and out.dtype == torch.uint8
        out = common.normalize(out[None], "cpu")[0]
        assert torch.allclose(out, white[:, None, None].expand_as(out), atol=1e-5)
    # erasing: a rectangle of 2 to 33 % (torchvision's), in it noise of mean 0 and deviation 1
    erased = torch.stack([common.train_transform(32, random_erasing=1.0)(image) for _ in range(50)])
    out = common.normalize(erased, "cpu")
    struck = ((out - white[:, None, None]).abs() > 1e-4).all(1)
    part = struck.float().mean((1, 2))
    assert out.shape == (50, 3, 32, 32) and 0.01 < part.min() and part.max() < 0.36
    for mask in struck:
        rows, columns = mask.any(1).sum(), mask.any(0).sum()
        assert rows * columns == mask.sum()
    noise = out.permute(0, 2, 3, 1)[struck]
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03
    # short side 256/224 of the size, then the centre: 32 of 37 rows of a ramp
    ramp = np.linspace(0, 255, 37 * 37).reshape(37, 37).astype(np.uint8)
    ramp = Image.fromarray(ramp).convert("RGB")
    centre = common.val_transform(32)(ramp)[0]
    assert torch.equal(centre, torch.from_numpy(np.asarray(ramp)[2:34, 2:34, 0].copy()))
    drawn = torch.randn(2, 3, 8, 8)
    assert torch.equal(common.normalize(drawn, "cpu"), drawn)


@pytest.mark.skipif(not (DATA / "imagenet_photos.zip").exists(), reason=f"no photos in {DATA}")
def test_photos_are_those_of_the_plain_pil_pipeline(tmp_path):
    """Same random numbers, same image: within a level or two of 255 of what PIL makes of it, but
    for a few pixels where RandAugment makes much of such a difference (equalize, posterize)."""
    with zipfile.ZipFile(DATA / "imagenet_photos.zip") as archive:
        archive.extractall(tmp_path)
    files = sorted(tmp_path.glob("*/*.JPEG"))[:24]
    assert files
    bicubic = InterpolationMode.BICUBIC
    plain = v2.Compose([v2.RandomResizedCrop(224, (0.08, 1), interpolation=bicubic),
                        v2.RandomHorizontalFlip(),
                        v2.RandAugment(2, 9, num_magnitude_bins=11, fill=[124, 116, 104],
                                       interpolation=bicubic),
                        v2.PILToTensor()])
    ours, close = common.train_transform(224, rand_augment=9), []
    for i, file in enumerate(files):
        image = default_loader(file)
        assert (np.asarray(common.open_rgb(file)) == np.asarray(image)).all()
        torch.manual_seed(i)
        expected = plain(image).int()
        torch.manual_seed(i)
        close.append(((ours(common.open_rgb(file)).int() - expected).abs() <= 2).float().mean())
        plain_val = v2.functional.center_crop(v2.functional.resize(image, 256, bicubic), 224)
        difference = common.val_transform(224)(common.open_rgb(file)).int() - (
            v2.functional.pil_to_tensor(plain_val).int())
        assert difference.abs().max() <= 2
    assert sorted(close)[3] > 0.98 and min(close) > 0.5, close


def test_rand_augment_counts_in_tenths_of_the_range():
    augment, = (t for t in common.train_transform(32, rand_augment=9).transforms
                if type(t).__name__ == "RandAugment")
    assert (augment.num_ops, augment.magnitude, augment.num_magnitude_bins) == (2, 9, 11)


def test_rand_augment_is_torchvisions_to_the_last_bit():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8))
    ours, theirs = (kind(2, 9, num_magnitude_bins=11, fill=[124, 116, 104],
                         interpolation=InterpolationMode.BICUBIC)
                    for kind in (common.RandAugment, v2.RandAugment))
    for seed in range(200):  # of 14 operations, two at a time
        pixels = []
        for augment in (ours, theirs):
            torch.manual_seed(seed)
            pixels.append(np.asarray(augment(image)))
        assert (pixels[0] == pixels[1]).all(), seed


def test_unreadable_images_are_replaced_counted_and_named_once(photos, capsys):
    files = sorted((photos / "train" / "bee").iterdir())
    files[3].write_bytes(b"")
    files[4].write_bytes(files[5].read_bytes()[:200])
    data = common.Photos(datasets.ImageFolder(photos / "train"), common.val_transform(16))
    for _ in range(2):  # 40 ants come first
        image, label, unreadable = data[43]
        assert unreadable == 1 and label == 1 and torch.equal(image, data[45][0])
    err = capsys.readouterr().err
    assert all(err.count(f"replaced by the next: {file} ") == 1 for file in files[3:5])
    assert data[42][2] == 0


def test_a_vanished_disk_is_one_line_not_a_million(photos, capsys, monkeypatch):
    base = datasets.ImageFolder(photos / "train")
    data = common.Photos(base, common.val_transform(16))
    for path in photos.glob("train/*/*"):
        path.unlink()

    def read():
        for _ in common.train_loader(data, settings(workers=1)):
            pass

    monkeypatch.setattr(common, "SCRIPT", "vitkd.py")
    with pytest.raises(SystemExit) as stop:
        common.run(read)
    assert stop.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "vitkd.py: error: 100 images in a row are unreadable: is the disk gone?")


def test_a_worker_that_dies_while_others_start_is_told(photos):
    """Amid a fork Python only prints what a signal handler raises, and the loader would wait."""
    script = f"""
from torchvision import datasets
import common, multiprocessing, os, time
images = datasets.ImageFolder("{photos}/train")
loader = common.make_loader(common.Photos(images, common.val_transform(16)), 2, batch_size=4)
next(iter(loader))                           # from now on torch's handler is there
def kill():
    for worker in multiprocessing.active_children():
        worker.kill()
    time.sleep(0.1)                          # its signal arrives here, before a fork
os.register_at_fork(before=kill)
next(iter(loader))
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True,
                            text=True, timeout=30, check=False)
    assert result.stderr.splitlines()[-1].startswith("RuntimeError: DataLoader worker")
    assert "ignored" not in result.stderr


def test_unreadable_validation_images_are_left_out(photos):
    """All answers are class 0: the stand-in for the broken file must not count."""
    path = photos / "val" / "ant" / "003.jpg"
    content = path.read_bytes()
    path.write_bytes(b"")
    args = settings(data=photos)
    _, val, _ = common.load_data(args, None)
    autocast, _ = common.set_precision(args, torch.device("cpu"))

    class Zero(torch.nn.Module):
        def forward(self, images):
            return torch.tensor([1.0, 0.0, 0.0]).expand(len(images), 3)

    def evaluate():
        return common.evaluate(Zero(), common.val_loader(val, args), torch.device("cpu"), autocast)

    with pytest.raises(common.Abort, match="1 validation images are unreadable, more than 1 %"):
        evaluate()
    path.write_bytes(content)
    assert evaluate()["top1"] == pytest.approx(100 / 3)


@pytest.mark.parametrize("length, batch_size, processes", [(1001, 8, 8), (3, 4, 4)])
def test_no_process_is_left_without_an_image(length, batch_size, processes, monkeypatch):
    pretend_processes(monkeypatch, 0, processes)
    with pytest.raises(common.Abort, match="without one: raise --batch-size"):
        common.ShardedBatches(length, batch_size, seed=0)


def test_signals_are_not_swallowed_by_error_handlers(monkeypatch):
    """Before training a signal raises wherever it hits, also inside a file reader."""
    def interrupted(*_, **__):
        common._receive(15, None)

    monkeypatch.setattr(common, "_held", False)
    monkeypatch.setattr(torch, "load", interrupted)
    for read in (lambda: common.load_checkpoint("x.pth"),
                 lambda: common.rank_zero_first(lambda: common.load_checkpoint("x.pth"))):
        monkeypatch.setattr(common, "_signal", 0)  # a second signal is but noted
        with pytest.raises(common.Stopped, match="stopped by SIGTERM before anything") as stop:
            read()
        assert stop.value.status == 143
        sent = pickle.loads(pickle.dumps(stop.value))  # as rank 0 tells the others
        assert (str(sent), sent.status) == (str(stop.value), 143)


def test_shapes_are_fresh_every_epoch_and_fixed_for_validation():
    train, val = common.Shapes("train", 24, 50, seed=1), common.Shapes("val", 24, 50)
    first, again, second = (train.__getitems__(keys) for keys in
                            (range(50), range(50), range(50, 100)))
    for a, b, c in zip(first, again, second):
        assert torch.equal(a[0], b[0]) and not torch.equal(a[0], c[0]) and a[1] == c[1]
    assert sorted(item[1] for item in first) == sorted(list(range(10)) * 5)
    images = torch.stack([item[0] for item in first])
    assert images.shape == (50, 3, 24, 24) and images.isfinite().all()
    assert (images.flatten(2).std(-1).amax(1) > 0.1).all()  # something is drawn in each
    assert not torch.equal(first[0][0], val.__getitems__([0])[0][0])
    other = common.Shapes("train", 24, 50, seed=2).__getitems__([0])[0][0]
    assert not torch.equal(first[0][0], other)
    assert torch.equal(common.Shapes("val", 24, 50, seed=2).__getitems__([7])[0][0],
                       val.__getitems__([7])[0][0])


def test_striped_shapes_have_one_colour_more():
    items = common.Shapes("val", 32, 200).__getitems__(range(200))
    for image, label, _ in items:
        colours = len(image.flatten(1).T.unique(dim=0))
        assert colours == 2 + label % 2


@pytest.mark.skipif(not (DATA / "tiny_imagenet20.zip").exists(), reason=f"no real images in {DATA}")
def test_real_images_greyscale_ones_among_them(tmp_path):
    subprocess.run([sys.executable, "-m", "zipfile", "-e", DATA / "tiny_imagenet20.zip", tmp_path],
                   check=True)
    folder, = (p.parent for p in tmp_path.glob("**/train"))
    train, val, classes = common.load_data(settings(data=folder), common.train_transform(64))
    assert classes == 20 and len(train) == 10000 and len(val) == 1000
    grey = [i for i in range(len(val)) if Image.open(val.base.samples[i][0]).mode == "L"]
    assert grey
    for i in grey:
        image, _, unreadable = val[i]
        assert unreadable == 0 and torch.equal(image[0], image[2])


def test_class_folders_that_differ(photos):
    (photos / "val" / "ant").rename(photos / "val" / "aunt")
    with pytest.raises(common.Abort, match=r"differ: ant, aunt in only one of them \(2 in all\)"):
        common.load_data(settings(data=photos), None)


# ------------------------------------------------------------------ recipe


def test_learning_rate_in_closed_form():
    args = settings(lr=2.0, min_lr=0.5, epochs=10, warmup_epochs=2)
    rates = [common.learning_rate(step, args, 5) for step in range(50)]
    assert rates[:10] == pytest.approx([2.0 * (s + 1) / 11 for s in range(10)])
    assert rates[10] == 2.0
    assert rates[30] == pytest.approx(0.5 + 1.5 / 2)  # half-way down the cosine
    assert rates[49] == pytest.approx(0.5 + 1.5 * (1 + math.cos(math.pi * 39 / 40)) / 2)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


def test_weight_decay_spares_biases_norms_tokens_and_positions():
    import vitkd
    student, loss = vitkd.ViT(16, 4, 24, 2, 3, 5, layer_scale=True), vitkd.ViTKDLoss(24, 36)
    module = torch.nn.ModuleDict({"student": student, "loss": loss})
    decayed, spared = common.parameter_groups(module, 0.05)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    names = {id(p): n for n, p in module.named_parameters()}
    decayed, spared = ({names[id(p)] for p in group["params"]} for group in (decayed, spared))
    assert decayed | spared == set(names.values()) and not decayed & spared
    for name in names.values():
        bare = ("bias" in name or "norm" in name or "gamma" in name or "token" in name
                or "pos_embed" in name)
        assert (name in spared) == bare, name


def test_default_precision_is_native_bf16_or_off(monkeypatch):
    cpu = torch.device("cpu")
    assert common.default_amp(cpu) in ("bf16", "off")
    for flags, expected in (("flags: avx2 avx512_bf16", "bf16"), ("flags: amx_bf16", "bf16"),
                            ("flags: avx2 avx512f", "off")):
        monkeypatch.setattr(common.Path, "read_text", lambda self, flags=flags: flags)
        assert common.default_amp(cpu) == expected


# ------------------------------------------------------------------ checkpoints


def test_a_failing_save_keeps_the_old_file(tmp_path):
    path = tmp_path / "last.pth"
    common.save_checkpoint(path, weight=torch.ones(3))
    with pytest.raises((AttributeError, pickle.PicklingError, TypeError)):
        common.save_checkpoint(path, weight=torch.zeros(3), bad=lambda: None)
    assert common.load_checkpoint(path)["weight"].sum() == 3
    assert [p.name for p in tmp_path.iterdir()] == ["last.pth"]


def test_a_reader_never_sees_half_a_file(tmp_path):
    """The new file takes the old one's place by rename: who has the old one open keeps it."""
    path = tmp_path / "last.pth"
    common.save_checkpoint(path, weight=torch.ones(3))
    before = path.read_bytes()
    with open(path, "rb") as reader:
        common.save_checkpoint(path, weight=torch.zeros(3))
        assert reader.read() == before != path.read_bytes()


def test_a_kill_while_saving_keeps_the_old_file(tmp_path):
    """SIGKILL in the middle of torch.save: the process kills itself when half the file is out."""
    path = tmp_path / "last.pth"
    common.save_checkpoint(path, weight=torch.ones(3))
    code = f"""
import os, signal, sys, threading, time, torch
sys.path.insert(0, {str(ROOT)!r})
import common
path = {str(path)!r}
def watch():
    while not os.path.exists(path + ".tmp") or os.path.getsize(path + ".tmp") < 50e6:
        time.sleep(0.0005)
    os.kill(os.getpid(), signal.SIGKILL)
threading.Thread(target=watch, daemon=True).start()
common.save_checkpoint(path, weight=torch.zeros(250_000_000 // 4))
"""
    killed = subprocess.run([sys.executable, "-c", code], check=False)
    assert killed.returncode == -9
    assert common.load_checkpoint(path)["weight"].sum() == 3
    common.save_checkpoint(path, weight=torch.ones(4))  # the left-over is overwritten
    assert [p.name for p in tmp_path.iterdir()] == ["last.pth"]


class Malicious:
    def __reduce__(self):
        return (exec, ("open('code_ran', 'w')",))


def test_checkpoints_never_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Malicious()}, "evil.pth")
    (tmp_path / "old.pth").write_bytes(pickle.dumps(Malicious(), protocol=2))
    for name in ("evil.pth", "old.pth"):
        with pytest.raises(common.Abort, match="never run"):
            common.load_checkpoint(name)
    assert not (tmp_path / "code_ran").exists()


def test_damaged_and_missing_checkpoints(tmp_path):
    buffer = io.BytesIO()
    torch.save({"weight": torch.ones(1000)}, buffer)
    for name, content in (("truncated", buffer.getvalue()[:2000]), ("empty", b""),
                          ("text", b"<html>404</html>" * 20)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(common.Abort) as error:
            common.load_checkpoint(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(common.Abort, match="no file"):
        common.load_checkpoint(tmp_path / "nowhere.pth")
    with pytest.raises(common.Abort):
        common.load_checkpoint(tmp_path)  # a folder


def test_dinos_namespace_is_let_through(tmp_path):
    torch.save({"args": argparse.Namespace(lr=0.1), "teacher": {}}, tmp_path / "dino.pth")
    assert common.load_checkpoint(tmp_path / "dino.pth")["args"].lr == 0.1


# ------------------------------------------------------------------ steps that go bad


def one_parameter():
    weight = torch.nn.Parameter(torch.ones(1))
    return weight, torch.optim.SGD([weight], lr=0.1)


def test_a_bad_step_is_skipped_and_ten_in_a_row_end_the_run(monkeypatch):
    monkeypatch.setattr(common.Epoch, "bad_steps_in_a_row", 0)
    args, data = settings(batch_size=4, micro_batch=4), common.Shapes("train", 16, 80)
    _, scaler = common.set_precision(settings(), torch.device("cpu"))
    weight, optimizer = one_parameter()
    books = common.Epoch(common.train_loader(data, args), 0, args, torch.device("cpu"))
    with pytest.raises(common.Abort, match="not finite ten steps in a row") as error:
        for step, (images, _, _) in enumerate(books.batches()):
            loss = (weight * (math.nan if step >= 3 else 1.0)).sum()
            loss.backward()
            books.add({"loss": loss}, 1.0)
            books.optimizer_step(optimizer, scaler)
    assert error.value.status == 1 and step == 12
    assert weight.item() == pytest.approx(1 - 3 * 0.1)
    record = books.record()
    assert record["skipped_steps"] == 10
    assert record["loss"] == pytest.approx((1 + 0.9 + 0.8) / 3)


def test_too_many_unreadable_images_are_an_error(photos):
    for path in sorted((photos / "train" / "bee").iterdir())[::8]:
        path.write_bytes(b"not a jpeg")  # 5 of 120
    args = settings(data=photos)
    train, *_ = common.load_data(args, common.train_transform(16))
    weight, optimizer = one_parameter()
    _, scaler = common.set_precision(settings(), torch.device("cpu"))
    books = common.Epoch(common.train_loader(train, args), 0, args, torch.device("cpu"))
    for _ in books.batches():
        loss = weight.sum()
        loss.backward()
        books.add({"loss": loss}, 1.0)
        books.optimizer_step(optimizer, scaler)
    with pytest.raises(common.Abort, match="5 of 120 images were unreadable"):
        books.record()


