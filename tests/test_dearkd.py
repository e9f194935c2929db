"""dearkd.py: convolution by attention, aligner and hints, CNN teachers, the two stages."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision

import common_before as common
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
    # the same as a convolution: kernel[i, j] = sum of the head with offset (i - 1, j - 1)
    W_v, b_v = attention.qkv.weight[2 * D:], attention.qkv.bias[2 * D:]
    c = attention.pos_weight[:, 1:] / 2e3
    assert sorted(map(tuple, c.round().int().tolist())) == [
        (i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    assert c[0].tolist() == [0, 0] and c.square().sum(1).tolist() == [0, 1, 1, 1, 1, 2, 2, 2, 2]
    kernel, bias = torch.zeros(D, D, 3, 3).double(), attention.proj.bias
    for h in range(9):
        rows = slice(3 * h, 3 * h + 3)
        i, j = c[h].round().int() + 1
        kernel[:, :, i, j] += attention.proj.weight[:, rows] @ W_v[rows]
        bias = bias + attention.proj.weight[:, rows] @ b_v[rows]
    expected = F.conv2d(x.transpose(1, 2).view(2, D, g, g), kernel, bias)   # interior: no padding
    found = attention(x).transpose(1, 2).view(2, D, g, g)[:, :, 1:-1, 1:-1]
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_position_term_in_closed_form():
    attention = dearkd.ConvAttention(12, 3, 4, 2).eval()
    torch.nn.init.normal_(attention.pos_weight)
    term = attention.position_term()
    assert term.shape == (3, 18, 18)
    assert (term[:, :2] == 0).all() and (term[:, :, :2] == 0).all()  # class and distillation token
    for h, (v0, v1, v2) in enumerate(attention.pos_weight.tolist()):
        for i in range(16):
            for j in range(16):
                d1, d2 = j // 4 - i // 4, j % 4 - i % 4
                expected = v0 * (d1**2 + d2**2) + v1 * d1 + v2 * d2
                assert term[h, 2 + i, 2 + j].item() == pytest.approx(expected, abs=1e-5)


def test_the_term_is_built_once_a_forward_and_goes_through_sdpa(monkeypatch):
    """On all devices but the CPU; here one without memory."""
    model, calls, masks = dearkd.ViT(16, 4, 24, 3, 3, 5, mhca_blocks=2).to("meta"), [], []
    build, sdpa = dearkd.ConvAttention.position_term, F.scaled_dot_product_attention
    monkeypatch.setattr(dearkd.ConvAttention, "position_term",
                        lambda self: calls.append(1) or build(self))
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda q, k, v, m=None: masks.append(m) or sdpa(q, k, v, m))
    model(torch.randn(7, 3, 16, 16, device="meta"))
    assert len(calls) == 2  # blocks with MHCA, not images
    assert [mask is not None for mask in masks] == [True, True, False]
    assert masks[0].shape == (3, 18, 18)


# ------------------------------------------------------------------ aligner, hints, the ViT


def test_aligner_equals_its_layers_and_keeps_the_grid():
    aligner = dearkd.Aligner(12, 20)
    tokens = torch.zeros(1, 25, 12)
    tokens[0, 7] = torch.randn(12)  # row 1, column 2: only its neighbourhood may change
    change = (aligner(tokens) - aligner(torch.zeros(1, 25, 12))).abs().sum(1)[0] > 1e-6
    assert aligner(tokens).shape == (1, 20, 5, 5)
    assert change.nonzero().tolist() == [[i, j] for i in (0, 1, 2) for j in (1, 2, 3)]


def test_vit_gives_a_pair_in_training_and_the_mean_in_eval():
    model = dearkd.ViT(16, 4, 24, 3, 3, 5, mhca_blocks=2, pos_dropout=0.0)
    images = torch.randn(2, 3, 16, 16)
    pair = model(images)
    assert [p.shape for p in pair] == [(2, 5), (2, 5)] and not torch.equal(*pair)
    assert torch.allclose(model.eval()(images), (pair[0] + pair[1]) / 2, atol=1e-6)
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    hidden, _ = model.features(images, (0, 2))
    assert hidden.keys() == {0, 2}  # patch tokens: without class and distillation token
    assert all(torch.equal(v, seen[k][:, 2:]) for k, v in hidden.items())
    assert dearkd.ViT(16, 4, 24, 2, 3, num_classes=0).eval()(images).shape == (2, 24)
    names = set(model.state_dict())
    assert {"dist_token", "head_dist.weight", "blocks.1.attn.pos_weight"} <= names
    assert "blocks.2.attn.pos_weight" not in names and not any("offset" in n for n in names)
    assert model.pos_embed.shape == (1, 18, 24)
    with pytest.raises(ValueError, match="image_size=16"):
        model(torch.randn(1, 3, 20, 20))


def test_attention_distance_in_closed_form():
    model = dearkd.ViT(20, 4, 18, 2, 9, 5, mhca_blocks=1).eval()
    for block in model.blocks:
        block.attn.qkv.weight.data.zero_()
    model.blocks[0].attn.pos_weight.data *= 1e3  # exact shifts: distance 0, 1 or sqrt 2, inside
    distance = dearkd.attention_distance(model, torch.randn(3, 3, 20, 20))
    assert distance.shape == (2, 9) and distance[0, 0] < 1e-6
    place = np.array([(i, j) for i in range(5) for j in range(5)])
    apart = np.sqrt(((place[:, None] - place[None])**2).sum(-1))
    assert torch.allclose(distance[1], torch.tensor(apart.mean()))  # uniform attention
    # a shift by one row: the last row has no such neighbour and looks at itself, nearest to it
    assert distance[0, 1:5].tolist() == pytest.approx([0.8] * 4)
    assert not model.training


# ------------------------------------------------------------------ the teacher


CNNS = {  # name: (channels, height) of the stages at 224 px
    "resnet18": [(64, 112), (64, 56), (128, 28), (256, 14), (512, 7)],
    "resnet50": [(64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7)],
    "regnet_y_400mf": [(32, 112), (48, 56), (104, 28), (208, 14), (440, 7)],
    "mobilenet_v2": [(96, 112), (144, 56), (192, 28), (576, 14), (1280, 7)],
    "googlenet": [(64, 112), (192, 56), (480, 28), (832, 14), (1024, 7)]}


def smallest(name):
    torch.manual_seed(0)
    return dearkd.make_cnn(name, 10)


def released(tmp_path, name="resnet18", classes=1000):
    cnn = torchvision.models.get_model(name, num_classes=classes)
    torch.save(cnn.state_dict(), tmp_path / f"{name}.pth")
    return cnn.eval(), tmp_path / f"{name}.pth"


def test_wrong_teachers_are_one_line(tmp_path, monkeypatch):
    _, path = released(tmp_path)
    state = torch.load(path)
    torch.save({k: v for k, v in state.items() if "layer4" not in k}, tmp_path / "cut.pth")
    state["bn1.weight"][0] = math.nan
    torch.save(state, tmp_path / "nan.pth")
    torch.save({"model": 1}, tmp_path / "other.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(dearkd, "download", lambda url: (_ for _ in ()).throw(
        common.Abort(f"cannot download {url}")))
    for arguments, message in (
            (("resnet19",), r"no CNN resnet19 in torchvision: did you mean .*resnet1"),
            (("vit_b_16",), "no CNN vit_b_16"),
            (("cifar_resnet20",), "cannot be downloaded.*--train-teacher cifar_resnet20"),
            (("resnet18", path, 10), "has 1000 classes, the data 10"),
            (("resnet34", path), r"does not hold a resnet34: \d+ missing"),
            (("resnet18", tmp_path / "cut.pth"), r"\d+ missing: layer4\.0\.bn1\.bias"),
            (("resnet18", tmp_path / "nan.pth"), r"NaN or infinite: bn1\.weight"),
            (("resnet18", tmp_path / "no.pth"), "no file"),
            ((str(tmp_path / "other.pth"),), "no student.pth of this project"),
            (("regnet_y_16gf",), r"cannot download https://download\.pytorch\.org/.*_16gf")):
        with pytest.raises(common.Abort, match=message) as error:
            dearkd.load_teacher(*arguments)
        assert "\n" not in str(error.value) and error.value.status == 2


def test_hints_are_read_and_checked():
    stages = [("a", 16, 32), ("b", 32, 16), ("c", 64, 8)]
    assert dearkd.parse_hints("1:2,3:-1", 6, stages, 8) == [(1, 2), (3, 3)]
    assert dearkd.parse_hints("none", 6, stages, 8) == []
    assert [dearkd.parse_hints("auto", 6, stages, grid) for grid in (8, 14, 16, 40, 3)] == [
        [(1, 2), (3, 3)], [(1, 2), (3, 3)], [(1, 1), (3, 2)], [(1, 1), (3, 1)], [(1, 2), (3, 3)]]
    for text, message in (("6:1", "blocks 0 to 5"), ("-1:1", "blocks 0 to 5"),
                          ("1:4", r"stages 1 \(16 x 32 x 32\), 2 .*, 3 \(64 x 8 x 8\)"),
                          ("1:0", "stages 1"), ("1:-4", "stages 1"), ("1", "not block:stage"),
                          ("a:b", "a:b is not block:stage"), ("1:2,", "not block:stage")):
        with pytest.raises(common.Abort, match=message):
            dearkd.parse_hints(text, 6, stages, 8)


# ------------------------------------------------------------------ runs

SMALL = ["--student", "micro", "--image-size", "16", "--patch-size", "4", "--workers", "2",
         "--batch-size", "16", "--lr", "1e-3", "--rand-augment", "0", "--random-erasing", "0"]


def test_gradients_of_both_stages():
    args = common.argparse.Namespace(label_smoothing=0.1, alpha=0.3, beta=2.0)
    student = dearkd.ViT(16, 4, 24, 3, 3, 5, mhca_blocks=2)
    aligners = torch.nn.ModuleList([dearkd.Aligner(24, 16), dearkd.Aligner(24, 64)])
    model = dearkd.Objective(student, aligners, [(0, 1), (1, 3)], args)
    cnn = dearkd.Teacher(smallest("cifar_resnet20"), 16)
    images, target = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        maps, logits = cnn.features(images)
    losses = model(images, target, (maps, logits[:, :5]))
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    # the closed forms
    torch.manual_seed(5)
    losses = model(images, target, (maps, logits[:, :5]))
    torch.manual_seed(5)
    hidden, (by_class, by_distillation) = student.features(images, (0, 1))
    expected = {
        "ce": 0.7 * F.cross_entropy(by_class, target, label_smoothing=0.1),
        "logits": 0.3 * F.cross_entropy(by_distillation, logits[:, :5].argmax(1)),
        "hints": 2 * (dearkd.hint_loss(aligners[0](hidden[0]), maps[0])
                      + dearkd.hint_loss(aligners[1](hidden[1]), maps[2]))}
    for name, value in losses.items():
        assert value.item() == pytest.approx(expected[name].item(), rel=1e-5)
    model.zero_grad()
    sum(model(images, target, None).values()).backward()  # stage 2
    assert all(p.grad is None or p.grad.abs().sum() == 0 for p in aligners.parameters())
    assert all(p.grad.abs().sum() > 0 for p in student.parameters())
