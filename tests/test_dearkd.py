"""dearkd.py: convolution by attention, aligner and hints, CNN teachers, the two stages."""

import json
import math
import re
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import (
    DATA,
    ROOT,
    finish,
    in_process,
    make_photos,
    run,
    start,
    wait_for,
)
from PIL import Image

import attndistill
import common
import dearkd
import eval_knn
import vitkd

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


def test_dropout_strikes_whole_offsets_and_rests_in_eval():
    attention = dearkd.ConvAttention(12, 3, 5, 1, pos_dropout=0.5)
    torch.nn.init.constant_(attention.pos_weight, 1.7)
    full = attention.eval().position_term()[:, 1:, 1:]
    assert torch.equal(full, attention.position_term()[:, 1:, 1:])
    term, dropped = attention.train().position_term()[:, 1:, 1:], {}
    for h in range(3):
        for i in range(25):
            for j in range(25):
                if full[h, i, j] == 0:
                    continue
                key = h, j // 5 - i // 5, j % 5 - i % 5
                ratio = round((term[h, i, j] / full[h, i, j]).item(), 4)
                assert ratio in (0, 2) and dropped.setdefault(key, ratio) == ratio
    assert 0.3 < np.mean([ratio == 0 for ratio in dropped.values()]) < 0.7
    gradient, = torch.autograd.grad(attention.position_term().sum(), attention.pos_weight)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


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


@pytest.mark.parametrize("attention", [
    vitkd.Attention(24, 3), attndistill.Attention(24, 3), dearkd.Attention(24, 3),
    dearkd.ConvAttention(24, 3, 4, 2).eval()])
def test_attention_on_a_cpu_is_what_other_devices_take_torchs_kernel_for(attention):
    x = torch.randn(5, 18, 24)
    q, k, v = attention.qkv(x).view(5, 18, 3, 3, 8).permute(2, 0, 3, 1, 4)
    term = attention.position_term() if isinstance(attention, dearkd.ConvAttention) else None
    expected = F.scaled_dot_product_attention(q, k, v, term).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention(x), attention.proj(expected))
    assert attention.to("meta")(x.to("meta")).shape == x.shape


# ------------------------------------------------------------------ aligner, hints, the ViT


def test_aligner_equals_its_layers_and_keeps_the_grid():
    aligner = dearkd.Aligner(12, 20)
    tokens = torch.zeros(1, 25, 12)
    tokens[0, 7] = torch.randn(12)  # row 1, column 2: only its neighbourhood may change
    change = (aligner(tokens) - aligner(torch.zeros(1, 25, 12))).abs().sum(1)[0] > 1e-6
    assert aligner(tokens).shape == (1, 20, 5, 5)
    assert change.nonzero().tolist() == [[i, j] for i in (0, 1, 2) for j in (1, 2, 3)]


@pytest.mark.parametrize("h", [4, 7, 8, 14, 16, 28, 2, 1])
def test_hint_loss_pools_and_enlarges(h):
    student, teacher = torch.randn(3, 5, 7, 7), torch.randn(3, 5, h, h)
    loss = dearkd.hint_loss(student, teacher)
    resized = teacher.double().numpy()
    if h >= 7:  # mean over the pixels that a cell touches
        def cells(i):
            return slice(i * h // 7, -(-(i + 1) * h // 7))
        resized = np.array([[[[plane[cells(i), cells(j)].mean() for j in range(7)]
                              for i in range(7)] for plane in image] for image in resized])
    else:
        def weights(i):
            at = min(max((i + 0.5) * h / 7 - 0.5, 0), h - 1)
            row = np.zeros(h)
            row[int(at)] += 1 - at % 1
            row[min(int(at) + 1, h - 1)] += at % 1
            return row
        M = np.array([weights(i) for i in range(7)])
        resized = np.einsum("ih,bchw,jw->bcij", M, resized, M)
    expected = ((student.double().numpy() - resized)**2).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-5)


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


def test_without_mhca_and_distillation_it_is_the_plain_vit():
    """The class token attends to one token more, the distillation token: mute that one."""
    ours = dearkd.ViT(16, 4, 24, 3, 3, 5).eval()
    theirs = vitkd.ViT(16, 4, 24, 3, 3, 5).eval()
    state = ours.state_dict()
    plain = {k: v for k, v in state.items() if "dist" not in k}
    plain["pos_embed"] = torch.cat([state["pos_embed"][:, :1], state["pos_embed"][:, 2:]], 1)
    theirs.load_state_dict(plain)
    images = torch.randn(2, 3, 16, 16)
    x, y = ours.embed(images), theirs.embed(images)
    assert torch.equal(x[:, 2:], y[:, 1:]) and torch.equal(x[:, :1], y[:, :1])
    for a, b in zip(ours.blocks, theirs.blocks):
        assert torch.allclose(a(y), b(y), atol=1e-6)


def test_what_is_the_same_in_the_methods_is_the_same_text():
    import ast

    def texts(script):
        tree = ast.parse((ROOT / script).read_text())
        return {node.name: ast.unparse(node) for node in tree.body if hasattr(node, "name")}

    ours, theirs = texts("dearkd.py"), texts("vitkd.py")
    for name in ("Attention", "Mlp", "PatchEmbed", "download", "resize_pos_embed"):
        assert ours[name] == theirs[name], name


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


@pytest.mark.parametrize("name", CNNS)
def test_stages_of_torchvisions_cnns(name):
    cnn = smallest(name).eval()
    teacher = dearkd.Teacher(cnn, 224)
    assert [(channels, size) for _, channels, size in teacher.stages] == CNNS[name]
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        maps, logits = teacher.features(images)
        assert [tuple(m.shape[1:3]) for m in maps] == CNNS[name]
        assert torch.allclose(logits, cnn(images), atol=1e-4)
        assert torch.equal(teacher(images), logits)
        for m in maps:  # every stage of every CNN fits a student's grid: 224 px here, 32 px below
            aligned = dearkd.Aligner(12, m.shape[1])(torch.randn(1, 196, 12))
            assert dearkd.hint_loss(aligned, m).isfinite()
    small = dearkd.Teacher(cnn, 32)
    for m in small.features(torch.randn(1, 3, 32, 32))[0]:
        aligned = dearkd.Aligner(12, m.shape[1])(torch.randn(1, 64, 12))
        assert aligned.shape == (1, m.shape[1], 8, 8)
        assert dearkd.hint_loss(aligned, m).isfinite()


def test_stages_of_a_resnet_are_its_layers():
    cnn = torchvision.models.resnet18().eval()
    teacher, seen = dearkd.Teacher(cnn, 64), []
    for layer in (cnn.relu, cnn.layer1, cnn.layer2, cnn.layer3, cnn.layer4):
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        cnn(images)
        maps, _ = teacher.features(images)
    assert len(maps) == 5 and all(torch.allclose(a, b, atol=1e-5) for a, b in zip(maps, seen))


def test_cifar_resnet_equals_its_paper():
    """Section 4.2: 6n+2 layers, 0.27, 0.46, 0.66, 0.85 million parameters; shortcut by padding."""
    for depth, millions in ((20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85)):
        cnn = dearkd.make_cnn(f"cifar_resnet{depth}", 10)
        assert sum(p.numel() for p in cnn.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)
        layers = [m for m in cnn.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
        assert len(layers) == depth
    teacher = dearkd.Teacher(cnn, 32)
    assert [stage[1:] for stage in teacher.stages] == [(16, 32), (32, 16), (64, 8)]
    block = cnn.layer2[0].eval()
    torch.nn.init.zeros_(block.bn2.weight)  # then the shortcut alone is left
    x = torch.rand(1, 16, 8, 8)
    expected = torch.zeros(1, 32, 4, 4)
    expected[:, 8:24] = x[:, :, ::2, ::2]
    assert torch.allclose(block(x), expected, atol=1e-6)


@pytest.mark.skipif(not (DATA / "cifar_resnet56.pth").exists(), reason=f"no weights in {DATA}")
def test_a_real_pretrained_cnn():
    """`cifar_resnet56.pth`, 83 % on CIFAR-10 as JPEG files."""
    teacher = dearkd.load_teacher("cifar_resnet56", DATA / "cifar_resnet56.pth", 10)
    images, labels = [], []
    with zipfile.ZipFile(DATA / "cifar10_val.zip") as archive:
        names = [n for n in sorted(archive.namelist()) if n.endswith(".jpg")]
        classes = sorted({n.split("/")[-2] for n in names})
        for name in names[::40]:
            with archive.open(name) as file:
                images.append(common.v2.functional.pil_to_tensor(Image.open(file).convert("RGB")))
            labels.append(classes.index(name.split("/")[-2]))
    images = common.normalize(torch.stack(images), "cpu")
    hits = (teacher(images).argmax(1) == torch.tensor(labels)).float().mean()
    assert 0.75 < hits < 0.95


def test_images_are_brought_to_the_cnns_normalisation_and_size():
    cnn = smallest("cifar_resnet20").eval()
    teacher = dearkd.Teacher(cnn, 32, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    pixels = torch.rand(2, 3, 32, 32)

    def normalised(mean, std):
        return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]

    ours, theirs = normalised(common.MEAN, common.STD), normalised((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    assert torch.allclose(teacher(ours), cnn(theirs), atol=1e-4)
    maps, _ = teacher.features(F.interpolate(ours, (64, 64)))
    assert [m.shape[-1] for m in maps] == [32, 16, 8]


def released(tmp_path, name="resnet18", classes=1000):
    cnn = torchvision.models.get_model(name, num_classes=classes)
    torch.save(cnn.state_dict(), tmp_path / f"{name}.pth")
    return cnn.eval(), tmp_path / f"{name}.pth"


def test_released_weights_load_frozen_and_stay_in_eval_mode(tmp_path):
    cnn, path = released(tmp_path)
    teacher = dearkd.load_teacher("resnet18", path)
    assert not any(p.requires_grad for p in teacher.parameters())
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    teacher.train()
    images = torch.randn(2, 3, 224, 224)
    logits = teacher(images)
    assert torch.allclose(logits, cnn(images), atol=1e-4)
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert not any(module.training for module in teacher.modules())


def test_googlenets_own_input_transform_and_extra_heads(tmp_path):
    """Its released weights come with three heads, and normalise the images once more."""
    cnn = torchvision.models.googlenet(init_weights=False, transform_input=True).eval()
    torch.save({f"module.{k}": v for k, v in cnn.state_dict().items()}, tmp_path / "g.pth")
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        maps, logits = dearkd.load_teacher("googlenet", tmp_path / "g.pth").features(images)
        assert torch.allclose(logits, cnn(images), atol=1e-4)
        first = cnn.conv1(cnn._transform_input(images))  # random weights: the logits hardly differ
        assert torch.allclose(maps[0], first, atol=1e-4)


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


def lines_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """(data, path): a folder of photos, a CNN trained on it by the ordinary command."""
    folder = tmp_path_factory.mktemp("dearkd")
    data = make_photos(folder / "photos", counts=(("train", 64), ("val", 13)))
    run("dearkd.py", *SMALL, "--data", data, "--train-teacher", "cifar_resnet20", "--epochs", 2,
        "--out", folder / "cnn")
    return data, folder / "cnn" / "student.pth"


def test_the_trained_teacher(teacher, capsys, monkeypatch):
    path = teacher[1]
    checkpoint = common.load_checkpoint(path)
    assert checkpoint["arch"] == {"cnn": "cifar_resnet20", "image_size": 16, "num_classes": 3}
    assert checkpoint["top1"] > 60  # three tints are easy
    log = lines_of(path.parent)
    status, _, err = in_process(eval_knn, capsys, monkeypatch, "--weights", path)
    assert status == 2 and "is a CNN; features are taken from ViTs" in err
    assert "attention_distance" not in log[-1] and log[-1]["ce"] < log[0]["ce"]
    loaded = dearkd.load_teacher(str(path), num_classes=3)
    assert loaded.image_size == 16 and loaded.stages[0][1:] == (16, 16)


def test_help_and_defaults(monkeypatch):
    out, _ = run("dearkd.py", "--help")
    for flag in ("--stage1-epochs", "--mhca-blocks", "--hints", "--alpha", "--beta",
                 "--pos-dropout", "--train-teacher", "--visualize"):
        assert f"\n  {flag}" in out
    assert max(map(len, out.splitlines())) <= 110
    monkeypatch.setattr("sys.argv", ["dearkd.py"])
    args = dearkd.parse_args()
    common.check_flags(args)
    recipe = {"batch_size": 1024, "epochs": 300, "stage1_epochs": 250, "lr": 1e-3, "alpha": 0.5,
              "beta": 10.0, "min_lr": 1e-5, "warmup_epochs": 20, "weight_decay": 0.05,
              "clip_grad": 5.0, "mixup": 0.8, "cutmix": 1.0, "pos_dropout": 0.1,
              "teacher": "regnet_y_16gf", "student": "deit_t",
              "out": "out/dearkd-deit_t-regnet_y_16gf"}
    assert {name: getattr(args, name) for name in recipe} == recipe


def test_files_of_other_torchvision_versions(tmp_path):
    """DenseNet's released names, MNASNet's version number, and no BatchNorm counter."""
    cnn = torchvision.models.densenet121().eval()
    old = {k.replace("norm1", "norm.1").replace("conv1.", "conv.1.").replace("norm2", "norm.2")
           .replace("conv2.", "conv.2.") if "denselayer" in k else k: v
           for k, v in cnn.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save(old, tmp_path / "d.pth")
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.allclose(dearkd.load_teacher("densenet121", tmp_path / "d.pth")(images),
                              cnn(images), atol=1e-4)
    _, path = released(tmp_path, "mnasnet0_5")
    assert len(dearkd.load_teacher("mnasnet0_5", path).stages) == 5


def test_stages_only_shrink():
    """At 32 px VGG's pooling enlarges its last map of one pixel to 7 x 7: that is no stage."""
    stages = dearkd.Teacher(dearkd.make_cnn("vgg11", 10).eval(), 32).stages
    assert [size for _, _, size in stages] == [32, 16, 8, 4, 2]


def test_two_stages(teacher, tmp_path, capsys, monkeypatch):
    """Stage 2 never runs the teacher, and its hint modules stand still."""
    data, weights = teacher
    teachers, calls, load = [], [], dearkd.load_teacher

    def spying(*arguments):
        model = load(*arguments)
        teachers.append((model, {k: v.clone() for k, v in model.state_dict().items()}))
        features = model.features
        model.features = lambda images: calls.append(len(images)) or features(images)
        return model

    monkeypatch.setattr(dearkd, "load_teacher", spying)
    kept, save = {}, common.save_checkpoint

    def keep(path, **state):
        save(path, **state)
        if "aligners" in state:
            kept[state["epoch"]] = common.load_checkpoint(path)

    monkeypatch.setattr(common, "save_checkpoint", keep)
    status, out, err = in_process(
        dearkd, capsys, monkeypatch, *SMALL, "--data", data, "--teacher", weights, "--epochs", 4,
        "--stage1-epochs", 2, "--hints", "0:1,2:-1", "--out", tmp_path)
    assert status == 0, err
    (model, before), = teachers
    assert sum(calls) == 39 + 2 * 192  # the validation images once, and two epochs
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())  # BatchNorm too
    log = lines_of(tmp_path)
    assert [line["stage"] for line in log] == [1, 1, 2, 2]
    assert ["hints" in line and "logits" in line for line in log] == [True, True, False, False]
    assert ["attention_distance" in line for line in log] == [False, True, False, True]
    assert len(log[1]["attention_distance"]) == 6
    assert out.count("ends; attention distance, in patches") == 2
    assert "hint after block 2: stage 3 of 3, 64 x 4 x 4" in out
    assert [kept[epoch]["stage"] for epoch in (1, 2, 3, 4)] == [1, 1, 2, 2]
    for key, value in kept[2]["aligners"].items():
        assert not torch.equal(kept[1]["aligners"][key], value)
        assert torch.equal(kept[4]["aligners"][key], value)
    student = common.load_checkpoint(tmp_path / "student.pth")
    assert student.keys() == {"model", "arch", "script", "top1"}
    rebuilt = dearkd.ViT(**student["arch"])
    rebuilt.load_state_dict(student["model"])


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


def test_resume_across_the_border_equals_the_uninterrupted_run(teacher, tmp_path):
    data, weights = teacher
    command = ["dearkd.py", *SMALL, "--data", data, "--teacher", weights, "--batch-size", 4,
               "--epochs", 4, "--stage1-epochs", 2, "--drop-path", 0.1]
    run(*command, "--out", tmp_path / "whole")
    process = start(*command, "--out", tmp_path / "killed")
    last = tmp_path / "killed" / "last.pth"
    wait_for(lambda: last.exists() and common.load_checkpoint(last)["epoch"] == 2, process)
    process.kill()
    finish(process)
    assert common.load_checkpoint(last)["epoch"] in (2, 3)
    run(*command, "--out", tmp_path / "killed", "--resume")
    for name in ("student.pth", "last.pth"):
        a, b = (common.load_checkpoint(tmp_path / folder / name) for folder in ("whole", "killed"))
        for part in ("model", "aligners") if name == "last.pth" else ("model",):
            assert all(torch.equal(a[part][k], b[part][k]) for k in a[part])
    for a, b in zip(lines_of(tmp_path / "whole"), lines_of(tmp_path / "killed")):
        assert all(a.get(k) == b.get(k) for k in ("ce", "hints", "top1", "attention_distance"))


def test_two_processes_train_like_one(teacher, tmp_path):
    """Also over the border of the stages, where DistributedDataParallel is set up anew."""
    data, weights = teacher
    flags = [*SMALL, "--amp", "off", "--data", data, "--epochs", 2, "--stage1-epochs", 1,
             "--teacher", weights, "--pos-dropout", 0, "--mixup", 0, "--cutmix", 0, "--lr", 1e-4]
    one, _ = run("dearkd.py", *flags, "--out", tmp_path / "one")
    two, _ = run("dearkd.py", *flags, "--micro-batch", 4, "--out", tmp_path / "two", processes=2)
    assert one.splitlines()[0] == two.splitlines()[0]  # the teacher's top-1
    torch.manual_seed(0)
    begin = dearkd.ViT(16, 4, 96, 6, 3, 3, mhca_blocks=4).state_dict()
    a, b = (common.load_checkpoint(tmp_path / name / "student.pth")["model"]
            for name in ("one", "two"))
    for key in a:
        moved = (a[key] - begin[key]).norm()
        assert (a[key] - b[key]).norm() <= 0.03 * moved + 1e-6, key
    for one, two in zip(lines_of(tmp_path / "one"), lines_of(tmp_path / "two")):
        assert one["ce"] == pytest.approx(two["ce"], rel=1e-3)


def test_dry_run_times_both_stages(teacher, tmp_path, capsys, monkeypatch):
    flags = [*SMALL, "--data", teacher[0], "--teacher", teacher[1], "--dry-run", "--epochs", 30,
             "--eval-every", 30, "--out", tmp_path / "run"]
    out, _ = run("dearkd.py", *flags, "--stage1-epochs", 20)
    speeds = dict(re.findall(r"dry run, (\d+) epochs: ([\d.]+) images/s", out))
    assert speeds.keys() == {"20", "10"}
    training = 192 * (20 / float(speeds["20"]) + 10 / float(speeds["10"]))
    projected = 3600 * float(re.search(r"([\d.e-]+) hours", out).group(1))
    assert training < projected < training + 60
    _, out, _ = in_process(dearkd, capsys, monkeypatch, *flags, "--stage1-epochs", 30)
    assert out.count("dry run, 30 epochs:") == 1 and not (tmp_path / "run").exists()


def test_wrong_flags_are_one_line(teacher, tmp_path, capsys, monkeypatch):
    data, weights = teacher
    here = [*SMALL, "--data", data, "--out", tmp_path / "o", "--teacher", weights]
    for arguments, message in (
            ([*here, "--hints", "9:1"], "the student has blocks 0 to 5"),
            ([*here, "--hints", "1:9"], "the teacher has stages 1 (16 x 16 x 16), 2"),
            ([*here, "--epochs", 3, "--stage1-epochs", 4], "4 is longer than --epochs 3"),
            ([*here, "--mhca-blocks", 7], "--mhca-blocks 7: micro has 6 blocks"),
            ([*here, "--image-size", 18], "18 is not a multiple of --patch-size 4: take 16 or 20"),
            ([*here, "--teacher", "resnet19"], "no CNN resnet19 in torchvision: did you mean"),
            ([*here, "--train-teacher", "resnet19"], "no CNN resnet19 in torchvision: did you"),
            ([*here, "--data", "shapes"], "has 3 classes, the data 10"),
            ([*here, "--train-teacher", "alexnet"], "alexnet cannot take 2 images of 16 px at on"),
            ([*here, "--teacher-weights", "x"], "goes with a teacher's name"),
            ([*here, "--train-teacher", "resnet18", "--teacher-weights", "x"], "not with none"),
            ([*here, "--pos-dropout", 1], "--pos-dropout: 1 is not in [0, 1)"),
            ([*here, "--weights", weights], "--weights goes with --visualize"),
            (["--visualize", "x.jpg"], "--visualize needs the student"),
            (["--visualize", "x.jpg", "--weights", weights], "is no student of dearkd.py")):
        status, _, err = in_process(dearkd, capsys, monkeypatch, *arguments)
        assert status == 2 and message in err and len(err.splitlines()) == 1, err


def test_visualize_draws_a_bar_for_each_head(teacher, tmp_path, capsys, monkeypatch):
    data, _ = teacher
    arch = {"image_size": 16, "patch_size": 4, "dim": 24, "depth": 2, "num_heads": 3,
            "num_classes": 3, "mhca_blocks": 1}
    model = dearkd.ViT(**arch)
    model.blocks[0].attn.pos_weight.data *= 100  # head 0 looks at its own patch
    model.blocks[0].attn.qkv.weight.data.zero_()
    common.save_checkpoint(tmp_path / "s.pth", model=model.state_dict(), arch=arch, script="dearkd",
                           top1=None)
    photos = sorted((data / "val" / "ant").iterdir())[:3]
    status, out, err = in_process(dearkd, capsys, monkeypatch, "--visualize", *photos, "--weights",
                                  tmp_path / "s.pth")
    assert status == 0, err
    assert out.splitlines()[0].startswith("block 0: 0.00 ")
    picture = np.asarray(Image.open(tmp_path / "attention_distance.png")).astype(int)
    bars = [(picture[row, :, 0] == 240).sum() for row in (20 + 4, 32 + 4, 44 + 4)]
    assert bars[0] == 1 and bars[1] > 30 and bars[2] > 30


def test_eval_knn_takes_a_student(teacher, tmp_path, capsys, monkeypatch):
    arch = {"image_size": 16, "patch_size": 4, "dim": 24, "depth": 2, "num_heads": 3,
            "num_classes": 3, "mhca_blocks": 1}
    common.save_checkpoint(tmp_path / "s.pth", model=dearkd.ViT(**arch).state_dict(), arch=arch,
                           script="dearkd", top1=None)
    for size in ("16", "32"):
        status, out, err = in_process(
            eval_knn, capsys, monkeypatch, "--weights", tmp_path / "s.pth", "--data", teacher[0],
            "--image-size", size, "--workers", 0)
        assert status == 0, err
        assert "width 24" in out


@pytest.mark.slow
def test_demo_prints_its_table():
    out, _ = run("dearkd.py", "--demo", timeout=900)
    table = out.splitlines()[-4:]
    assert [line.split("top-1")[0].strip() for line in table] == [
        "CNN", "student, alone", "student, logits only", "student, DearKD"]
    top1 = [float(line.split("top-1")[1].split("%")[0]) for line in table]
    assert top1[3] > top1[1] + 5
