"""dearkd.py without real images: the losses of the synthesis, its images, folder and command."""

import math
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import start
from torch import nn

import common
import dearkd

def small_cnn(num_classes=4):
    """A teacher whose BatchNorms have statistics that are not those of a new layer."""
    torch.manual_seed(3)
    cnn = dearkd.make_cnn("cifar_resnet20", num_classes)
    for layer in cnn.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    return dearkd.Teacher(cnn)


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
            inputs = {net.bn: images.contiguous(memory_format=order)}
            pixels = images.double().transpose(0, 1).flatten(1).numpy()
            expected = (np.linalg.norm(pixels.mean(1) - net.bn.running_mean.numpy())
                        + np.linalg.norm(pixels.var(1) - net.bn.running_var.numpy()))
            found = dearkd.batch_norm_loss(inputs, 7.0).item() / 7
            assert found == pytest.approx(expected, rel=1e-3, abs=2e-3)
    assert dearkd.batch_norm_loss({net.bn: x}, 1.0) < 0.2 and expected > 10


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("weights", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 30),
                                     (0.3, 0.2, 0.5, 7)])
def test_first_step_follows_the_gradient_of_the_written_out_objective(half, weights):
    """Adam's first step is the rate times the gradient's sign: compare signs, pixel by pixel."""
    model, labels = small_cnn(), torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    tv, l2, bn, divergence = weights
    found = dearkd.synthesize(model, labels, 16, half_steps=int(half), steps=int(not half), image_lr=1e-3,
                              tv=tv, l2=l2, bn=bn, divergence=divergence, jitter=4, seed=5)
    # the same random numbers
    generator = torch.Generator().manual_seed(5)
    low = -torch.tensor(common.MEAN)[:, None, None] / torch.tensor(common.STD)[:, None, None]
    high = low + 1 / torch.tensor(common.STD)[:, None, None]
    start = torch.randn(8, 3, 16, 16, generator=generator).clamp(low, high)
    images = start.double().requires_grad_()
    far = 2 if half else 4
    down, right = torch.randint(-far, far + 1, (2,), generator=generator).tolist()
    x = torch.roll(F.avg_pool2d(images, 2) if half else images, (down, right), (2, 3))
    if torch.rand((), generator=generator) < 0.5:
        x = x.flip(3)
    model, seen = model.double(), []
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_hook(lambda layer, given, _: seen.append((layer, given[0])))
    *maps, logits = model.cnn(x).values()
    loss = -logits.log_softmax(1)[torch.arange(8), labels].mean()
    loss = loss + tv * dearkd.total_variation(x)
    loss = loss + l2 * x.flatten(1).square().sum(1).sqrt().mean()
    for i, (layer, given) in enumerate(seen):
        mu, var = given.mean((0, 2, 3)), given.var((0, 2, 3), correction=0)
        distance = (mu - layer.running_mean).norm() + (var - layer.running_var).norm()
        loss = loss + bn * (10 if i == 0 else 1) * distance
    features = F.normalize(maps[-1].mean((2, 3)), dim=1)
    for i in range(6):  # labels 0 and 1 have two class-mates
        d = [(features[i] - features[j]).norm() for j in range(8) if j != i and labels[j] == labels[i]]
        loss = loss + divergence * (max(d).detach() - min(d)) / 6
    gradient, = torch.autograd.grad(loss, images)
    moved = (found - start).double()
    clear = (gradient.abs() > 1e-3 * gradient.abs().mean()) & (moved != 0)
    assert clear.float().mean() > 0.5  # the others are at the limits of the range
    assert (moved.sign() == -gradient.sign())[clear].float().mean() > 0.995
    assert (found >= low - 1e-6).all() and (found <= high + 1e-6).all()


# ------------------------------------------------------------------ synthesis


def test_the_teacher_is_untouched_and_no_weight_gets_a_gradient():
    model = small_cnn().requires_grad_(True)  # even where its parameters ask for one
    before = {k: v.clone() for k, v in model.state_dict().items()}
    images = dearkd.synthesize(model, torch.tensor([0, 1, 2, 3]), 16, half_steps=0, steps=2)
    assert images.shape == (4, 3, 16, 16) and not images.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(layer.training for layer in model.modules())
    assert not any(layer._forward_pre_hooks for layer in model.modules())


def test_reproducible_and_seeded():
    model, labels = small_cnn(), torch.tensor([0, 1, 2, 3])
    a, b, c = (dearkd.synthesize(model, labels, 16, seed=seed, half_steps=0, steps=2) for seed in (1, 1, 2))
    assert torch.equal(a, b) and (a - c).abs().mean() > 0.1
    with pytest.raises(TypeError):
        dearkd.synthesize(model, labels, 16, divergance=1)


# ------------------------------------------------------------------ the folder


@pytest.mark.parametrize("classes, each, size", [(10, 13, 128), (1000, 3, 128), (3, 8, 8), (2, 1, 8)])
def test_batches_hold_every_image_once_and_class_mates_together(classes, each, size):
    batches = dearkd.plan_batches(classes, each, size, 0)
    assert sorted(sum(batches, [])) == [(c, n) for c in range(classes) for n in range(each)]
    for batch in batches:
        labels = [c for c, _ in batch]
        assert len(batch) <= size and all(labels.count(c) >= min(4, each) for c in labels)


def test_a_killed_synthesis_ends_with_the_same_files(tmp_path):
    state = dearkd.make_cnn("cifar_resnet20", 3).state_dict()
    common.save_checkpoint(tmp_path / "cnn.pth", model=state, cnn="cifar_resnet20")
    words = ["--teacher", tmp_path / "cnn.pth", "--image-size", 16, "--images-per-class", 8,
             "--images-per-batch", 8, "--steps", 12, "--amp", "off"]
    words = [str(word) for word in words]

    def files(folder):
        return {str(path.relative_to(folder)): path.read_bytes()
                for path in folder.rglob("*.png")}

    dearkd.main([*words, "--synthesize", str(tmp_path / "a")])
    process = start("dearkd.py", *words, "--synthesize", tmp_path / "b")
    while not list(tmp_path.glob("b/train/*/*.png")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert files(tmp_path / "b").keys() != files(tmp_path / "a").keys()
    again = [*words, "--synthesize", str(tmp_path / "b"), "--resume"]
    dearkd.main(again)
    assert files(tmp_path / "b") == files(tmp_path / "a") and len(files(tmp_path / "a")) == 25
    with pytest.raises(SystemExit, match="other settings: --divergence 3.0, before None"):
        dearkd.main([*again, "--divergence", "3"])
