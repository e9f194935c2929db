"""dearkd.py without real images: the losses of the synthesis, its images, folder and command."""

import contextlib
import functools
import json
import math
import os
import re
import signal
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import finish, in_process, make_photos, run, start, torchrun
from PIL import Image
from torch import nn
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import common
import dearkd

SMALL = ["--image-size", "16", "--images-per-class", "8", "--images-per-batch", "16", "--steps",
         "3", "--workers", "0"]


def small_cnn(num_classes=4, image_size=16):
    """A teacher whose BatchNorms have statistics that are not those of a new layer."""
    torch.manual_seed(3)
    cnn = dearkd.make_cnn("cifar_resnet20", num_classes)
    for layer in cnn.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    return dearkd.Teacher(cnn, image_size).requires_grad_(False).eval()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A student.pth of a CNN for 3 classes of 16 px, as --train-teacher writes it, and photos."""
    folder = tmp_path_factory.mktemp("synthesis")
    data = make_photos(folder / "photos", counts=(("train", 64), ("val", 13)))
    run("dearkd.py", "--train-teacher", "cifar_resnet20", "--data", data, "--image-size", 16,
        "--epochs", 2, "--batch-size", 16, "--lr", "1e-3", "--rand-augment", 0, "--random-erasing",
        0, "--workers", 0, "--out", folder / "cnn")
    return data, folder / "cnn" / "student.pth"


# ------------------------------------------------------------------ the losses


def brute_force_divergence(features, labels):
    f = np.asarray(features, float)
    f = f / np.sqrt((f**2).sum(1, keepdims=True))
    terms = []
    for i in range(len(f)):
        d = [math.sqrt(((f[i] - f[j])**2).sum()) for j in range(len(f))
             if j != i and labels[i] == labels[j]]
        if len(d) >= 2:
            terms.append(max(0.0, max(d) - min(d)))
    return sum(terms) / len(terms) if terms else 0.0


@pytest.mark.parametrize("labels", [[0] * 6 + [1] * 5 + [2] * 2 + [3], [0, 1, 0, 1, 0, 1, 1, 2],
                                    [0, 1, 2], [0, 0, 1, 1]])
def test_intra_divergence_equals_brute_force(labels):
    features = torch.randn(len(labels), 7, dtype=torch.float64) * 5
    loss = dearkd.intra_divergence_loss(features, torch.tensor(labels))
    assert loss.item() == pytest.approx(brute_force_divergence(features, labels), abs=1e-12)


def test_intra_divergence_separates_near_copies_and_leaves_the_hardest_alone():
    """On a circle: a and b are near-copies, c is far, d alone in its class."""
    angle = torch.tensor([0.0, 1e-3, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
    features = torch.stack([angle.cos(), angle.sin()], 1)
    labels = torch.tensor([0, 0, 0, 1])
    gradient, = torch.autograd.grad(dearkd.intra_divergence_loss(features, labels), angle)
    # d(a, b) = 2 sin((b - a)/2): pushed apart twice, by a and by b; c is pushed away from b, its
    # nearest, by a third of cos(0.4995); the pairs a-c and b-c as hardest ones add nothing
    push = math.cos(0.0005) * 2 / 3
    pull = math.cos((1.0 - 1e-3) / 2) / 3
    assert gradient.tolist() == pytest.approx([push, -push + pull, -pull, 0.0], abs=1e-9)
    with torch.no_grad():
        moved = angle - 0.1 * gradient
    assert moved[1] - moved[0] > 0.1


def test_intra_divergence_has_no_gradient_where_easiest_is_hardest():
    features = torch.eye(3).requires_grad_()  # all pairs equally far apart
    loss = dearkd.intra_divergence_loss(features, torch.zeros(3, dtype=torch.long))
    loss.backward()
    assert loss == 0 and features.grad.abs().max() < 1e-6
    copies = torch.ones(4, 3, requires_grad=True)  # exact copies: no direction, but no NaN either
    dearkd.intra_divergence_loss(copies, torch.zeros(4, dtype=torch.long)).backward()
    assert copies.grad.isfinite().all()


def test_total_variation_in_closed_form():
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    sums = [0.0] * 4
    for n in range(2):
        for c in range(3):
            for i in range(5):
                for j in range(5):
                    for k, (di, dj) in enumerate(((0, 1), (1, 0), (1, 1), (1, -1))):
                        if i + di < 5 and 0 <= j + dj < 5:
                            sums[k] += (x[n, c, i, j] - x[n, c, i + di, j + dj]).item()**2
    assert dearkd.total_variation(x).item() == pytest.approx(sum(map(math.sqrt, sums)), abs=1e-10)


def test_competition_in_closed_form():
    a, b = torch.randn(6, 5, dtype=torch.float64) * 4, torch.randn(6, 5, dtype=torch.float64) * 4
    expected = 0.0
    for x, y in zip(a.numpy(), b.numpy()):
        p, q = (np.exp(z / 3) / np.exp(z / 3).sum() for z in (x, y))
        m = (p + q) / 2
        expected += 1 - ((p * np.log(p / m)).sum() + (q * np.log(q / m)).sum()) / 2
    assert dearkd.competition_loss(a, b).item() == pytest.approx(expected / 6, abs=1e-10)
    assert dearkd.competition_loss(a, a).item() == pytest.approx(1)
    far = (torch.tensor([[2000.0, 0.0, 0.0]]), torch.tensor([[0.0, 2000.0, 0.0]]))
    assert dearkd.competition_loss(*far).item() == pytest.approx(1 - math.log(2))


def test_batch_norm_term_in_closed_form_and_near_zero_on_its_own_statistics():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)
            self.linear = nn.Linear(3, 2)

        def forward(self, x):
            return self.linear(self.bn(x).mean((2, 3)))

    net = Net().eval()
    net.bn.running_mean.copy_(torch.tensor([1.0, -2.0, 30.0]))
    net.bn.running_var.copy_(torch.tensor([4.0, 0.25, 9.0]))
    x = torch.randn(64, 3, 32, 32) * net.bn.running_var.sqrt()[:, None, None]
    x = x + net.bn.running_mean[:, None, None]
    for images in (x, x * 0.5 + 1):
        for order in (torch.contiguous_format, torch.channels_last):
            with dearkd.watch(net) as seen:
                net(images.contiguous(memory_format=order))
            pixels = images.double().transpose(0, 1).flatten(1).numpy()
            expected = (np.linalg.norm(pixels.mean(1) - net.bn.running_mean.numpy())
                        + np.linalg.norm(pixels.var(1) - net.bn.running_var.numpy()))
            assert len(seen.batch_norm) == 1
            assert seen.batch_norm[0].item() == pytest.approx(expected, rel=1e-3, abs=2e-3)
    with dearkd.watch(net) as seen:
        net(x)
    assert seen.batch_norm[0] < 0.2 and expected > 10


def test_objective_is_the_sum_of_its_terms():
    """One step at half size and one at full size, against the formulas written out in float64."""
    model = small_cnn()
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    competitor = dearkd.ViT(16, 4, 24, 2, 3, 4).requires_grad_(False).eval()
    torch.nn.init.normal_(competitor.head.weight)
    reports = []
    weights = {"tv": 0.3, "l2": 0.2, "bn": 0.5, "divergence": 7.0}
    dearkd.synthesize(
        model, labels, 16, seed=5, competitor=competitor, competition=1.5, half_steps=1, steps=1,
        jitter=4, report=lambda step, losses, images: reports.append(
            ({k: v.item() for k, v in losses.items()}, images.detach().clone())), **weights)
    # the same random numbers
    generator = torch.Generator().manual_seed(5)
    low = -torch.tensor(common.MEAN)[:, None, None] / torch.tensor(common.STD)[:, None, None]
    high = low + 1 / torch.tensor(common.STD)[:, None, None]
    images = torch.randn(8, 3, 16, 16, generator=generator).clamp(low, high)
    for half, (losses, after) in zip((True, False), reports):
        x = F.avg_pool2d(images, 2) if half else images
        jitter = 2 if half else 4
        down, right = torch.randint(-jitter, jitter + 1, (2,), generator=generator).tolist()
        x = torch.roll(x, (down, right), (2, 3))
        if torch.rand((), generator=generator) < 0.5:
            x = x.flip(3)
        inputs = []
        hooks = [layer.register_forward_hook(functools.partial(
            lambda kept, layer, given, _: kept.append((layer, given[0].double())), inputs))
            for layer in model.modules() if isinstance(layer, (nn.BatchNorm2d, nn.Linear))]
        with torch.no_grad():
            logits = model.cnn(x)[1].double()
        for hook in hooks:
            hook.remove()
        bn, features = 0, None
        for i, (layer, given) in enumerate(inputs):
            if isinstance(layer, nn.Linear):
                features = given
                continue
            mu, var = given.mean((0, 2, 3)), given.var((0, 2, 3), correction=0)
            bn += (10 if i == 0 else 1) * ((mu - layer.running_mean).norm()
                                           + (var - layer.running_var).norm()).item()
        pixels = x.double()
        expected = {"ce": -logits.log_softmax(1)[torch.arange(8), labels].mean().item(),
                    "tv": 0.3 * dearkd.total_variation(pixels).item(),
                    "l2": 0.2 * pixels.flatten(1).square().sum(1).sqrt().mean().item(),
                    "bn": 0.5 * bn,
                    "divergence": 7 * brute_force_divergence(features, labels.tolist())}
        if not half:
            with torch.no_grad():
                expected["competition"] = 1.5 * dearkd.competition_loss(
                    logits, competitor(x).double()).item()
        assert losses.keys() == expected.keys()
        for name, value in expected.items():
            assert losses[name] == pytest.approx(value, rel=1e-4), name
        assert (after - images).abs().amax((1, 2, 3)).min() > 0  # every image moved
        assert (after >= low - 1e-6).all() and (after <= high + 1e-6).all()
        images = after


# ------------------------------------------------------------------ synthesis


def test_the_teacher_is_untouched_and_no_weight_gets_a_gradient():
    model = small_cnn().requires_grad_(True)  # even where its parameters ask for one
    before = {k: v.clone() for k, v in model.state_dict().items()}
    images = dearkd.synthesize(model, torch.tensor([0, 1, 2, 3]), 16, steps=2)
    assert images.shape == (4, 3, 16, 16) and not images.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(layer.training for layer in model.modules())

    def fail(step, losses, images):
        raise KeyError("on the way")

    with pytest.raises(KeyError):
        dearkd.synthesize(model, torch.tensor([0, 1]), 16, steps=2, report=fail)
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in model.modules())


def test_synthesis_learns_its_classes_and_matches_the_statistics(teacher):
    model, reports = dearkd.load_teacher(str(teacher[1]), num_classes=3), []
    labels = torch.arange(12) % 3
    images = dearkd.synthesize(model, labels, 16, steps=60, bn=0.1, report=lambda s, losses, _:
                               reports.append({k: v.item() for k, v in losses.items()}))
    assert reports[-1]["ce"] < 0.5 * reports[0]["ce"]
    assert reports[-1]["bn"] < 0.5 * reports[0]["bn"]
    assert (model(images).argmax(1) == labels).float().mean() > 0.8


def test_divergence_spreads_the_images_of_a_class(teacher):
    model = dearkd.load_teacher(str(teacher[1]), num_classes=3)
    labels, spread = torch.zeros(8, dtype=torch.long), {}
    for weight in (0.0, 100.0):
        images = dearkd.synthesize(model, labels, 16, steps=40, bn=0.1, divergence=weight)
        with dearkd.watch(model.cnn) as seen:
            model(images)
        spread[weight] = torch.pdist(F.normalize(seen.features, dim=1)).mean().item()
    assert spread[100.0] > 1.1 * spread[0.0]


def test_reproducible_and_seeded():
    model, labels = small_cnn(), torch.tensor([0, 1, 2, 3])
    a, b, c = (dearkd.synthesize(model, labels, 16, seed=seed, steps=2) for seed in (1, 1, 2))
    assert torch.equal(a, b) and (a - c).abs().mean() > 0.1
    with pytest.raises(TypeError):
        dearkd.synthesize(model, labels, 16, divergance=1)


def test_cnns_without_batch_norm_are_refused():
    model = dearkd.Teacher(dearkd.make_cnn("vgg11", 4), 32)
    with pytest.raises(common.Abort, match="without BatchNorm"):
        dearkd.synthesize(model, torch.tensor([0, 1]), 32, steps=1)


@pytest.mark.parametrize("num_classes, per_class, batch", [
    (10, 500, 256), (10, 50, 128), (1000, 20, 128), (3, 8, 16), (2, 7, 8), (1, 1, 8), (5, 3, 9),
    (7, 9, 10), (13, 33, 8)])
def test_batches_hold_several_images_of_a_class(num_classes, per_class, batch):
    plan = dearkd.plan_batches(num_classes, per_class, batch, seed=0)
    seen = [(c, n) for labels, numbers in plan for c, n in zip(labels.tolist(), numbers.tolist())]
    assert sorted(seen) == [(c, n) for c in range(num_classes) for n in range(per_class)]
    sizes = [len(labels) for labels, _ in plan]
    assert max(sizes) <= batch
    assert min(sizes) >= 0.4 * max(sizes)  # no tiny last batch
    for labels, _ in plan:
        assert labels.bincount()[labels.unique()].min() >= min(4, per_class)
    again = dearkd.plan_batches(num_classes, per_class, batch, seed=0)
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(plan, again))


def test_class_names_sort_like_the_outputs(tmp_path):
    names = dearkd.class_names("resnet18", 1000)
    assert names == sorted(names) and len(set(names)) == 1000
    assert names[0] == "000 tench" and names[134] == "134 crane bird"
    assert not any("/" in name for name in names)
    assert dearkd.class_names("resnet18", 3) == ["0", "1", "2"]
    assert dearkd.class_names("cifar_resnet20", 11)[:2] == ["00", "01"]


# ------------------------------------------------------------------ the folder


def pictures(folder):
    return {str(file.relative_to(folder)): file.read_bytes()
            for file in sorted((folder / "train").glob("*/*"))}


def test_the_folder_is_training_data(teacher, tmp_path, capsys, monkeypatch):
    data, weights = teacher
    images = {}
    synthesize = dearkd.synthesize

    def keep(*arguments, **settings):
        result = synthesize(*arguments, **settings)
        images[len(images)] = result
        return result

    monkeypatch.setattr(dearkd, "synthesize", keep)
    status, out, err = in_process(
        dearkd, capsys, monkeypatch, "--synthesize", tmp_path / "made", "--teacher", weights,
        "--data", data, "--verifier", weights, "--preview-every", 2, *SMALL)
    assert status == 0, err
    tree = ImageFolder(tmp_path / "made" / "train")
    assert tree.classes == ["ant", "bee", "cat"] and np.bincount(tree.targets).tolist() == [8] * 3
    # round trip: what the ordinary loader reads is what was made, within one level of 255
    plan = dearkd.plan_batches(3, 8, 16, 0)
    assert len(images) == len(plan) == 2
    for i, (labels, numbers) in enumerate(plan):
        for image, c, n in zip(images[i], labels, numbers):
            file = tmp_path / "made" / "train" / tree.classes[c] / f"{n:05d}.png"
            assert Image.open(file).mode == "RGB"
            read = common.normalize(v2.functional.pil_to_tensor(common.open_rgb(file))[None],
                                    "cpu")[0]
            assert ((read - image) * torch.tensor(common.STD)[:, None, None]).abs().max() <= 1 / 255
    record = json.loads((tmp_path / "made" / "synthesis.json").read_text())
    assert record["images"] == 24 and record["images_per_second"] > 0
    assert record["settings"]["steps"] == 3 and record["classes"] == ["ant", "bee", "cat"]
    for kind in ("synthetic", "real"):
        assert record[kind].keys() == {"teacher_top1", "confidence", "verifier_top1", "diversity",
                                       "nearest"}
        assert record[kind]["teacher_top1"] == record[kind]["verifier_top1"]
        assert 0 < record[kind]["nearest"] <= record[kind]["diversity"] <= 2
        assert f"{kind} images: teacher_top1" in out
    assert record["real"]["teacher_top1"] > 60
    assert out.index("real images") < out.index("batch 1/2") < out.index("synthetic images")
    preview = Image.open(tmp_path / "made" / "preview.png")
    assert preview.size == (8 * 17 + 1, 1 * 17 + 1 + 17)  # 12 images, 8 in a row, 1 px between
    # and it trains, judged on real images
    flags = ["--teacher", weights, "--student", "micro", "--image-size", 16, "--patch-size", 4,
             "--epochs", 1, "--batch-size", 8, "--workers", 0]
    status, out, err = in_process(
        dearkd, capsys, monkeypatch, "--data", tmp_path / "made", "--val", data / "val",
        "--out", tmp_path / "out", *flags)
    assert status == 0, err
    assert "top1" in out
    status, _, err = in_process(dearkd, capsys, monkeypatch, "--data", tmp_path / "made", "--out",
                                tmp_path / "o", *flags)
    assert status == 2 and "or --val another folder of CLASS/*" in err
    other = make_photos(tmp_path / "other", ("ant", "bee", "dog"), (("val", 2),))
    status, _, err = in_process(dearkd, capsys, monkeypatch, "--data", tmp_path / "made", "--val",
                                other, "--out", tmp_path / "o", *flags)
    assert status == 2 and "differ: cat, dog in only one of them" in err


def test_figures_equal_their_definitions(tmp_path):
    model = small_cnn(3)
    data = make_photos(tmp_path, counts=(("val", 5),))
    base = ImageFolder(data / "val")
    args = common.argparse.Namespace(image_size=16, workers=0)
    found = dearkd.figures("real", base, model, None, args, torch.device("cpu"),
                           contextlib.nullcontext)
    assert "verifier_top1" not in found
    transform = v2.Compose([v2.PILToTensor(),
                            v2.Resize(16, interpolation=v2.InterpolationMode.BICUBIC),
                            v2.CenterCrop(16)])
    images = torch.stack([transform(common.open_rgb(path)) for path, _ in base.samples])
    images = common.normalize(images, "cpu")
    with torch.no_grad():
        p = model(images).double().softmax(1)
    labels = torch.tensor(base.targets)
    assert found["teacher_top1"] == pytest.approx(
        100 * (p.argmax(1) == labels).double().mean().item())
    assert found["confidence"] == pytest.approx(
        100 * p[torch.arange(15), labels].mean().item(), rel=1e-4)
    with dearkd.watch(model) as seen:
        model(images)
    f = F.normalize(seen.features.double(), dim=1)
    mean, nearest = [], []
    for c in range(3):
        d = [[(f[i] - f[j]).norm().item() for j in range(15) if j != i and labels[j] == c]
             for i in range(15) if labels[i] == c]
        mean.append(np.mean(d))
        nearest.append(np.mean([min(row) for row in d]))
    assert found["diversity"] == pytest.approx(np.mean(mean), rel=1e-3)
    assert found["nearest"] == pytest.approx(np.mean(nearest), rel=1e-3)


def test_two_processes_make_the_same_images_as_one(teacher, tmp_path):
    weights = teacher[1]
    flags = ["--teacher", weights, "--amp", "off", *SMALL]
    run("dearkd.py", "--synthesize", tmp_path / "one", *flags)
    run("dearkd.py", "--synthesize", tmp_path / "two", *flags, processes=2)
    one, two = pictures(tmp_path / "one"), pictures(tmp_path / "two")
    assert len(one) == 24 and one == two
    assert sorted(os.listdir(tmp_path / "one" / "train")) == ["0", "1", "2"]
    records = [json.loads((tmp_path / name / "synthesis.json").read_text())
               for name in ("one", "two")]
    assert records[0]["synthetic"] == pytest.approx(records[1]["synthetic"])


def test_killed_stopped_and_started_again(teacher, tmp_path):
    """Whatever ends it, no picture is half written; the same command goes on and ends in the same
    images; batches that were finished are not made again."""
    weights = teacher[1]
    flags = ["--teacher", weights, "--amp", "off", *SMALL, "--images-per-class", 24]
    run("dearkd.py", "--synthesize", tmp_path / "whole", *flags)
    command = ["dearkd.py", "--synthesize", tmp_path / "made", *flags]
    folder, kept = tmp_path / "made", {}
    for number, enough in ((signal.SIGKILL, 1), (signal.SIGTERM, 33)):
        process = start(*command)
        while len(list((folder / "train").glob("*/*.png"))) < enough:
            assert process.poll() is None, finish(process)
            time.sleep(0.001)
        process.send_signal(number)
        status, _, err = finish(process)
        assert status == (-9 if number == signal.SIGKILL else 143), err
        if number == signal.SIGTERM:
            assert "stopped by SIGTERM" in err and len(err.splitlines()) == 1, err
        for file in (folder / "train").glob("*/*.png"):
            Image.open(file).load()
    whole = pictures(tmp_path / "whole")
    done = [all(f"train/{c}/{n:05d}.png" in pictures(folder) for c, n in zip(*map(
        torch.Tensor.tolist, batch))) for batch in dearkd.plan_batches(3, 24, 16, 0)]
    assert 0 < sum(done) < len(done)
    kept = {name: (folder / name).stat().st_mtime_ns for name in pictures(folder)}
    out, _ = run(*command)
    assert f"{sum(done)} of {len(done)} batches are there already" in out
    assert pictures(folder) == whole
    unchanged = sum((folder / name).stat().st_mtime_ns == t for name, t in kept.items()
                    if (folder / name).exists())
    assert unchanged >= 12 * sum(done)
    out, _ = run(*command)  # nothing left but the figures
    assert f"{len(done)} of {len(done)} batches are there already" in out


def test_wrong_input_is_one_line(teacher, tmp_path, capsys, monkeypatch):
    data, weights = teacher
    torch.save(torchvision.models.squeezenet1_1(num_classes=3).state_dict(), tmp_path / "s.pth")
    (tmp_path / "photos" / "train").mkdir(parents=True)
    here = ["--synthesize", tmp_path / "made", "--teacher", weights, *SMALL]
    vit = dearkd.ViT(32, 4, 24, 1, 3, 3)
    arch = {"image_size": 32, "patch_size": 4, "dim": 24, "depth": 1, "num_heads": 3,
            "num_classes": 3, "mhca_blocks": 0}
    common.save_checkpoint(tmp_path / "vit.pth", model=vit.state_dict(), arch=arch,
                           script="dearkd", top1=None)
    common.save_checkpoint(tmp_path / "cnn10.pth", model=dearkd.make_cnn(
        "cifar_resnet20", 10).state_dict(), arch={"cnn": "cifar_resnet20", "image_size": 16,
                                                  "num_classes": 10}, script="dearkd", top1=None)
    common.save_checkpoint(tmp_path / "cnn3.pth", model=dearkd.make_cnn(
        "cifar_resnet20", 3).state_dict(), arch={"cnn": "cifar_resnet20", "image_size": 16,
                                                 "num_classes": 3}, script="dearkd", top1=None)
    assert in_process(dearkd, capsys, monkeypatch, *here)[0] == 0
    for arguments, message in (
            ([*here, "--images-per-class", 0], "0 is not in [1, inf)"),
            (here[:4], "goes with a --teacher and with --images-per-class"),
            ([*here, "--steps", 4], "images of another synthesis (steps 3 -> 4)"),
            ([*here, "--data", data], "another synthesis (classes ['0', '1', '2'] -> ['ant', 'be"),
            ([*here, "--teacher", tmp_path / "cnn3.pth"], "images of another synthesis (weights "),
            ([*here, "--teacher-weights", weights], "--teacher-weights goes with a teacher's name"),
            ([*here, "--verifier-weights", weights], "goes with a --verifier's name"),
            ([*here, "--synthesize", tmp_path / "photos"], "is not of --synthesize"),
            ([*here, "--data", tmp_path / "none"], "no folder"),
            ([*here, "--data", "data/imagenet"], "no folder data/imagenet/val"),
            ([*here, "--data", "shapes"], "the teacher has 3 classes, shapes 10"),
            ([*here, "--verifier", tmp_path / "cnn10.pth"], "has 10 classes, the data 3"),
            ([*here, "--competitor", tmp_path / "vit.pth"], "must be for 16 px and 3 classes"),
            ([*here, "--competitor", weights], "is no student of dearkd.py"),
            ([*here, "--amp", "fp16"], "take --amp bf16 or off"),
            (["--synthesize", tmp_path / "new", "--teacher", "squeezenet1_1", "--teacher-weights",
              tmp_path / "s.pth", *SMALL], "a teacher without BatchNorm cannot be inverted"),
            (["--synthesize", tmp_path / "new", "--teacher", weights, *SMALL, "--image-size", 1,
              "--half-steps", 1], "cannot take 2 images of 0 px at once")):
        status, _, err = in_process(dearkd, capsys, monkeypatch, *arguments)
        lines = [line for line in err.splitlines() if "warning" not in line]
        assert status == 2 and message in err and len(lines) == 1, (arguments, err)
    assert not (tmp_path / "new").exists()


def test_a_full_disk_is_one_line(teacher, tmp_path, capsys, monkeypatch):
    def full(image, file, **_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dearkd, "save_image", full)
    status, _, err = in_process(dearkd, capsys, monkeypatch, "--synthesize", tmp_path / "made",
                                "--teacher", teacher[1], *SMALL)
    assert status == 1 and "cannot write" in err and len(err.splitlines()) == 1, err
    assert not pictures(tmp_path / "made")


def test_dry_run_projects_and_writes_nothing(teacher, tmp_path):
    out, _ = run("dearkd.py", "--synthesize", tmp_path / "made", "--teacher", teacher[1], *SMALL,
                 "--steps", 100000, "--half-steps", 100000, "--dry-run")
    assert "2 of 2 batches are left" in out and not (tmp_path / "made").exists()
    seconds, hours = (float(out.split(word)[0].split()[-1]) for word in (" s an image", " hours"))
    assert hours * 3600 == pytest.approx(seconds * 24, rel=0.02) and seconds * 24 > 100


def test_a_rank_alone_names_its_fault(teacher, tmp_path):
    """Rank 1 cannot write its batch: it says so, though rank 0 speaks for all otherwise."""
    flags = ["--synthesize", tmp_path / "made", "--teacher", teacher[1], *SMALL]
    run("dearkd.py", *flags)
    for file in (tmp_path / "made" / "train").glob("*/*.png"):
        file.unlink()
    label, number = (column[0].item() for column in dearkd.plan_batches(3, 8, 16, 0)[1])
    (tmp_path / "made" / "train" / str(label) / f"{number:05d}.png").mkdir()
    _, err = run(*torchrun(2, "dearkd.py", *flags), status=1)
    assert "dearkd.py: error: cannot write " in err and "Error" not in err.split(
        "cannot write")[0]


@pytest.mark.slow
def test_demo_without_data_prints_its_table():
    out, _ = run("dearkd.py", "--demo-data-free", timeout=1500)
    table = out.splitlines()[-4:]
    assert [re.split("diversity|top-1", line)[0].strip() for line in table] == [
        "CNN", "student, noise", "student, DeepInversion", "student, DF-DearKD"]
    top1 = [float(line.split("top-1")[1].split("%")[0]) for line in table]
    assert top1[0] > 90 and top1[2] > top1[1] + 5 and top1[3] > top1[1] + 5
