"""dearkd.py without real images: the losses of the synthesis, its images, folder and command."""

import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common_before as common
import dearkd

def small_cnn(num_classes=4, image_size=16):
    """A teacher whose BatchNorms have statistics that are not those of a new layer."""
    torch.manual_seed(3)
    cnn = dearkd.make_cnn("cifar_resnet20", num_classes)
    for layer in cnn.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    return dearkd.Teacher(cnn, image_size).requires_grad_(False).eval()


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


def test_reproducible_and_seeded():
    model, labels = small_cnn(), torch.tensor([0, 1, 2, 3])
    a, b, c = (dearkd.synthesize(model, labels, 16, seed=seed, steps=2) for seed in (1, 1, 2))
    assert torch.equal(a, b) and (a - c).abs().mean() > 0.1
    with pytest.raises(TypeError):
        dearkd.synthesize(model, labels, 16, divergance=1)


# ------------------------------------------------------------------ the folder
