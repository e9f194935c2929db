"""eval_knn.py: votes against brute force in float64, features over processes, the linear probe."""

import re
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import in_process, make_photos, run

import attndistill
import common
import eval_knn
import vitkd

# ------------------------------------------------------------------ the vote


def brute_force(train, labels, test, k, temperature, C):
    """Scores (N_test, C), image by image, in float64 numpy."""
    train, test = (x.double().numpy() for x in (train, test))
    train = train / np.linalg.norm(train, axis=1, keepdims=True)
    scores = np.zeros((len(test), C))
    for i, x in enumerate(test):
        similarity = train @ (x / np.linalg.norm(x))
        for j in np.argsort(-similarity)[:k]:
            scores[i, labels[j]] += np.exp(similarity[j] / temperature)
    return scores


def problem(N=500, N_test=60, D=16, C=7):
    centres = 1.5 * torch.randn(C, D)
    labels, test_labels = torch.randint(0, C, (N,)), torch.randint(0, C, (N_test,))
    return (centres[labels] + 2 * torch.randn(N, D), labels,
            centres[test_labels] + 2 * torch.randn(N_test, D), test_labels)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("N, N_test, D, C", [(500, 60, 16, 7), (300, 1, 8, 3), (40, 25, 5, 12),
                                             (1, 5, 4, 2)])
def test_votes_equal_brute_force(N, N_test, D, C, temperature):
    """Also: one test image, k above the number of training images, fewer than five classes."""
    train, labels, test, _ = problem(N, N_test, D, C)
    predicted = eval_knn.knn_predict(train, labels, test, (200, 1, 20, 10), temperature, C)
    assert set(predicted) == {1, 10, 20, 200}
    for k, classes in predicted.items():
        assert classes.shape == (N_test, min(5, C))
        scores = brute_force(train, labels, test, k, temperature, C)
        chosen = np.take_along_axis(scores, classes.numpy(), 1)
        best = -np.sort(-scores, 1)[:, :min(5, C)]
        assert np.allclose(chosen, best, rtol=1e-4)  # equal scores may stand in any order
        distinct = best[:, 0] > 1.001 * best[:, min(1, C - 1)]
        assert (classes[:, 0].numpy() == scores.argmax(1))[distinct].all()
        assert all(len(set(row)) == len(row) for row in classes.tolist())


def test_features_are_normalised_and_may_be_half():
    train, labels, test, _ = problem(C=4)
    expected = eval_knn.knn_predict(train, labels, test)
    scaled = eval_knn.knn_predict(7 * train, labels, 0.1 * test)
    half = eval_knn.knn_predict(train.half(), labels, test.half())
    for k in eval_knn.KS:
        assert torch.equal(expected[k], scaled[k])
        assert (expected[k][:, 0] == half[k][:, 0]).float().mean() > 0.95
    assert expected[10].shape == (60, 4)  # num_classes from the labels


def test_chunks_change_nothing(monkeypatch):
    train, labels, test, _ = problem(N=3000, N_test=100, C=20)
    train, test = train.half(), test.half()
    train[1000:1100] = train[0]  # ties
    whole = eval_knn.knn_predict(train, labels, test)
    for workspace in (1, 3000 * 7, 3000 * 64):
        monkeypatch.setattr(eval_knn, "WORKSPACE", workspace)
        for k, classes in eval_knn.knn_predict(train, labels, test).items():
            assert torch.equal(classes[:, 0], whole[k][:, 0])


def test_ties_do_not_crash():
    labels = torch.arange(300) % 3
    same = torch.ones(300, 8)
    for train in (same, torch.zeros(300, 8)):  # all alike; a collapsed model
        predicted = eval_knn.knn_predict(train, labels, same[:4])
        assert all(p.shape == (4, 3) and sorted(p[0].tolist()) == [0, 1, 2]
                   for p in predicted.values())


def test_accuracy_counts_top1_and_top5():
    train, labels, test, test_labels = problem(N=400, N_test=90, C=9)
    features = {"train_features": train, "train_labels": labels, "test_features": test,
                "test_labels": test_labels}
    accuracy = eval_knn.knn_accuracy(features, (5, 50), 0.07, 9)
    # one neighbour names one class, whatever fills up the five; a k given twice counts once
    one = eval_knn.knn_accuracy(features, (1, 1), 0.07, 9)
    assert one[1][0] == one[1][1] > 20 and len(one) == 1
    for k, (top1, top5) in accuracy.items():
        order = np.argsort(-brute_force(train, labels, test, k, 0.07, 9), 1, kind="stable")
        assert top1 == pytest.approx(100 * (order[:, 0] == test_labels.numpy()).mean())
        assert top1 < top5 <= 100


def test_the_workspace_counts_classes_and_neighbours(monkeypatch):
    """Test images are taken in parts that fit, however many classes there are."""
    rows, normalize = [], F.normalize
    monkeypatch.setattr(eval_knn, "WORKSPACE", 100_000)
    monkeypatch.setattr(F, "normalize", lambda x, dim: rows.append(len(x)) or normalize(x, dim=dim))
    train, test = torch.randn(100, 8), torch.randn(500, 8)
    for num_classes, ks, expected in ((10, (1,), 100_000 // 152), (20_000, (1,), 1),
                                      (10, (100,), 100_000 // 1340)):
        rows.clear()
        eval_knn.knn_predict(train, torch.zeros(100).long(), test, ks, num_classes=num_classes)
        assert rows[0] == min(500, expected)


MEMORY = """
import resource, sys, torch
sys.path.insert(0, ".")
import eval_knn
N, D = 1_281_167, 384
torch.manual_seed(0)
train = torch.empty(N, D, dtype=torch.float16)
for part in train.split(100_000):
    part.copy_(torch.randn(len(part), D))
labels = torch.randint(0, 1000, (N,))
test = train[:512] + 0.5 * torch.randn(512, D).half()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
before = peak()
import time; began = time.perf_counter()
predicted = eval_knn.knn_predict(train, labels, test, ks=(1, 20, 200), num_classes=1000)
assert (predicted[1][:, 0] == labels[:512]).all()
print(train.nbytes / 2**30, peak() - before, time.perf_counter() - began)
"""


@pytest.mark.slow
def test_imagenets_training_features_fit_beside_a_bounded_workspace():
    """1.28 M x 384 in float16: what is needed beside the features (GiB)."""
    own, workspace, seconds = map(float, run(sys.executable, "-c", MEMORY)[0].split())
    print(f"features {own:.2f} GiB, workspace {workspace:.2f} GiB, 512 votes in {seconds:.1f} s")
    assert own == pytest.approx(0.916, abs=0.01) and workspace < 1.8


# ------------------------------------------------------------------ linear probe


def test_softmax_regression_is_sgd_with_momentum():
    """Each of the grid's regressions equals torch.optim.SGD and autograd on its own."""
    features, labels, more, _ = problem(N=200, C=3)
    rates, decays, epochs = [0.3, 0.1, 0.01], [0.0, 1e-2, 0.1], 20  # 200 images: one batch
    logits = eval_knn.softmax_regression(features, labels, 3, rates, decays, epochs)(more)
    mean, std = features.double().mean(0), features.double().std(0, correction=0)
    x, x_more = ((f.double() - mean) / std for f in (features, more))
    for g, (rate, decay) in enumerate(zip(rates, decays)):
        W = torch.zeros(16, 3, dtype=torch.float64, requires_grad=True)
        b = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        sgd = torch.optim.SGD([{"params": [W], "weight_decay": decay}, {"params": [b]}], rate, 0.9)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            sgd, lambda step: (1 + np.cos(np.pi * step / epochs)) / 2)
        for _ in range(epochs):
            sgd.zero_grad()
            F.cross_entropy(x @ W + b, labels).backward()
            sgd.step()
            schedule.step()
        assert torch.allclose(logits[g].double(), x_more @ W + b, rtol=1e-3, atol=1e-4)


def test_a_last_batch_of_one_does_not_upset_the_regression():
    centres, accuracy = 0.2 * torch.randn(20, 384), {}
    labels, test_labels = torch.arange(2049) % 20, torch.arange(500) % 20
    features, test = (centres[c] + torch.randn(len(c), 384) for c in (labels, test_labels))
    for N in (2048, 2049):
        logits = eval_knn.softmax_regression(features[:N], labels[:N], 20, [0.3], [0.0])(test)
        accuracy[N] = (logits[0].argmax(1) == test_labels).float().mean().item()
    assert accuracy[2048] > 0.7 and abs(accuracy[2048] - accuracy[2049]) < 0.05, accuracy


def test_held_out_features_are_not_trained_on():
    """Random labels can be learnt by heart, but not foretold."""
    features = {"train_features": torch.randn(400, 384), "train_labels": torch.arange(400) % 4,
                "test_features": torch.randn(400, 384), "test_labels": torch.arange(400) % 4}
    probe = eval_knn.linear_probe(features, 4)
    assert probe["held_out"] < 60 and probe["top1"] < 40


def test_linear_probe_chooses_on_held_out_training_features_only():
    train, labels, test, test_labels = problem(N=2000, N_test=300, C=5)
    features = {"train_features": train.half(), "train_labels": labels,
                "test_features": test.half(), "test_labels": test_labels}
    probe = eval_knn.linear_probe(features, 5)
    assert probe["rate"] in eval_knn.RATES and probe["decay"] in eval_knn.DECAYS
    knn = eval_knn.knn_accuracy(features, (20,), 0.07, 5)[20][0]
    assert 55 < probe["top1"] < 100 and probe["top1"] > knn - 5 and probe["top5"] == 100
    shuffled = {**features, "test_labels": test_labels[torch.randperm(300)],
                "test_features": torch.randn(300, 16)}
    other = eval_knn.linear_probe(shuffled, 5)
    assert all(other[key] == probe[key] for key in ("rate", "decay", "held_out"))
    assert other["top1"] < 40
    # the choice is the grid's best on the held-out tenth
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(0))
    held_out, fit = order[:200], order[200:]
    best = max((eval_knn.softmax_regression(train[fit].half(), labels[fit], 5, [rate], [decay])(
        train[held_out].half())[0].argmax(1) == labels[held_out]).float().mean().item()
        for rate in eval_knn.RATES for decay in eval_knn.DECAYS)
    assert probe["held_out"] == pytest.approx(100 * best, abs=0.51)  # of 200: one image


# ------------------------------------------------------------------ the program


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of photos, and checkpoints of two scripts."""
    folder = tmp_path_factory.mktemp("eval_knn")
    make_photos(folder / "photos", counts=(("train", 33), ("val", 12)))
    arch = {"image_size": 16, "patch_size": 4, "dim": 24, "depth": 2, "num_heads": 3,
            "num_classes": 0}
    torch.manual_seed(1)
    for script, num_classes in ((attndistill, 0), (vitkd, 3)):
        model = script.ViT(**{**arch, "num_classes": num_classes})
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
        common.save_checkpoint(folder / f"{script.__name__}.pth", model=model.state_dict(),
                               arch={**arch, "num_classes": num_classes},
                               script=script.__name__, top1=None)
    return folder


@pytest.mark.parametrize("script", ["attndistill", "vitkd"])
def test_features_are_the_normed_class_tokens(script, files, tmp_path, capsys, monkeypatch):
    status, out, err = in_process(
        eval_knn, capsys, monkeypatch, "--weights", files / f"{script}.pth", "--data",
        files / "photos", "--workers", 2, "--micro-batch", 7, "--amp", "off", "--features", "fp32",
        "--save-features", tmp_path / "new" / "f.pth")
    assert status == 0, err
    assert "99 training and 36 test images, 3 classes, width 24" in out
    saved = common.load_checkpoint(tmp_path / "new" / "f.pth")
    assert saved["train_features"].shape == (99, 24) and saved["num_classes"] == 3
    assert saved["test_labels"].tolist() == [c for c in range(3) for _ in range(12)]
    checkpoint = common.load_checkpoint(files / f"{script}.pth")
    model = {"attndistill": attndistill, "vitkd": vitkd}[script].ViT(**checkpoint["arch"])
    model.load_state_dict(checkpoint["model"])
    model.head = torch.nn.Identity()
    from torchvision.datasets import ImageFolder
    val = ImageFolder(files / "photos" / "val", common.val_transform(16))
    with torch.no_grad():
        tokens = model.eval()(common.normalize(torch.stack([image for image, _ in val]), "cpu"))
    assert torch.allclose(saved["test_features"], tokens, atol=1e-5)
    # from the file: the same table, and other ks
    status, again, err = in_process(eval_knn, capsys, monkeypatch, "--load-features",
                                    tmp_path / "new" / "f.pth", "--ks", 3, 20, "--linear")
    assert status == 0, err
    assert re.findall(r"k = 20 .*", out) == re.findall(r"k = 20 .*", again)
    assert "k = 3 " in again and "k = 10 " not in again
    assert re.search(r"linear probe  top-1 +\d+\.\d+ %.*learning rate 0\.\d+, weight decay .*"
                     r"chosen by top-1 \d+\.\d+ % on held-out training images", again)


def test_processes_change_nothing(files, tmp_path):
    """99 + 36 images over 2 and 3 processes: the same features, in the same order; same votes."""
    tables, saved = [], []
    for processes in (1, 2, 3):
        path = tmp_path / f"{processes}.pth"
        words = ["eval_knn.py", "--weights", files / "attndistill.pth", "--data", files / "photos",
                 "--workers", 1, "--amp", "off", "--linear", "--save-features", path]
        out, _ = run(*words, processes=processes)
        tables.append(re.findall(r"(?:k-NN|linear probe).*?top-5 +[\d.]+ %", out))
        saved.append(common.load_checkpoint(path))
    assert len(tables[0]) == 5 and tables[0] == tables[1] == tables[2]
    for other in saved[1:]:
        assert torch.equal(saved[0]["train_labels"], other["train_labels"])
        assert torch.allclose(saved[0]["train_features"], other["train_features"], atol=2e-3)
        assert saved[0]["train_features"].dtype == torch.float16


def test_unreadable_images_are_left_out(tmp_path, files, capsys, monkeypatch):
    photos = make_photos(tmp_path / "photos", counts=(("train", 40), ("val", 5)))
    (photos / "train" / "ant" / "003.jpg").write_bytes(b"no image")
    status, out, err = in_process(eval_knn, capsys, monkeypatch, "--weights",
                                  files / "attndistill.pth", "--data", photos, "--workers", 0)
    assert status == 0 and "119 training and 15 test images" in out
    assert "unreadable image, replaced by the next: " in err and "003.jpg" in err
    (photos / "train" / "ant" / "004.jpg").write_bytes(b"no image")
    status, _, err = in_process(eval_knn, capsys, monkeypatch, "--weights",
                                files / "attndistill.pth", "--data", photos, "--workers", 0)
    assert status == 1 and "2 of 120 images are unreadable, more than 1 %" in err


def test_shapes_and_another_image_size(files, capsys, monkeypatch):
    status, out, err = in_process(
        eval_knn, capsys, monkeypatch, "--weights", files / "attndistill.pth", "--data", "shapes",
        "--data-fraction", 0.05, "--image-size", 32, "--ks", 5)
    assert status == 0, err
    assert "1200 images at 32 px" in out and "10 classes" in out


def test_released_weights(tmp_path, files, capsys, monkeypatch):
    model = attndistill.ViT(dim=192, depth=12, num_heads=3, num_classes=0)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    status, out, err = in_process(
        eval_knn, capsys, monkeypatch, "--arch", "vit_t16", "--weights", tmp_path / "w.pth",
        "--data", files / "photos", "--image-size", 32, "--workers", 0)
    assert status == 0, err
    assert "width 192" in out


def test_wrong_input_is_one_line(tmp_path, files, capsys, monkeypatch):
    torch.save({"fc": torch.zeros(1)}, tmp_path / "other.pth")
    checkpoint = common.load_checkpoint(files / "attndistill.pth")
    broken = {k: v * float("nan") for k, v in checkpoint["model"].items()}
    common.save_checkpoint(tmp_path / "nan.pth", **{**checkpoint, "model": broken})
    huge = {k: v * 1e30 for k, v in checkpoint["model"].items()}
    common.save_checkpoint(tmp_path / "huge.pth", **{**checkpoint, "model": huge})
    half = dict(list(checkpoint["model"].items())[:9])
    common.save_checkpoint(tmp_path / "half.pth", **{**checkpoint, "model": half})
    data = ["--data", files / "photos", "--workers", 0]
    good = ["--weights", files / "attndistill.pth"]
    for arguments, status, message in (
            (data, 2, "give --weights, --arch or --load-features"),
            ([*data, "--weights", tmp_path / "no.pth"], 2, "no file"),
            ([*data, "--weights", tmp_path / "other.pth"], 2, "(eval_knn.py: --arch NAME)"),
            ([*data, "--arch", "dino_s15"], 2, "no arch dino_s15: take dino_s16"),
            ([*data, "--arch", "mugs_s16"], 2, "give its file with --weights FILE"),
            ([*data, "--arch", "vit_t16", "--weights", "teacher/w"], 2, "no file teacher/w"),
            ([*data, *good, "--micro-batch", 512], 2, "512 is not in [1, 256]"),
            ([*data, "--arch", files / "vitkd.pth", *good], 2, "--arch with --weights is one of"),
            ([*good, "--load-features", "x"], 2, "takes neither --weights nor --arch"),
            ([*data, *good, "--save-features", "/proc/no/f.pth"], 2, "cannot write --save-feat"),
            ([*data, *good, "--save-features", tmp_path], 2, "it is a folder"),
            ([*data, "--arch", "vit_t16", "--weights", tmp_path / "other.pth"], 2, "150 missing"),
            ([*data, *good, "--image-size", 18], 2, "18 is not a multiple of the patch size 4"),
            ([*data, *good, "--ks", 0], 2, "--ks: 0 is not in [1, inf)"),
            (["--data", tmp_path, *good], 2, "no folder"),
            (["--load-features", tmp_path / "other.pth"], 2, "not written by --save-features"),
            ([*data, "--weights", tmp_path / "half.pth"], 2, "is damaged: 21 missing"),
            ([*data, "--weights", tmp_path / "nan.pth"], 2, "NaN or infinite: cls_token"),
            ([*data, "--weights", tmp_path / "huge.pth"], 1, "features are not finite")):
        found, _, err = in_process(eval_knn, capsys, monkeypatch, *arguments)
        assert found == status and message in err and len(err.splitlines()) == 1, err
