"""dearkd.py: convolution by attention, hints, CNN teachers, the two stages, images from weights."""

import math
import time
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DATA, start
from test_runs import flags, main, records, student
from torch import nn
from torchvision import datasets, models

import common
import dearkd

# ------------------------------------------------------------------ MHCA


def test_no_position_weight_is_plain_attention():
    conv, plain = dearkd.ConvAttention(24, 3, 4, 2), dearkd.Attention(24, 3)
    conv.pos_weight.data.zero_()
    plain.load_state_dict({k: v for k, v in conv.state_dict().items() if k != "pos_weight"})
    x = torch.randn(2, 18, 24)
    assert torch.allclose(conv.eval()(x), plain(x), atol=1e-6)
    assert torch.allclose(conv.train()(x), plain(x), atol=1e-6)  # whatever is dropped of zero


def test_nine_sharp_heads_are_a_3x3_convolution():
    """Zero content and pos_weight of -a |d - c|^2 with a large a: each head a shift by its c."""
    g, D = 6, 27
    attention = dearkd.ConvAttention(D, 9, g, 0).double().eval()
    attention.pos_weight.data *= 1e3
    attention.qkv.weight.data[:2 * D] = 0
    attention.qkv.bias.data[:2 * D] = 0
    x = torch.randn(2, g * g, D).double()
    # The same as a convolution: kernel[i, j] = sum of the head with offset (i - 1, j - 1)
    W_v, b_v = attention.qkv.weight[2 * D:], attention.qkv.bias[2 * D:]
    c = (attention.pos_weight[:, 1:] / 2e3).round().int()
    assert sorted(map(tuple, c.tolist())) == [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    assert c.square().sum(1).tolist() == [0, 1, 1, 1, 1, 2, 2, 2, 2]
    kernel, bias = torch.zeros(D, D, 3, 3).double(), attention.proj.bias
    for h in range(9):
        rows = slice(3 * h, 3 * h + 3)
        kernel[:, :, c[h, 0] + 1, c[h, 1] + 1] += attention.proj.weight[:, rows] @ W_v[rows]
        bias = bias + attention.proj.weight[:, rows] @ b_v[rows]
    expected = F.conv2d(x.transpose(1, 2).view(2, D, g, g), kernel, bias)   # interior: no padding
    found = attention(x).transpose(1, 2).view(2, D, g, g)[:, :, 1:-1, 1:-1]
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_position_term_in_closed_form():
    attention = dearkd.ConvAttention(12, 3, 4, 2).eval()
    nn.init.normal_(attention.pos_weight)
    term = attention.position_term()
    assert term.shape == (3, 18, 18)
    assert (term[:, :2] == 0).all() and (term[:, :, :2] == 0).all()  # class and distillation token
    i, j = np.divmod(np.arange(16), 4)
    d1, d2 = i[None] - i[:, None], j[None] - j[:, None]  # to the key from the query
    for (v0, v1, v2), found in zip(attention.pos_weight.tolist(), term[:, 2:, 2:].tolist()):
        assert np.allclose(found, v0 * (d1**2 + d2**2) + v1 * d1 + v2 * d2, atol=1e-5)


@pytest.mark.parametrize("grid", [8, 14])
def test_dropout_keeps_the_neighbourhood(grid):
    """Mass within the 3 x 3 neighbourhood of inner patches: in training at least 0.8 of it."""
    attention = dearkd.ConvAttention(48, 3, grid, 2)
    position = torch.cartesian_prod(*[torch.arange(grid)] * 2)
    near = (position[:, None] - position[None]).abs().amax(2) <= 1          # (N, N)
    inner = ((position > 0) & (position < grid - 1)).all(1)

    def mass():  # with zero content
        a = attention.position_term().softmax(2)[:, 2:, 2:]
        return (a * near).sum(2)[:, inner].mean().item()

    in_evaluation = attention.eval() and mass()
    attention.train()
    in_training = sum(mass() for _ in range(400)) / 400
    assert in_evaluation > 0.55 and in_training >= 0.8 * in_evaluation
    struck = torch.stack([attention.position_term().abs().amax((1, 2)) == 0 for _ in range(1000)])
    assert ((struck.float().mean(0) - 0.1).abs() < 0.04).all()  # each head, by a draw of its own


# ------------------------------------------------------------------ aligner, hints, the ViT


def test_aligner_sees_the_neighbourhood_and_keeps_the_grid():
    aligner, tokens = dearkd.Aligner(12, 20), torch.zeros(1, 25, 12)
    tokens[0, 7] = torch.randn(12)  # row 1, column 2: only its neighbourhood may change
    change = (aligner(tokens) - aligner(torch.zeros(1, 25, 12))).abs().sum(1)[0] > 1e-6
    assert aligner(tokens).shape == (1, 20, 5, 5)
    assert change.nonzero().tolist() == [[i, j] for i in (0, 1, 2) for j in (1, 2, 3)]


def test_hint_loss_in_closed_form():
    small, large = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 12, 12)
    means = large.double().view(2, 3, 4, 3, 4, 3).mean((3, 5))
    assert dearkd.hint_loss(small, large).item() == pytest.approx(
        (small.double() - means).square().mean().item(), rel=1e-5)
    ramp = torch.arange(4.0).expand(1, 1, 4, 4)  # enlarged to 8: 0, 1/4, 3/4, 5/4, ...
    row = torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])
    assert dearkd.hint_loss(row.expand(1, 1, 8, 8), ramp).item() == pytest.approx(0, abs=1e-12)
    assert dearkd.hint_loss(small, small.bfloat16()).dtype == torch.float32


def test_vit_returns_a_pair_in_training_and_the_mean_in_evaluation():
    model = dearkd.ViT(16, 4, 24, 3, 3, 5, mhca_blocks=2, pos_dropout=0.0)
    images, seen = torch.randn(2, 3, 16, 16), []
    pair = model(images)
    assert [p.shape for p in pair] == [(2, 5), (2, 5)] and not torch.equal(*pair)
    assert torch.allclose(model.eval()(images), (pair[0] + pair[1]) / 2, atol=1e-6)
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    hidden, _ = model.features(images, (0, 2))
    assert hidden.keys() == {0, 2}  # patch tokens: without class and distillation token
    assert all(torch.equal(v, seen[k][:, 2:]) for k, v in hidden.items())
    assert dearkd.ViT(16, 4, 24, 2, 3, num_classes=0)(images).shape == (2, 24)
    names = set(model.state_dict())
    assert {"dist_token", "head_dist.weight", "blocks.1.attn.pos_weight"} <= names
    assert "blocks.2.attn.pos_weight" not in names and not any(n.endswith(".r") for n in names)


def test_attention_distance_in_closed_form():
    model = dearkd.ViT(16, 4, 24, 2, 3, 5, mhca_blocks=1).eval()
    for block in model.blocks:  # zero content: uniform in block 1, Gaussians in block 0
        block.attn.qkv.weight.data[:48] = block.attn.qkv.bias.data[:48] = 0
    position = np.array([(i, j) for i in range(4) for j in range(4)], float)
    d = position[None] - position[:, None]
    length = np.sqrt((d**2).sum(2))
    found = dearkd.attention_distance(model, torch.randn(3, 3, 16, 16)).numpy()
    assert found.shape == (2, 3) and np.allclose(found[1], length.mean(), rtol=1e-5)
    for h, c in enumerate(model.blocks[0].attn.pos_weight.detach().numpy()[:, 1:] / 2):
        a = np.exp(-((d - c)**2).sum(2))
        a /= a.sum(1, keepdims=True)
        assert found[0, h] == pytest.approx((a * length).sum(1).mean(), rel=1e-5)


# ------------------------------------------------------------------ the teacher


@pytest.mark.parametrize("name, modules", [
    ("resnet18", ["layer1", "layer2", "layer3", "layer4"]),
    ("regnet_y_400mf", [f"trunk_output.block{i}" for i in (1, 2, 3, 4)])])
def test_released_cnns_load_and_give_the_maps_of_their_stages(name, modules, tmp_path):
    cnn = models.get_model(name, weights=None).eval()
    torch.save(cnn.state_dict(), tmp_path / "cnn.pth")
    teacher, seen = dearkd.load_teacher(name, tmp_path / "cnn.pth"), []
    for module in modules:
        cnn.get_submodule(module).register_forward_hook(lambda m, i, output: seen.append(output))
    images = torch.randn(2, 3, 64, 64)
    maps, logits = teacher.features(images)
    assert torch.allclose(logits, cnn(images), atol=1e-5) and torch.equal(teacher(images), logits)
    assert all(torch.allclose(a, b, atol=1e-4) and a.min() >= 0 for a, b in zip(maps, seen))
    assert len(maps) == len(seen) == 4 and maps[0].shape[-1] == 16
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())


def test_wrong_cnns_say_what_is_wrong(tmp_path, teacher):
    torch.save({"layer1.0.conv1.weight": torch.zeros(1)}, tmp_path / "x.pth")
    for name, weights, message in (
            ("cifar_resnet56", None, "cannot be downloaded: give its weights"),
            ("resnet18", tmp_path / "x.pth", "Missing key.*conv1.weight"),
            (str(teacher.with_name("cnn.pth")), None, "size mismatch for linear.weight"),
            (str(teacher), None, "which --train-teacher did not write")):
        with pytest.raises((ValueError, RuntimeError), match=f"(?s){message}"):
            dearkd.load_teacher(name, weights, num_classes=7)


def test_a_real_cnn_recognises_real_images(tmp_path):
    """Real weights and JPEGs of CIFAR-10: 83.2 % of all 10,000 are right; here every 25th."""
    if not ((DATA / "cifar10_val.zip").exists() and (DATA / "cifar_resnet56.pth").exists()):
        pytest.skip(f"no {DATA}/cifar10_val.zip or cifar_resnet56.pth")
    zipfile.ZipFile(DATA / "cifar10_val.zip").extractall(tmp_path)
    folder = datasets.ImageFolder(tmp_path / "cifar10" / "val", common.train_transform(32, (1, 1)))
    images, labels = zip(*(folder[i] for i in range(0, len(folder), 25)))
    teacher = dearkd.load_teacher("cifar_resnet56", DATA / "cifar_resnet56.pth", 10)
    right = teacher(torch.stack(images)).argmax(1) == torch.tensor(labels)
    assert 0.77 < right.float().mean() < 0.89  # within three deviations of 400 draws


# ------------------------------------------------------------------ training


def test_loss_and_gradients_of_both_stages():
    args = SimpleNamespace(label_smoothing=0.1, alpha=0.3, beta=2.0)
    vit = dearkd.ViT(16, 4, 24, 3, 3, 10, mhca_blocks=2, pos_dropout=0.0)
    aligners = nn.ModuleList([dearkd.Aligner(24, 16), dearkd.Aligner(24, 64)])
    model = dearkd.Distillation(vit, aligners, [(0, 1), (1, 3)], args)
    teacher = dearkd.Teacher(dearkd.make_cnn("cifar_resnet20", 10))
    images, target = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    maps, logits = teacher.features(images)
    losses = model(images, target, (maps, logits))
    sum(losses.values()).backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())
    hidden, (by_class, by_dist) = vit.features(images, (0, 1))
    hints = [dearkd.hint_loss(aligners[0](hidden[0]), maps[0]),
             (aligners[1](hidden[1]) - maps[2]).square().mean()]  # both 4 x 4
    expected = {"ce": 0.7 * F.cross_entropy(by_class, target, label_smoothing=0.1),
                "logits": 0.3 * F.cross_entropy(by_dist, logits.argmax(1)), "hints": 2 * sum(hints)}
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value.item(), rel=1e-5)
    model.zero_grad()
    losses = model(images, target, None)  # stage 2
    assert losses["ce"].item() == pytest.approx(sum(
        F.cross_entropy(x, target, label_smoothing=0.1).item() / 2 for x in (by_class, by_dist)))
    losses["ce"].backward()
    assert all(p.grad is None for p in aligners.parameters())
    assert all(p.grad.abs().sum() > 0 for p in vit.parameters())


def test_the_teacher_rests_in_stage_2_and_stays_the_same_bits(teacher, tmp_path, monkeypatch):
    seen, load = [], dearkd.load_teacher

    def keep(*arguments):
        cnn = load(*arguments)
        cnn.cnn.register_forward_hook(  # while validating it runs in inference mode
            lambda *_: None if torch.is_inference_mode_enabled() else seen.append(0))
        seen.append((cnn, {k: v.clone() for k, v in cnn.state_dict().items()}))
        return cnn

    monkeypatch.setattr(dearkd, "load_teacher", keep)
    main("dearkd", *flags("dearkd", teacher, tmp_path, "--epochs", 4, "--stage1-epochs", 2))
    (cnn, before), *calls = seen
    assert all(torch.equal(v, before[k]) for k, v in cnn.state_dict().items())
    assert len(calls) == 1 + 2 * 10  # the shapes of its maps; two epochs of ten steps
    log = records(tmp_path)
    assert [record["stage"] for record in log] == [1, 1, 2, 2]
    assert [len(record.get("attention_distance", [])) for record in log] == [0, 6, 0, 6]


def test_a_cnn_is_trained_resumed_and_becomes_a_teacher(teacher, photos, tmp_path):
    words = ["--train-teacher", "cifar_resnet20", "--data", photos, "--image-size", 16, "--workers",
             0, "--batch-size", 16, "--lr", 3e-3, "--epochs", 6, "--amp", "off"]
    main("dearkd", *words, "--out", tmp_path / "a")
    log = records(tmp_path / "a")
    assert log[-1]["ce"] < log[0]["ce"] and log[-1]["top1"] > 50
    last = common.load_checkpoint(tmp_path / "a" / "last.pth")
    main("dearkd", *words, "--out", tmp_path / "a", "--resume")  # nothing is left to do
    assert all(torch.equal(v, last["model"][k]) for k, v in student(tmp_path / "a").items())
    main("dearkd", *flags("dearkd", teacher, tmp_path / "b", "--data", photos, "--epochs", 1,
                          "--teacher", tmp_path / "a" / "student.pth"))
    assert len(student(tmp_path / "b")["head.bias"]) == 3


@pytest.mark.parametrize("more, message", [
    (["--hints", "1:9"], "there are blocks 0 to 5 and stages 1 to 3"),
    (["--hints", "early"], "or --hints .block:stage,...."),
    (["--stage1-epochs", 3], "--stage1-epochs 3 is not between 0 and 2"),
    (["--synthesize", "x", "--val", "/proc"], "the teacher has 10 classes, --val")])
def test_wrong_input(more, message, teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        main("dearkd", *flags("dearkd", teacher, tmp_path / "run", *more))


# ------------------------------------------------------------------ images from weights alone


def small_cnn(num_classes=4):
    """A teacher whose BatchNorms have statistics that are not those of a new layer."""
    torch.manual_seed(3)
    cnn = dearkd.make_cnn("cifar_resnet20", num_classes)
    for layer in cnn.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    return dearkd.Teacher(cnn)


def brute_force_divergence(features, labels):
    f = np.asarray(features, float)
    f, terms = f / np.sqrt((f**2).sum(1, keepdims=True)), []
    for i in range(len(f)):
        d = [math.dist(f[i], f[j]) for j in range(len(f)) if j != i and labels[i] == labels[j]]
        if len(d) >= 2:
            terms.append(max(d) - min(d))
    return sum(terms) / len(terms) if terms else 0.0


@pytest.mark.parametrize("labels", [[0] * 6 + [1] * 5 + [2] * 2 + [3], [0, 1, 0, 1, 0, 1, 1, 2],
                                    [0, 1, 2], [0, 0, 1, 1]])
def test_intra_divergence_equals_brute_force(labels):
    features = torch.randn(len(labels), 7, dtype=torch.float64) * 5
    loss = dearkd.intra_divergence_loss(features, torch.tensor(labels))
    assert loss.item() == pytest.approx(brute_force_divergence(features, labels), abs=1e-12)


def test_intra_divergence_of_equal_features_has_finite_gradients():
    copies = torch.ones(4, 3, requires_grad=True)  # no direction between them
    dearkd.intra_divergence_loss(copies, torch.zeros(4, dtype=torch.long)).backward()
    assert copies.grad.isfinite().all()


def test_batch_norm_term_in_closed_form_and_near_zero_on_its_own_statistics():
    norm = nn.BatchNorm2d(3).eval()
    norm.running_mean.copy_(torch.tensor([1.0, -2.0, 30.0]))
    norm.running_var.copy_(torch.tensor([4.0, 0.25, 9.0]))
    x = torch.randn(64, 3, 32, 32) * norm.running_var.sqrt()[:, None, None]
    x = x + norm.running_mean[:, None, None]
    for images in (x, x * 0.5 + 1, (x * 0.5).to(memory_format=torch.channels_last)):
        pixels = images.double().transpose(0, 1).flatten(1).numpy()
        expected = (np.linalg.norm(pixels.mean(1) - norm.running_mean.numpy())
                    + np.linalg.norm(pixels.var(1) - norm.running_var.numpy()))
        found = dearkd.batch_norm_loss({norm: images, nn.BatchNorm2d(3): x * 0}, 7.0).item()
        assert found == pytest.approx(7 * expected + math.sqrt(3), rel=1e-3, abs=0.02)
    assert dearkd.batch_norm_loss({norm: x}, 1.0) < 0.2 and expected > 10


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("weights", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 30),
                                     (0.3, 0.2, 0.5, 7)])
def test_first_step_follows_the_gradient_of_the_written_out_objective(half, weights):
    """Adam's first step is the rate times the gradient's sign: compare signs, pixel by pixel."""
    model, labels = small_cnn(), torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    (tv, l2, bn, divergence), seed = weights, 5 if half else 7  # seed 7 flips
    found = dearkd.synthesize(model, labels, 16, half_steps=int(half), steps=int(not half),
                              image_lr=1e-3, tv=tv, l2=l2, bn=bn, divergence=divergence, jitter=4,
                              seed=seed)
    # the same random numbers
    generator = torch.Generator().manual_seed(seed)
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
    for kernel in ([[1, -1]], [[1], [-1]], [[1, 0], [0, -1]], [[0, 1], [-1, 0]]):  # neighbours
        loss = loss + tv * F.conv2d(x.flatten(0, 1)[:, None], x.new_tensor([[kernel]])).norm()
    loss = loss + l2 * x.flatten(1).square().sum(1).sqrt().mean()
    for i, (layer, given) in enumerate(seen):
        mu, var = given.mean((0, 2, 3)), given.var((0, 2, 3), correction=0)
        distance = (mu - layer.running_mean).norm() + (var - layer.running_var).norm()
        loss = loss + bn * (10 if i == 0 else 1) * distance
    features = F.normalize(maps[-1].mean((2, 3)), dim=1)
    for i in range(6):  # labels 0 and 1 have two class-mates
        d = [(features[i] - features[j]).norm() for j in range(6) if i != j and i // 3 == j // 3]
        loss = loss + divergence * (max(d).detach() - min(d)) / 6
    gradient, = torch.autograd.grad(loss, images)
    moved = (found - start).double()
    clear = (gradient.abs() > 1e-3 * gradient.abs().mean()) & (moved != 0)
    assert clear.float().mean() > 0.5  # the others are at the limits of the range
    assert (moved.sign() == -gradient.sign())[clear].float().mean() > 0.995
    assert (found >= low - 1e-6).all() and (found <= high + 1e-6).all()


def test_synthesis_is_seeded_and_leaves_the_teacher_as_it_is():
    model, labels = small_cnn().requires_grad_(True), torch.tensor([0, 1, 2, 3])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    a, b, c = (dearkd.synthesize(model, labels, 16, half_steps=0, steps=2, seed=seed)
               for seed in (1, 1, 2))
    assert torch.equal(a, b) and (a - c).abs().mean() > 0.1
    assert a.shape == (4, 3, 16, 16) and not a.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(layer.training or layer._forward_pre_hooks for layer in model.modules())


@pytest.mark.parametrize("classes, each, size", [(10, 13, 128), (1000, 3, 128), (3, 8, 8)])
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
             "--images-per-batch", 8, "--amp", "off", "--steps", 12]

    def files(folder):
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.png")}

    main("dearkd", *words, "--synthesize", tmp_path / "a")
    process = start("dearkd.py", *words, "--synthesize", tmp_path / "b")
    while not list(tmp_path.glob("b/train/*/*.png")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert files(tmp_path / "b").keys() != files(tmp_path / "a").keys()
    next(tmp_path.glob("b/train/*/*.png")).unlink()  # as if killed within a batch
    again = ["--synthesize", tmp_path / "b", "--resume"]
    main("dearkd", *words, *again)
    assert files(tmp_path / "b") == files(tmp_path / "a") and len(files(tmp_path / "a")) == 25
    with pytest.raises(SystemExit, match="other settings: --steps None, before 12"):
        main("dearkd", *words[:-2], *again)
