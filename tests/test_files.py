"""Other people's files, as they write them: the right value of each, or one line that says why not.

Checkpoints, read by each READER: FORMS (what is saved) and PROBLEMS (what cannot be read). Then
what is special to a reader. Then folders of images: FOLDERS and FOLDER_PROBLEMS.
"""

import argparse
import hashlib
import os
import pickle
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    PLAIN,
    ROOT,
    SMALL,
    TINY,
    error_of,
    float64_vit,
    main,
    plain,
    prefixed,
    records,
    student,
)
from PIL import Image, features

import attndistill
import common
import dearkd
import vitkd

# ------------------------------------------------------------------ readers of checkpoints


class Reader(NamedTuple):
    weights: Callable   # () -> a network's weights as released, {name: tensor}
    expected: Callable  # (weights, images) -> what the network computes, in float64, written anew
    found: Callable     # (path, images) -> what it computes after it was read from a file


def vit_weights():
    """A ViT for 32 px with patches of 4 px, and nine classes."""
    head = {"head.weight": torch.randn(9, SMALL["dim"]), "head.bias": torch.randn(9)}
    return {**plain(patch_size=4, grid=8), **head}


def vit_logits(weights, images):
    cls, _ = float64_vit(weights, images, SMALL["num_heads"])
    return F.linear(cls, weights["head.weight"].double(), weights["head.bias"].double())


def vit_as_teacher(path, images):
    teacher = vitkd.load_teacher("deit_t", path, num_classes=9, image_size=32)
    return teacher.double()(images.double())


def vit_as_init(path, images):
    vit = vitkd.ViT(32, 4, **SMALL, num_classes=9)
    vitkd.load_init(vit, path)
    return vit.double()(images.double())


def class_token(weights, images):
    cls, _ = float64_vit(weights, images, SMALL["num_heads"])
    return cls


def class_token_of_teacher(path, images):
    return attndistill.load_teacher("vit_t", path, image_size=32).double()(images.double())


def class_token_of_init(path, images):
    vit = attndistill.ViT(32, 4, **SMALL, num_classes=0)
    attndistill.load_init(vit, path)
    return vit.double()(images.double())


def cnn_weights():
    cnn = dearkd.make_cnn("cifar_resnet20", 9)
    for name, tensor in cnn.state_dict().items():
        if name.endswith("running_mean"):
            tensor.normal_()
    return cnn.state_dict()


def cnn_logits(weights, images):
    cnn = dearkd.make_cnn("cifar_resnet20", 9)
    cnn.load_state_dict(weights)
    return cnn.double().eval()(images.double())


def cnn_as_teacher(path, images):
    return dearkd.load_teacher("cifar_resnet20", path, num_classes=9).double()(images.double())


READERS = {
    "vitkd.load_teacher": Reader(vit_weights, vit_logits, vit_as_teacher),
    "vitkd --init": Reader(vit_weights, vit_logits, vit_as_init),
    "attndistill.load_teacher": Reader(vit_weights, class_token, class_token_of_teacher),
    "attndistill --init": Reader(vit_weights, class_token, class_token_of_init),
    "dearkd.load_teacher": Reader(cnn_weights, cnn_logits, cnn_as_teacher),
}


@pytest.fixture(params=READERS)
def reader(request):
    return READERS[request.param]


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    monkeypatch.setitem(vitkd.SIZES, "deit_t", SMALL)
    monkeypatch.setitem(vitkd.SIZES, "deit_s", SMALL)
    monkeypatch.setitem(attndistill.SIZES, "vit_t", SMALL)


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32)


def check(reader, path, weights, images):
    """The file gives what the weights give."""
    expected = reader.expected(weights, images)
    assert expected.std() > 0.1
    torch.testing.assert_close(reader.found(path, images), expected, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------ checkpoints that load

X = torch.zeros(3)  # of something else
OPTIMIZER = {"state": {0: {"step": torch.tensor(5.0), "exp_avg": X}},
             "param_groups": [{"lr": 0.1, "params": [0]}]}
ARGS = argparse.Namespace(arch="vit_tiny", lr=0.1, output_dir=Path("out"))

# name: (w: its weights, other: weights that must not be taken) -> what torch.save saved, and below
# which names the weights were, where anything else was left out, which is said in one line.
FORMS = {
    "nothing around": lambda w, other: (w, None),
    "DeiT": lambda w, other: ({"model": w}, None),
    "DeiT's training": lambda w, other: (
        {"model": other, "model_ema": w, "optimizer": OPTIMIZER, "epoch": 3, "args": ARGS},
        "model_ema"),
    "timm's train.py": lambda w, other: (
        {"epoch": 3, "arch": "vit_tiny_patch16_224", "state_dict": w, "optimizer": OPTIMIZER,
         "version": 2, "args": ARGS, "amp_scaler": {"scale": 65536.0}, "metric": 70.1},
        "state_dict"),
    "timm's train.py with --model-ema": lambda w, other: (
        {"epoch": 3, "state_dict": other, "state_dict_ema": w, "args": ARGS}, "state_dict_ema"),
    "DistributedDataParallel": lambda w, other: (prefixed(w, "module."), None),
    "torch.compile": lambda w, other: (prefixed(w, "_orig_mod."), None),
    "DistributedDataParallel of torch.compile": lambda w, other: (
        {"state_dict": prefixed(w, "module._orig_mod.")}, None),
    "torch.compile of DistributedDataParallel": lambda w, other: (
        prefixed(w, "_orig_mod.module."), None),
    "Lightning": lambda w, other: (
        {"state_dict": {**prefixed(w, "model."), "criterion.weight": X, "metric.total": X},
         "pytorch-lightning_version": "2.5.0", "hyper_parameters": {"lr": 0.1}, "loops": {},
         "optimizer_states": [OPTIMIZER], "lr_schedulers": [], "callbacks": {}},
        "state_dict.model"),
    "Lightning with torch.compile": lambda w, other: (
        {"state_dict": prefixed(w, "model._orig_mod."), "epoch": 3}, None),
    "torch.compile of single layers": lambda w, other: (
        {name.replace(".", "._orig_mod.", 1): tensor for name, tensor in w.items()}, None),
    "net": lambda w, other: ({"net": w, "acc": 93.1, "epoch": 3}, None),
    "model_state_dict": lambda w, other: (
        {"epoch": 3, "model_state_dict": w, "optimizer_state_dict": OPTIMIZER,
         "loss": torch.tensor(0.5)}, "model_state_dict"),
    "torch's AveragedModel": lambda w, other: (
        {"n_averaged": torch.tensor(7), **prefixed(w, "module.")}, "module"),
    "torch's AveragedModel beside the model": lambda w, other: (
        {"model": other, "ema": {"n_averaged": torch.tensor(7), **prefixed(w, "module.")}},
        "ema.module"),
    "self-supervised, backbone.": lambda w, other: (
        {"state_dict": {"projector.0.weight": X, **prefixed(w, "backbone."), "classifier.bias": X}},
        "state_dict.backbone"),
    "self-supervised, encoder.": lambda w, other: (
        {**prefixed(w, "encoder."), "projection_head.layers.0.weight": X, "queue": X}, "encoder"),
    "self-supervised, teacher.backbone.": lambda w, other: (
        {"state_dict": {**prefixed(other, "student.backbone."), "student.head.weight": X,
                        **prefixed(w, "teacher.backbone."), "teacher.head.weight": X}},
        "state_dict.teacher.backbone"),
    "DINO's training": lambda w, other: (
        {"student": {**prefixed(other, "module.backbone."), "module.head.mlp.0.weight": X},
         "teacher": {**prefixed(w, "backbone."), "head.mlp.0.weight": X},
         "optimizer": OPTIMIZER, "epoch": 100, "args": ARGS}, "teacher.backbone"),
    "MoCo v3": lambda w, other: (
        {"state_dict": {**prefixed(w, "module.base_encoder."),
                        **prefixed(other, "module.momentum_encoder."),
                        "module.predictor.0.weight": X}}, "state_dict.module.base_encoder"),
    "our own last.pth": lambda w, other: (
        {"model": {**prefixed(other, "student."), "vitkd_loss.mask_token": X},
         "ema": {"n_averaged": torch.tensor(7), **prefixed(w, "module.")}, "optimizer": OPTIMIZER,
         "scaler": {}, "log": [{"epoch": 1}], "args": {"lr": 0.1}}, "ema.module"),
    "a wrapper and a prefix that nobody knows": lambda w, other: (
        {"my_weights": prefixed(w, "the_vit.of_mine."), "classes": ["ant", "bee"]}, None),
    "wrappers in wrappers": lambda w, other: (
        {"checkpoint": {"state": {"state_dict": prefixed(w, "module.model.")}}}, None),
    "parameters that need gradients": lambda w, other: (
        {name: torch.nn.Parameter(x) if x.is_floating_point() else x for name, x in w.items()},
        None),
    "NumPy's numbers and arrays beside": lambda w, other: (
        {"model": w, "epoch": np.int64(3), "best_acc1": np.float32(0.7), "loss": np.float64(0.1),
         "done": np.bool_(True), "history": np.arange(4.0), "rng_state": np.random.get_state(),
         "python_rng_state": random.getstate(), "torch_rng_state": torch.get_rng_state()}, "model"),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_gives_the_outputs_of_its_network(reader, form, images, tmp_path, capsys):
    weights = reader.weights()
    other = {name: tensor + 1 for name, tensor in weights.items()}
    content, below = FORMS[form](weights, other)
    path = tmp_path / "x.pth"
    torch.save(content, path)
    check(reader, path, weights, images)
    said = capsys.readouterr().out
    if below:
        assert said.startswith(f"{path}: the weights are those below {below}; left out: ")
        assert len(said.splitlines()) == 1
    else:
        assert said == ""


def test_what_is_left_out_is_said_exactly(tmp_path, capsys):
    content = {"state_dict": {**prefixed(vit_weights(), "backbone."), "projector.weight": X,
                              "projector.bias": X, "queue": X, "queue_ptr": X}}
    torch.save(content, tmp_path / "x.pth")
    common.read_weights(tmp_path / "x.pth")
    assert capsys.readouterr().out == (
        f"{tmp_path}/x.pth: the weights are those below state_dict.backbone; left out: "
        "state_dict.projector.weight, state_dict.projector.bias, state_dict.queue, ... "
        "(4 in all)\n")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_precision_are_read_as_float32(reader, dtype, images, tmp_path):
    weights = {name: tensor.to(dtype) for name, tensor in reader.weights().items()}
    torch.save({"model": weights}, tmp_path / "x.pth")
    check(reader, tmp_path / "x.pth", weights, images)


def test_what_is_computed_from_half_precision_weights_is_not_rounded(tmp_path):
    """LayerScale is folded, the statistics too, and the position embedding is resized."""
    weights = scaled(patch_size=4, grid=8)
    weights = {name: tensor.half() for name, tensor in weights.items()}
    torch.save(weights, tmp_path / "x.pth")
    teacher = vitkd.load_teacher("augreg_t16", tmp_path / "x.pth", 9, image_size=48)
    pixels = torch.rand(2, 3, 48, 48).double()
    found = teacher.double()(normalised(pixels, common.MEAN, common.STD))
    expected = vit_logits(weights, normalised(pixels, [0.5] * 3, [0.5] * 3))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "last.ckpt", "weights", "best.pth.tar"])
def test_a_file_may_have_any_name(reader, name, images, tmp_path):
    weights = reader.weights()
    torch.save(weights, tmp_path / name)
    check(reader, tmp_path / name, weights, images)


def test_a_file_of_torch_before_1_6(reader, images, tmp_path):
    weights = reader.weights()
    torch.save(weights, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    check(reader, tmp_path / "x.pth", weights, images)


def test_safetensors(reader, images, tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    weights = reader.weights()
    save_file(prefixed(weights, "backbone."), tmp_path / "model.safetensors", {"format": "pt"})
    check(reader, tmp_path / "model.safetensors", weights, images)


def test_a_downloaded_file_is_read_from_torch_hubs_folder(
        reader, images, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = reader.weights()
    folder = tmp_path / "hub" / "checkpoints" / "127.0.0.1"  # a folder for each host
    folder.mkdir(parents=True)
    torch.save(weights, folder / "x-0123abcd.pth")
    check(reader, "https://127.0.0.1:9/x-0123abcd.pth", weights, images)


def test_the_hash_in_the_name_of_a_download_is_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    content = b"some weights"
    sha256 = hashlib.sha256(content).hexdigest()[:8]
    for name in (f"right-{sha256}.pth", "none.pth", "date-20260102.pth"):
        (tmp_path / name).write_bytes(content)
        path = common.download(f"file://localhost{tmp_path}/{name}")
        (tmp_path / name).unlink()
        assert common.download(f"file://localhost{tmp_path}/{name}") == path  # kept
        assert Path(path).read_bytes() == content
    (tmp_path / "wrong-0000000f.pth").write_bytes(content)
    with pytest.raises(common.InputError, match="cannot be downloaded: invalid hash value"):
        common.download(f"file://localhost{tmp_path}/wrong-0000000f.pth")
    folder = tmp_path / "run-0123abcd.d"  # like a hash, but not in the file's name
    folder.mkdir()
    (folder / "x.pth").write_bytes(content)
    common.download(f"file://localhost{folder}/x.pth")


def test_addresses_that_differ_in_their_query_are_different_files(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    paths = {}
    for name in ("x.pth", "x.pth?id=1", "x.pth?id=2"):
        (tmp_path / name).write_text(name)
        paths[name] = common.download(f"file://localhost{tmp_path}/{name}")
    for name, path in paths.items():
        assert Path(path).read_text() == name
        assert path.endswith("/x.pth")  # the ending says how to read the file


# ------------------------------------------------------------------ checkpoints that do not load


class Evil:
    def __reduce__(self):
        return os.mkdir, ("code-ran",)


def saved(content, keep=1.0):
    """Return a function that writes torch.save(content(w)), or the first part of it."""
    def write(path, w):
        torch.save(content(w), path)
        path.write_bytes(path.read_bytes()[:int(keep * path.stat().st_size)])
    return write


def changed(weights, change):
    """Change one of the weights, that by which a network is found."""
    landmark = next(name for name in LANDMARKS if name in weights)
    return {**weights, landmark: change(weights[landmark])}


def written(content):
    content = content if isinstance(content, bytes) else content.encode()
    return lambda path, w: path.write_bytes(content)


LFS = ("version https://git-lfs.github.com/spec/v1\n"
       "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n")
CODE = "which is never run. Save only the tensors: torch.save(model.state_dict(), ...)"
DAMAGED = "is not a file of weights, or damaged, perhaps half a download"
OTHER_NAMES = "holds no network with a {landmark}. Its names are"

# name: (how the file is written, what is said after its path). At "*" follows torch's own reason.
PROBLEMS = {
    "missing": (lambda path, w: None, "cannot be read: No such file or directory"),
    "a folder": (lambda path, w: path.mkdir(), "is a folder: give the file in it"),
    "empty": (written(""), "is empty"),
    "white space": (written("\n\n"), "is empty"),
    "half a download": (saved(lambda w: w, keep=0.5), f"{DAMAGED} (RuntimeError: *"),
    "the first bytes": (saved(lambda w: w, keep=0.01), f"{DAMAGED} (*"),
    "git-lfs pointer": (
        written(LFS), "is a pointer of git-lfs, not the file itself: run git lfs pull"),
    "HTML": (written("<!DOCTYPE html>\n<html><body>Sign in</body></html>"),
             "is a web page: the download went wrong"),
    "HTML in small letters": (written("\n  <html lang=en><body>404</body></html>"),
                              "is a web page: the download went wrong"),
    "XML": (written('<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code></Error>'),
            "is a web page: the download went wrong"),
    "JSON": (written('{"error": "not found"}'), f"{DAMAGED} (*"),
    "a picture": (lambda path, w: Image.new("RGB", (9, 9)).save(path, "png"), f"{DAMAGED} (*"),
    "random bytes": (written(random.Random(0).randbytes(5000)), f"{DAMAGED} (*"),
    "random bytes after a zip's first": (
        written(b"PK\x03\x04" + random.Random(0).randbytes(5000)), f"{DAMAGED} (*"),
    "NumPy's weights": (
        lambda path, w: np.savez(open(path, "wb"), a=np.zeros(3)),
        "is an .npz of NumPy: load it into a model, with timm for example, and save that: "
        "torch.save(model.state_dict(), ...)"),
    "a whole module": (
        saved(lambda w: vitkd.ViT(32, 4, **SMALL)), f"holds code (vitkd.ViT), {CODE}"),
    "a pickle that makes a folder": (saved(lambda w: Evil()), f"holds code (posix.mkdir), {CODE}"),
    "a pickle that makes a folder, among weights": (
        saved(lambda w: {**w, "x": Evil()}), f"holds code (posix.mkdir), {CODE}"),
    "a bare pickle": (written(pickle.dumps(Evil(), protocol=2)),
                      f"holds code (posix.mkdir), {CODE}"),
    "a tensor": (saved(lambda w: X), f"{OTHER_NAMES} none"),
    "a list": (saved(lambda w: list(w.values())), f"{OTHER_NAMES} none"),
    "nothing": (saved(lambda w: {}), f"{OTHER_NAMES} none"),
    "a linear layer": (saved(lambda w: {"fc.weight": X, "fc.bias": X}),
                       f"{OTHER_NAMES} fc.weight, fc.bias"),
    "Hugging Face": (
        saved(lambda w: dict.fromkeys([
            "vit.embeddings.cls_token", "vit.embeddings.position_embeddings",
            "vit.embeddings.patch_embeddings.projection.weight",
            "vit.encoder.layer.0.attention.attention.query.weight"], X)),
        f"{OTHER_NAMES} vit.embeddings.cls_token, vit.embeddings.position_embeddings, "
        "vit.embeddings.patch_embeddings.projection.weight, ... (4 in all)"),
    "NaN": (saved(lambda w: changed(w, lambda x: x * float("nan"))),
            "holds NaN or infinite numbers in {landmark}"),
    "quantised by hand": (saved(lambda w: changed(w, lambda x: (100 * x).to(torch.int8))),
                          "holds torch.int8 in {landmark}, not floating-point numbers"),
    "complex": (saved(lambda w: changed(w, lambda x: x.to(torch.complex64))),
                "holds torch.complex64 in {landmark}, not floating-point numbers"),
    "sparse": (saved(lambda w: changed(w, lambda x: x.to_sparse())),
               "holds a sparse or meta tensor, {landmark}"),
    "several networks": (
        saved(lambda w: {"generator": w, "discriminator": {"net": w}}),
        "holds several networks, below generator, discriminator.net. Save only the one that you "
        "want"),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_file_that_cannot_be_read_says_why(reader, problem, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write, message = PROBLEMS[problem]
    weights = reader.weights()
    landmark = next(name for name in LANDMARKS if name in weights)
    write(tmp_path / "x.pth", weights)
    with pytest.raises(common.InputError) as error:
        reader.found(tmp_path / "x.pth", images)
    expected = f"{tmp_path}/x.pth {message.format(landmark=landmark)}"
    if expected.endswith("*"):
        assert str(error.value).startswith(expected[:-1])
        assert str(error.value).endswith(")")
    else:
        assert str(error.value) == expected
    assert not (tmp_path / "code-ran").exists()


# A name that each network of a kind has
LANDMARKS = ("patch_embed.proj.weight", "layer1.0.conv1.weight")


@pytest.mark.parametrize("content, message", [
    ("cut", f"{DAMAGED} (SafetensorError: *"),
    ("whole", None),
    (LFS, "is a pointer of git-lfs, not the file itself: run git lfs pull"),
])
@pytest.mark.parametrize("installed", [True, False])
def test_safetensors_with_and_without_its_package(
        content, message, installed, tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    if content == LFS:
        path.write_text(LFS)
    else:
        pytest.importorskip("safetensors.torch").save_file(vit_weights(), path)
    if content == "cut":
        path.write_bytes(path.read_bytes()[:50_000])
    if not installed:
        monkeypatch.setitem(sys.modules, "safetensors", None)
        monkeypatch.setitem(sys.modules, "safetensors.torch", None)
        if content != LFS:
            message = "pip install safetensors"
    if not message:
        assert common.load_checkpoint(path).keys() == vit_weights().keys()
        return
    with pytest.raises(common.InputError) as error:
        common.load_checkpoint(path)
    if message == "pip install safetensors":
        assert str(error.value) == f"to read {path}: pip install safetensors"
    else:
        assert str(error.value).startswith(f"{path} {message.rstrip('*')}")


def test_a_download_that_fails_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(common.InputError) as error:
        common.load_checkpoint("https://127.0.0.1:9/x.pth")
    message = str(error.value)
    assert message.startswith("https://127.0.0.1:9/x.pth cannot be downloaded: ")
    assert message.endswith(". If you have the file, give its path in place of the address, or that "
                            "of a teacher as --teacher-weights (eval_knn.py: --weights)")
    # A web page that was kept in its place
    page = tmp_path / "hub" / "checkpoints" / "127.0.0.1" / "x.pth"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("<!doctype html>")
    with pytest.raises(common.InputError) as error:
        common.load_checkpoint("https://127.0.0.1:9/x.pth")
    assert str(error.value) == f"{page} is a web page: the download went wrong"
    page.write_bytes(b"a part of the file")
    with pytest.raises(common.InputError) as error:
        common.load_checkpoint("https://127.0.0.1:9/x.pth")
    assert str(error.value).startswith(f"{page} {DAMAGED}")
    assert str(error.value).endswith("). Delete it, and it will be downloaded again")


def renamed(weights, old, new):
    return {name.replace(old, new): tensor for name, tensor in weights.items()}


def cut(weights, *names):
    return {name: tensor for name, tensor in weights.items() if name not in names}


# name: (weights -> what is saved, what is said after "x.pth belongs to another model: it ")
OTHER_VITS = {
    "one name is missing": (
        lambda w: cut(w, "norm.bias"), "lacks norm.bias"),
    "one name too many": (
        lambda w: {**w, "dist_token": X}, "has unexpected dist_token"),
    "other names": (
        lambda w: renamed(w, "mlp.fc1", "mlp.w1"),
        "lacks blocks.0.mlp.fc1.weight, blocks.0.mlp.fc1.bias, blocks.1.mlp.fc1.weight, ... "
        "(6 in all); it has unexpected blocks.0.mlp.w1.weight, blocks.0.mlp.w1.bias, "
        "blocks.1.mlp.w1.weight, ... (6 in all)"),
    "deeper": (
        lambda w: {**w, "blocks.3.norm1.weight": X}, "has unexpected blocks.3.norm1.weight"),
    "LayerScale of another MLP": (
        lambda w: {**renamed(w, "blocks.0.mlp.fc2", "blocks.0.mlp.w3"),
                   "blocks.0.ls2.gamma": torch.ones(48)},
        "lacks blocks.0.mlp.fc2.weight, blocks.0.mlp.fc2.bias; it has unexpected "
        "blocks.0.mlp.w3.weight, blocks.0.mlp.w3.bias, blocks.0.ls2.gamma"),
    "another size": (
        lambda w: {**w, "norm.weight": torch.zeros(96), "norm.bias": torch.zeros(96)},
        "has other sizes: norm.weight (96,) instead of (48,), norm.bias (96,) instead of (48,)"),
    "twice as wide": (
        lambda w: {name: torch.cat([x, x], 0) if "mlp" in name else x for name, x in w.items()},
        "has other sizes: blocks.0.mlp.fc1.weight (384, 48) instead of (192, 48), "
        "blocks.0.mlp.fc1.bias (384,) instead of (192,), "
        "blocks.0.mlp.fc2.weight (96, 192) instead of (48, 192), ... (12 in all)"),
    "a position embedding of one row": (
        lambda w: {**w, "pos_embed": w["pos_embed"][:, :1]},
        "has other sizes: pos_embed (1, 1, 48) instead of (1, 65, 48)"),
    "LayerScale of another width": (
        lambda w: {**w, "blocks.0.ls1.gamma": torch.ones(1)}, "has unexpected blocks.0.ls1.gamma"),
    "a position embedding without a batch": (
        lambda w: {**w, "pos_embed": w["pos_embed"][0]},
        "has other sizes: pos_embed (65, 48) instead of (1, 65, 48)"),
}


@pytest.mark.parametrize("problem", OTHER_VITS)
@pytest.mark.parametrize("name", [
    "vitkd.load_teacher", "vitkd --init", "attndistill.load_teacher", "attndistill --init"])
def test_another_network_is_refused_with_the_names_of_both_sides(name, problem, images, tmp_path):
    change, message = OTHER_VITS[problem]
    torch.save({"model": change(vit_weights())}, tmp_path / "x.pth")
    with pytest.raises(common.InputError) as error:
        READERS[name].found(tmp_path / "x.pth", images)
    assert str(error.value) == f"{tmp_path}/x.pth belongs to another model: it {message}"


# ------------------------------------------------------------------ vitkd's teachers


def test_the_patch_size_of_a_teacher_is_that_of_its_file(tmp_path):
    for patch_size, image_size in ((4, 32), (8, 64), (16, 32)):
        grid = image_size // patch_size
        weights = {**vit_weights(), **plain(patch_size, grid)}
        torch.save({"model": weights}, tmp_path / "x.pth")
        teacher = vitkd.load_teacher("deit_t", tmp_path / "x.pth", 9, image_size)
        images = torch.randn(2, 3, image_size, image_size)
        torch.testing.assert_close(teacher.double()(images.double()), vit_logits(weights, images),
                                   rtol=1e-5, atol=1e-5)
        with pytest.raises(common.InputError) as error:
            vitkd.load_teacher("deit_t", tmp_path / "x.pth", 9, image_size + 2)
        assert str(error.value) == (f"image size {image_size + 2} is not a multiple of the patch size "
                                    f"{patch_size} of {tmp_path}/x.pth")


def normalised(pixels, mean, std):
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


@pytest.mark.parametrize("name, size", [
    ("augreg_t16", "deit_t"), ("augreg_s16", "deit_s"), ("augreg_b16", "deit_b"),
    ("augreg_l16", "deit_l")])
def test_timms_own_vits_get_images_around_one_half(name, size, tmp_path, monkeypatch):
    monkeypatch.setitem(vitkd.SIZES, size, SMALL)
    weights = vit_weights()
    torch.save(weights, tmp_path / "x.pth")
    teacher = vitkd.load_teacher(name, tmp_path / "x.pth", 9, 32)
    pixels = torch.rand(2, 3, 32, 32)
    found = teacher.double()(normalised(pixels.double(), common.MEAN, common.STD))
    expected = vit_logits(weights, normalised(pixels, [0.5] * 3, [0.5] * 3))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    # It matters
    same_for_all = vitkd.load_teacher("deit_t", tmp_path / "x.pth", 9, 32)
    wrong = same_for_all.double()(normalised(pixels.double(), common.MEAN, common.STD))
    assert (wrong - expected).abs().max() > 0.1


@pytest.fixture
def timm():
    return pytest.importorskip("timm")


def random_like(module):
    """Give a timm model weights with which every part of it counts."""
    for name, parameter in module.named_parameters():
        parameter.data.normal_(std=0.1)
        if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "gamma")):
            parameter.data += 1
    return module.eval()


@torch.no_grad()
def test_timms_vit_tiny_gives_timms_logits(timm, tmp_path, monkeypatch):
    monkeypatch.undo()  # the real sizes
    theirs = random_like(timm.create_model("vit_tiny_patch16_224"))
    torch.save(theirs.state_dict(), tmp_path / "vit_tiny_patch16_224.bin")
    ours = vitkd.load_teacher("augreg_t16", tmp_path / "vit_tiny_patch16_224.bin")
    pixels = torch.rand(1, 3, 224, 224)
    cfg = theirs.pretrained_cfg
    expected = theirs(normalised(pixels, cfg["mean"], cfg["std"]))
    found = ours(normalised(pixels, common.MEAN, common.STD))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.std().item())


@torch.no_grad()
@pytest.mark.parametrize("architecture, name", [
    ("deit_tiny_patch16_224", "deit_t"), ("deit3_small_patch16_224", "deit3_s"),
    ("vit_small_patch16_224", "augreg_s16")])
def test_timms_copies_give_timms_logits(architecture, name, timm, tmp_path):
    small = {"embed_dim": 48, "depth": 3, "num_heads": 3}
    theirs = random_like(timm.create_model(architecture, num_classes=9, img_size=64, **small))
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "x.pth")
    ours = vitkd.load_teacher(name, tmp_path / "x.pth", 9, image_size=64)
    pixels = torch.rand(2, 3, 64, 64).double()
    cfg = theirs.pretrained_cfg
    expected = theirs.double()(normalised(pixels, cfg["mean"], cfg["std"]))
    found = ours.double()(normalised(pixels, common.MEAN, common.STD))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_timm_reads_a_student_strictly(timm, images):
    ours = vitkd.ViT(32, 4, **SMALL, num_classes=9).eval()
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=9, img_size=32, patch_size=4,
                               embed_dim=48, depth=3, num_heads=3).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    torch.testing.assert_close(theirs(images), ours(images), rtol=1e-4, atol=1e-5)


def test_a_teacher_must_have_the_classes_of_the_data(tmp_path):
    weights = vit_weights()
    torch.save(weights, tmp_path / "x.pth")
    with pytest.raises(common.InputError) as error:
        vitkd.load_teacher("deit_t", tmp_path / "x.pth", num_classes=2, image_size=32)
    assert str(error.value) == (
        "the teacher has 9 classes, the data 2: see 'An ImageNet teacher for some of its classes' "
        "in README.md")
    assert "An ImageNet teacher for some of its classes" in (ROOT / "README.md").read_text()
    torch.save(cut(weights, "head.weight", "head.bias"), tmp_path / "x.pth")
    with pytest.raises(common.InputError) as error:
        vitkd.load_teacher("deit_t", tmp_path / "x.pth", num_classes=2, image_size=32)
    assert str(error.value) == f"{tmp_path}/x.pth has no head: the teacher must be a classifier"


NAMES = ("deit_t, deit_s, deit_b, deit3_s, deit3_b, deit3_l, augreg_t16, augreg_s16, augreg_b16, "
         "augreg_l16")


@pytest.mark.parametrize("name, weights, parts", [
    ("vgg16", None, ["unknown teacher vgg16", NAMES, "none", "the path of a student.pth"]),
    ("augreg_b16", None, ["augreg_b16 has no download", "--teacher-weights"]),
    ("released.pth", None, ["released.pth is", "not a student.pth of vitkd.py", NAMES,
                            "--teacher-weights"]),
    ("attndistill.pth", None, ["attndistill.pth is", "not a student.pth of vitkd.py"]),
    ("list.pth", None, ["list.pth is", "not a student.pth of vitkd.py"]),
    ("released.pth", "released.pth", ["released.pth", "--teacher-weights"]),
    (".", None, ["unknown teacher ."]),
])
def test_a_teacher_that_is_none_says_what_to_write(name, weights, parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": vit_weights()}, "released.pth")
    torch.save({"model": vit_weights(), "script": "attndistill", "arch": {}}, "attndistill.pth")
    torch.save([X], "list.pth")
    with pytest.raises(common.InputError) as error:
        vitkd.load_teacher(name, weights, 9, 32)
    message = str(error.value)
    assert [part for part in parts if part not in message] == []


# ------------------------------------------------------------------ vitkd --init


def without_head(weights):
    return cut(weights, "head.weight", "head.bias")


def deit3(weights):
    """LayerScale under DeiT III's names, and no position of the class token."""
    released = {}
    for name, tensor in weights.items():
        released[name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2")] = tensor
    return {**released, "pos_embed": weights["pos_embed"][:, 1:]}


def scaled(patch_size, grid):
    weights = {**vit_weights(), **plain(patch_size, grid, layer_scale=True)}
    for name in weights:
        if name.endswith("gamma"):
            weights[name] += 0.3 * torch.randn(48)
    return weights


def no_class_position(weights):
    position = weights["pos_embed"].clone()
    position[:, 0] = 0
    return {**weights, "pos_embed": position}


MAE_DECODER = {"mask_token": X, "decoder_pos_embed": X, "decoder_embed.weight": X,
               "decoder_blocks.0.norm1.weight": X, "decoder_norm.bias": X, "decoder_pred.bias": X}

# name: (patch size, grid of the file, with LayerScale, weights -> the file, is its head kept)
INITS = {
    "DeiT": (16, 14, False, lambda w: {"model": w}, True),
    "DeiT III": (16, 14, True, lambda w: {"model": deit3(w)}, True),
    "MAE": (16, 14, False, lambda w: {"model": {**without_head(w), **MAE_DECODER}}, False),
    "DINO": (16, 14, False, without_head, False),
    "iBOT's training": (16, 14, False, lambda w: {"teacher": {
        **prefixed({**without_head(w), "masked_embed": X}, "backbone."), "head.mlp.0.bias": X}},
        False),
    "MoCo v3": (16, 14, False, lambda w: {"state_dict": prefixed(
        {**without_head(w), "head.0.weight": X, "head.1.bias": X}, "module.base_encoder.")}, False),
    "DINOv2": (14, 37, True, lambda w: {**without_head(w), "mask_token": torch.zeros(1, 48)},
               False),
    "DINOv2, trained at 224 px": (14, 16, True, lambda w: {"teacher": prefixed(
        {**without_head(w), "mask_token": X}, "backbone.")}, False),
    "another number of classes": (16, 14, False, lambda w: {
        **w, "head.weight": torch.zeros(7, 48), "head.bias": torch.zeros(7)}, False),
    "student.pth of attndistill.py": (16, 14, False, lambda w: {
        "model": without_head(w), "arch": {}, "script": "attndistill"}, False),
}


@torch.no_grad()
@pytest.mark.parametrize("form", INITS)
def test_init_starts_from_the_weights_of_any_plain_vit(form, tmp_path, capsys):
    patch_size, grid, layer_scale, write, keeps_head = INITS[form]
    weights = scaled(patch_size, grid) if layer_scale else {**vit_weights(),
                                                           **plain(patch_size, grid)}
    if form == "DeiT III":
        weights = no_class_position(weights)
    path = tmp_path / "x.pth"
    torch.save(write(weights), path)
    student = vitkd.ViT(224, patch_size, **SMALL, num_classes=9)
    new_head = student.head.weight.clone()
    vitkd.load_init(student, path)
    images = torch.randn(1, 3, 224, 224)
    if keeps_head:
        expected = vit_logits(weights, images)
    else:
        assert torch.equal(student.head.weight, new_head)
        student.head = torch.nn.Identity()
        expected, _ = float64_vit(weights, images, SMALL["num_heads"])
    found = student.double()(images.double())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (f"{path}: the head is new\n" in capsys.readouterr().out) != keeps_head


def test_init_refuses_deits_distilled_student_by_name(tmp_path):
    weights = {**vit_weights(), "dist_token": X, "head_dist.weight": X, "head_dist.bias": X}
    torch.save({"model": weights}, tmp_path / "x.pth")
    with pytest.raises(common.InputError) as error:
        vitkd.load_init(vitkd.ViT(32, 4, **SMALL, num_classes=9), tmp_path / "x.pth")
    assert str(error.value) == (f"{tmp_path}/x.pth belongs to another model: it has unexpected "
                                "dist_token, head_dist.weight, head_dist.bias")


# ------------------------------------------------------------------ folders of images


def put(folder, *names, colour=(200, 100, 50), content=None):
    """Write images, or files with another content."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            Image.new("RGB", (8, 8), colour).save(path)
        else:
            path.write_bytes(content)


@pytest.fixture
def folder(tmp_path):
    """ant and bee, two images each for training, one for validation."""
    put(tmp_path / "data", "train/ant/1.png", "train/ant/2.png", "train/bee/1.png",
        "train/bee/2.png", "val/ant/1.png", "val/bee/1.png")
    return tmp_path / "data"


def load(data, val=None):
    """Return what --data finds: a training and a validation set, and the line of counts."""
    train, validation = common.load_data(str(data), val, 8)
    everything = [common.Images(part, range(len(part)), np.asarray) for part in (train, validation)]
    common.print_counts(*everything)
    return train, validation


LEFT_OUT = "are left out, because Pillow opens no files with these endings:"


def finder(folder):
    """macOS writes ._NAME beside each file on a foreign disk, and they sort first."""
    for path in list(folder.rglob("*.png")):
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\26\7\0\2\0\0Mac OS X")
    put(folder, ".DS_Store", "train/.DS_Store", "train/ant/.DS_Store", content=b"x")


# name: (what is done to the folder, training and validation images then, what is printed before)
FOLDERS = {
    "as it is": (lambda folder: None, 4, 2, ""),
    "macOS": (finder, 4, 2, ""),
    "a notebook": (lambda folder: put(
        folder, "train/.ipynb_checkpoints/1-checkpoint.png", "val/.ipynb_checkpoints/1.png",
        "train/ant/.ipynb_checkpoints/2-checkpoint.png"), 4, 2, ""),
    "a file server": (lambda folder: put(
        folder, "train/@eaDir/1.png", "train/ant/@eaDir/1.png/SYNOPHOTO_THUMB_M.jpg",
        "val/@eaDir/x.png", "val/bee/@tmp.png"), 4, 2, ""),
    "other endings": (lambda folder: put(
        folder, *[f"train/ant/3.{ending}" for ending in (
            "jpg", "JPG", "jpeg", "jpe", "jfif", "gif", "webp", "bmp", "tif", "TIFF", "ppm")]),
        15, 2, ""),
    "folders in folders": (lambda folder: put(
        folder, "train/ant/deep/down/3.png", "val/ant/deep/2.png"), 5, 3, ""),
    "files of other kinds": (lambda folder: put(
        folder, "train/ant/Thumbs.db", "train/bee/1.HEIC", "train/bee/2.heic", "train/bee/README",
        content=b"x"), 4, 2, f"WARNING: 4 files below {{folder}}/train {LEFT_OUT} .db, .heic, "
        "(none)"),
    "a list": (lambda folder: put(folder, "val/ant/list.csv", content=b"x"), 4, 2,
               f"WARNING: 1 files below {{folder}}/val {LEFT_OUT} .csv"),
    "beside the classes": (lambda folder: put(folder, "train/1.png", "val/1.png"), 4, 2, ""),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_what_a_folder_holds(name, folder, capsys):
    change, in_train, in_val, warning = FOLDERS[name]
    change(folder)
    train, val = load(folder)
    *before, counts = capsys.readouterr().out.splitlines()
    assert counts == f"{in_train} training and {in_val} validation images of 2 classes"
    assert before == ([warning.format(folder=folder)] if warning else [])
    assert (len(train), len(val)) == (in_train, in_val)
    for images in (train, val):
        assert images.classes == ["ant", "bee"]
        for i in range(len(images)):
            image, label = images[i]
            assert abs(np.asarray(image).astype(int) - (200, 100, 50)).max() < 8
            in_folder = Path(images.samples[i][0]).relative_to(images.root).parts[0]
            assert in_folder == images.classes[label]


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no .avif")
def test_avif(folder):
    put(folder, "train/ant/3.avif")
    train, _ = load(folder)
    assert len(train) == 5
    assert abs(np.asarray(train[2][0]).astype(int) - (200, 100, 50)).max() < 8


def test_a_folder_may_lie_anywhere_and_be_written_in_any_way(folder, tmp_path, monkeypatch):
    hidden = tmp_path / ".cache" / "@me"
    hidden.mkdir(parents=True)
    folder.rename(hidden / "data")
    monkeypatch.chdir(hidden)
    for data in (hidden / "data", f"{hidden}/data/", "data", "./data", "data/", "data/../data"):
        train, val = load(data)
        assert (len(train), len(val)) == (4, 2)
    monkeypatch.chdir(hidden / "data")
    assert len(load(".")[0]) == 4
    (hidden / "data" / "val").rename(hidden / "elsewhere")
    train, val = load(".", val="../elsewhere")
    assert (len(train), len(val)) == (4, 2)


@pytest.mark.parametrize("missing", ["folder", "images"])
def test_a_class_may_lack_validation_images(missing, folder, capsys):
    put(folder, "train/cat/1.png")
    if missing == "images":
        (folder / "val" / "cat").mkdir()
    train, val = load(folder)
    assert train.classes == val.classes == ["ant", "bee", "cat"]
    assert train.targets == [0, 0, 1, 1, 2]
    assert val.targets == [0, 1]
    assert capsys.readouterr().out == ("5 training and 2 validation images of 3 classes, 1 of them "
                                       "without validation images\n")


def test_validation_labels_are_those_of_training(folder):
    """A class that sorts first and has no validation images does not shift the others."""
    put(folder, "train/aardvark/1.png")
    train, val = load(folder)
    assert train.targets == [0, 1, 1, 2, 2]
    assert val.targets == [1, 2]


EXPECTED = ("It must be a folder that holds train/CLASS/* and val/CLASS/* (or --val another folder "
            "of CLASS/*), or cifar10, cifar100, shapes")

# name: (what is done to the folder, the message)
FOLDER_PROBLEMS = {
    "nothing there": (shutil.rmtree, "--data {folder}: [Errno 2] No such file or directory: "
                      f"'{{folder}}/train'. {EXPECTED}"),
    "a file": (lambda folder: (shutil.rmtree(folder), folder.write_text("x")),
               f"--data {{folder}}: [Errno 20] Not a directory: '{{folder}}/train'. {EXPECTED}"),
    "no val": (lambda folder: shutil.rmtree(folder / "val"),
               "--data {folder}: [Errno 2] No such file or directory: '{folder}/val'. "
               f"{EXPECTED}"),
    "a class in val alone": (lambda folder: put(folder, "val/wasp/1.png"),
                             "{folder}/val has classes that {folder}/train lacks: wasp"),
    "a class with another name": (
        lambda folder: (folder / "val" / "bee").rename(folder / "val" / "Bee"),
        "{folder}/val has classes that {folder}/train lacks: Bee"),
    "five classes in val alone": (
        lambda folder: put(folder, *[f"val/{name}/1.png" for name in "vwxyz"]),
        "{folder}/val has classes that {folder}/train lacks: v, w, x, ... (5 in all)"),
    "an empty class": (lambda folder: (folder / "train" / "cat").mkdir(),
                       "{folder}/train has no images of the classes cat: remove their "
                               "folders, or add images"),
    "a class of other files": (lambda folder: put(folder, "train/cat/1.txt", content=b"x"),
                               "{folder}/train has no images of the classes cat: remove their "
                               "folders, or add images"),
    "no classes": (lambda folder: (shutil.rmtree(folder), put(folder, "train/1.png", "val/1.png")),
                   "{folder}/train holds no folders: the images of each class need one"),
    "an empty val": (lambda folder: (shutil.rmtree(folder / "val"), (folder / "val").mkdir()),
                     "{folder}/val has no images of the classes ant, bee"),
}


@pytest.mark.parametrize("name", FOLDER_PROBLEMS)
def test_a_folder_that_cannot_be_used_says_why(name, folder):
    change, message = FOLDER_PROBLEMS[name]
    change(folder)
    with pytest.raises(common.InputError) as error:
        load(folder)
    assert str(error.value) == message.format(folder=folder)


# ------------------------------------------------------------------ images in folders, in real runs


def picture(seed):
    """Return pixels (20, 24, 3) that differ in every corner."""
    return np.random.default_rng(seed).integers(0, 255, (20, 24, 3), np.uint8)


def test_phone_photos_are_trained_upright(folder):
    """The same network sees the same pixels, whatever the phone's orientation was."""
    upright = picture(0)
    turns = {1: upright, 3: np.rot90(upright, 2), 6: np.rot90(upright, 1), 8: np.rot90(upright, -1)}
    for orientation, stored in turns.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = folder / "train" / "ant" / f"turned{orientation}.png"
        Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif)
    train, _ = load(folder)
    seen = common.Images(train, range(2, 6), common.val_transform(16))
    for i in range(4):
        assert torch.equal(seen[i][0], common.val_transform(16)(Image.fromarray(upright)))


def test_medical_images_keep_their_brightness_and_floats_are_named(folder, capfd):
    grey = np.linspace(0, 65535, 480).round().astype(np.uint16).reshape(20, 24)
    for name, scale in (("bright", 1), ("dark", 8)):
        Image.fromarray(grey // scale).save(folder / "train" / "ant" / f"{name}.png")
    path = folder / "train" / "ant" / "float.tif"
    Image.fromarray(grey.astype(np.float32)).save(path)
    train, _ = load(folder)
    names = [Path(sample[0]).stem for sample in train.samples]
    images = common.Images(train, range(len(train)), lambda image: np.asarray(image).mean())
    bright, dark = (images[names.index(name)][0] for name in ("bright", "dark"))
    assert bright == pytest.approx(127.5, abs=0.5)
    assert dark == pytest.approx(127.5 / 8, abs=0.5)
    assert capfd.readouterr().err == ""
    assert images[names.index("float")][1] in (0, 1)  # another image takes its place
    assert capfd.readouterr().err == (f"WARNING: unreadable image {path}: floats have no range "
                                      "that maps to 8 bits: convert it first\n")


@pytest.fixture(scope="module")
def messy(photos, tmp_path_factory):
    """The photos as they come from a laptop: a finished run on them, and what it printed.

    Of 96 + 33 photos four cannot be read, cat has no validation images.
    """
    root = tmp_path_factory.mktemp("messy")
    data = root / "photos"
    shutil.copytree(photos, data)
    finder(data)
    put(data, "train/.ipynb_checkpoints/a.jpg", "val/.ipynb_checkpoints/a.jpg")
    shutil.rmtree(data / "val" / "cat")
    bad = [data / "train" / "ant" / "000.jpg", data / "train" / "ant" / "001.jpg",
           data / "val" / "ant" / "003.jpg", data / "val" / "bee" / "004.jpg"]
    bad[0].write_bytes(b"")
    bad[1].write_bytes(bad[1].read_bytes()[:300])
    bad[2].write_bytes(b"<html>")
    bad[3].unlink()
    bad[3].symlink_to(root / "gone.jpg")
    words = [*TINY, *PLAIN, "--data", data, "--out", root / "out", "--teacher", "none"]
    return SimpleNamespace(data=data, out=root / "out", bad=bad, words=words)


def test_a_run_on_a_messy_folder(messy, capfd):
    main("vitkd", *messy.words)
    out, err = capfd.readouterr()
    assert out.splitlines()[1] == ("96 training and 22 validation images of 3 classes, 1 of them "
                                   "without validation images")
    warnings = sorted(line for line in err.splitlines() if "WARNING" in line)
    assert [line.split(": ")[1] for line in warnings] == [
        f"unreadable image {path}" for path in messy.bad]
    # Those that cannot be read are not counted
    saved = common.load_checkpoint(messy.out / "student.pth")
    model = vitkd.ViT(**saved["arch"])
    model.load_state_dict(saved["model"])
    right = []
    for label, name in enumerate(("ant", "bee")):
        for path in sorted((messy.data / "val" / name).glob("[0-9]*.jpg")):
            if path not in messy.bad:
                with torch.no_grad(), Image.open(path) as image:
                    logits = model.eval()(common.val_transform(16)(image)[None])
                right.append(logits.argmax().item() == label)
    assert len(right) == 20
    assert records(messy.out)[-1]["top1"] == 100 * np.mean(right)


def test_resume_after_a_class_was_added_is_refused(messy, photos, tmp_path):
    if not (messy.out / "last.pth").exists():
        main("vitkd", *messy.words)
    shutil.copytree(photos, tmp_path / "photos")
    shutil.copytree(photos / "train" / "ant", tmp_path / "photos" / "train" / "dog")
    message = error_of("vitkd", *messy.words, "--data", tmp_path / "photos", "--resume")
    assert message == (f"{messy.out}/last.pth was written with other settings: num_classes 4, "
                       "before 3. For other settings start a new run in another folder, perhaps "
                       f"with --init {messy.out}/student.pth")


def test_our_own_last_pth_gives_the_student(messy):
    if not (messy.out / "last.pth").exists():
        main("vitkd", *messy.words)
    arch = common.load_checkpoint(messy.out / "student.pth")["arch"]
    tuned = vitkd.ViT(**arch)
    vitkd.load_init(tuned, messy.out / "last.pth")
    for name, tensor in student(messy.out).items():
        assert torch.equal(tuned.state_dict()[name], tensor)


def test_nothing_readable_is_one_line(photos, tmp_path):
    for where in ("train", "val"):
        data = tmp_path / where
        shutil.copytree(photos, data)
        for path in (data / where).rglob("*.jpg"):
            path.write_bytes(b"")
        message = error_of("vitkd", *TINY, *PLAIN, "--data", data, "--teacher", "none",
                           "--out", tmp_path / "out" / where)
        if where == "train":
            assert message.startswith("100 images in a row could not be read, the last because "
                                      f"of: unreadable image {data}/train/")
        else:
            assert message == "no validation image can be read"
        assert not (tmp_path / "out" / where / "student.pth").exists()
