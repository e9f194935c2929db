"""Whole runs of the training scripts: the same cases for each of them."""

import argparse
import importlib
import json
import math
import re
import shutil
import sys
import time

import pytest
import torch
from helpers import (
    ROOT,
    SCRIPTS,
    cnn_beside,
    error_of,
    flags,
    main,
    records,
    run,
    start,
    student,
)
from torch.distributed.elastic.utils.distributed import get_free_port

import attndistill
import common
import dearkd
import eval_knn
import vitkd

TERMS = {"vitkd": ["ce", "mimicking", "generation", "nkd"],
         "attndistill": ["alignment", "guidance"],
         "dearkd": ["ce", "logits", "hints"]}

# All that is random in training. attndistill.py augments anyway.
RANDOM = "--mixup 0.8 --cutmix 1 --rand-augment 9 --random-erasing 0.25".split()


def random_flags(script):
    return [] if script == "attndistill" else [*RANDOM, "--drop-path", 0.2, "--ema-decay", 0.9]


# ------------------------------------------------------------------ a run and its files


def test_a_student_knows_its_classes_and_image_size(photos, teacher, tmp_path, capsys):
    alone = ["--teacher", "none", "--epochs", 1, "--data-fraction", 0.2]
    main("vitkd", *flags("vitkd", teacher, tmp_path / "vit", "--data", photos, *alone))
    path = tmp_path / "vit" / "student.pth"
    trained_on = common.load_checkpoint(path)["trained_on"]
    assert trained_on == {"classes": ["ant", "bee", "cat"], "image_size": 16}
    assert "learned" not in capsys.readouterr().out

    shutil.copytree(photos, tmp_path / "photos")
    for split in ("train", "val"):
        (tmp_path / "photos" / split / "bee").rename(tmp_path / "photos" / split / "wasp")
    other = ["--data", tmp_path / "photos", "--image-size", 32, "--epochs", 1, "--data-fraction",
             0.2, "--teacher"]
    classes = "First difference: output 1 was bee, here it is cat"
    size = f"{path} learned from images of 16 px, here they have 32"
    main("vitkd", *flags("vitkd", teacher, tmp_path / "again", *other, path, "--init", path))
    lines = capsys.readouterr().out.splitlines()
    assert lines.count(classes) == lines.count(size) == 2  # of --teacher and of --init
    main("attndistill", *flags("attndistill", teacher, tmp_path / "features", *other, path))
    lines = capsys.readouterr().out.splitlines()
    assert size in lines and classes not in lines  # it reads no labels
    renamed = ["--data", tmp_path / "photos", *alone, "--resume"]
    main("vitkd", *flags("vitkd", teacher, tmp_path / "vit", *renamed))
    assert classes in capsys.readouterr().out.splitlines()
    main("vitkd", *flags("vitkd", teacher, tmp_path / "typo", *renamed))
    assert f"{tmp_path}/typo holds no last.pth: this is a new run\n" in capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_and_what_it_leaves(script, teacher, tmp_path, capsys):
    teacher_before = teacher.read_bytes()
    own = ["--stage1-epochs", 3] if script == "dearkd" else []
    words = flags(script, teacher, tmp_path / "run", "--epochs", 3, "--log-every", 5,
                  "--weight-decay", 0.3, *own)
    main(script, *words)
    lines = capsys.readouterr().out.splitlines()
    log = records(tmp_path / "run")

    # What it prints
    assert re.fullmatch(r"CPU(: \S.*)?, 1 process\(es\), amp off, torch \S+", lines[0])
    assert "160 training and 40 validation images of 10 classes" in lines
    progress = [line for line in lines if "waiting for data" in line]
    matches = [re.fullmatch(
        r"epoch (\d)/3  step (\d+)/10  loss (\d+\.\d{4})  lr (\d\.\d\de[-+]\d\d)  \d+ images/s  "
        r"waiting for data \d+%  left 0:\d\d:\d\d", line) for line in progress]
    steps = [(int(match[1]), int(match[2])) for match in matches]
    assert steps == [(1, 5), (1, 10), (2, 5), (2, 10), (3, 5), (3, 10)]
    for match, record in zip(matches[1::2], log):  # at the end of an epoch
        loss = sum(record[term] for term in TERMS[script])
        assert float(match[3]) == pytest.approx(loss, abs=1e-4)
        assert float(match[4]) == pytest.approx(record["lr"], rel=0.01, abs=1e-9)
    assert [line.split("  ")[0] for line in lines if "skipped_steps" in line] == [
        "epoch 1", "epoch 2", "epoch 3"]
    assert any(line.endswith("left 0:00:00") for line in lines)

    # Its records
    assert [record["epoch"] for record in log] == [1, 2, 3]
    for record in log:
        assert {*TERMS[script], "lr", "images_per_second", "waiting_for_data", "peak_memory_gb",
                "skipped_steps", "seconds"} <= record.keys()
        assert 0 < record["waiting_for_data"] < 1 and record["images_per_second"] > 0
    assert sum(log[2][term] for term in TERMS[script]) < sum(log[0][term] for term in TERMS[script])
    settings = json.loads((tmp_path / "run" / "args.json").read_text())
    schedule = [settings[name] for name in ("epochs", "lr", "min_lr", "warmup_epochs")]
    for record in log:
        assert record["lr"] == pytest.approx(
            common.learning_rate(record["epoch"], *schedule), abs=1e-9)

    # Its optimiser: the last rate, the weight decay, and a moment for each parameter
    last = common.load_checkpoint(tmp_path / "run" / "last.pth")
    groups = last["optimizer"]["param_groups"]
    assert {group["lr"] for group in groups} == {log[-1]["lr"]}
    assert [group["weight_decay"] for group in groups] == [0.3, 0]
    moments = [tensors["exp_avg"].numel() for tensors in last["optimizer"]["state"].values()]
    assert sum(moments) == sum(tensor.numel() for tensor in last["model"].values())

    # Its files
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "last.pth", "student.pth", "log.jsonl", "args.json"}
    exported = common.load_checkpoint(tmp_path / "run" / "student.pth")
    assert exported.keys() == {"model", "arch", "script", "trained_on"}
    assert exported["script"] == script
    importlib.import_module(script).ViT(**exported["arch"]).load_state_dict(exported["model"])
    assert teacher.read_bytes() == teacher_before


def flat(state):
    """Return all numbers of nested dictionaries and lists as one tensor, bit by bit."""
    if isinstance(state, dict):
        state = list(state.values())
    if isinstance(state, (list, tuple)):
        parts = [flat(part) for part in state]
        return torch.cat(parts) if parts else torch.zeros(0)
    if isinstance(state, (int, float, torch.Tensor)):
        return torch.as_tensor(state, dtype=torch.float64).flatten()
    return torch.zeros(0)


def kill(script, words, last, monkeypatch):
    """Start a run in a process of its own, and kill it after its first epoch."""
    process = start(f"{script}.py", *words)
    while not last.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.wait()


def interrupt(script, words, last, monkeypatch):
    """Press Ctrl-C in the middle of the second epoch. This costs no new process."""
    distillation = importlib.import_module(script).Distillation
    forward = distillation.forward
    calls = []

    def interrupted(self, *inputs):
        calls.append(0)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return forward(self, *inputs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(distillation, "forward", interrupted)
        main(script, *words, "--workers", 0)


@pytest.mark.parametrize("script, stop", [
    ("vitkd", kill), ("attndistill", interrupt), ("dearkd", interrupt)])
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(
        script, stop, teacher, tmp_path, monkeypatch):
    words = flags(script, teacher, tmp_path / "a", "--epochs", 3, "--data-fraction", 0.5,
                  *random_flags(script))
    main(script, *words)
    words[words.index("--out") + 1] = str(tmp_path / "b")
    stop(script, [*words, "--workers", "2"], tmp_path / "b" / "last.pth", monkeypatch)
    done = len(common.load_checkpoint(tmp_path / "b" / "last.pth")["log"])
    assert 1 <= done < 3
    main(script, *words, "--resume", "--eval-every", 2)
    a, b = (common.load_checkpoint(tmp_path / name / "last.pth") for name in "ab")
    parts = a.keys() - {"args", "log"}
    averages = set() if script == "attndistill" else {"ema"}
    assert parts == {"model", "optimizer", "scaler"} | averages
    for name in parts:
        assert torch.equal(flat(a[name]), flat(b[name])), name
    for record, other in zip(a["log"], b["log"], strict=True):
        for term in TERMS[script]:
            assert record.get(term) == other.get(term)
    saved = student(tmp_path / "b")
    assert all(torch.equal(saved[name], x) for name, x in student(tmp_path / "a").items())


# ------------------------------------------------------------------ several processes

# argv: JSON of runs, {name: [script, port where its processes meet, two losses become NaN, flags]}
PROGRAM = """
import importlib, json, os, sys, warnings
warnings.simplefilter("ignore", FutureWarning)  # of a torch that is newer than this project
import torch
import common

evaluate = common.evaluate

def evaluate_and_save(model, *others):
    torch.save(model.state_dict(), f"{os.environ['EVALUATED']}/evaluated-{common.rank()}.pth")
    return evaluate(model, *others)

common.evaluate = evaluate_and_save
for name, (script, port, bad, words) in json.loads(sys.argv[1]).items():
    module = importlib.import_module(script)
    if os.environ["RANK"] == "0":
        print("run:", name, flush=True)
    os.environ.update(MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="False")
    sys.argv[0] = f"{script}.py"
    if not bad:
        module.main(words)
        continue
    forward, calls = module.Distillation.forward, []

    def with_nan(self, *inputs):
        calls.append(0)
        factor = float("nan") if common.rank() == 1 and len(calls) in (3, 4) else 1
        return {name: loss * factor for name, loss in forward(self, *inputs).items()}

    module.Distillation.forward = with_nan
    module.main(words)
    module.Distillation.forward = forward
"""


def one_step(script, teacher, out, *more):
    # All tokens masked and no dropout, since each process draws its own
    own = {"vitkd": ["--mask-ratio", 1], "dearkd": ["--pos-dropout", 0]}.get(script, [])
    return flags(script, teacher, out, "--epochs", 1, "--data-fraction", 0.25, "--batch-size", 40,
                 "--clip-grad", 0, *own, *more)


def first_moment(out):
    """Return AdamW's first moment as one vector. After one step it is a tenth of the gradient."""
    state = common.load_checkpoint(out / "last.pth")["optimizer"]["state"].values()
    return torch.cat([tensors["exp_avg"].flatten() for tensors in state])


def knn_flags(teacher, photos):
    return ["--weights", teacher, "--data", photos, "--workers", 0, "--amp", "off", "--batch-size",
            8, "--linear"]


def cnn_flags(teacher, out):
    return flags("dearkd", teacher, out, "--train-teacher", "cifar_resnet20", "--epochs", 1)


def synthesis_flags(teacher, out):
    """Flags of a synthesis of 30 images of 10 classes in three batches."""
    return ["--teacher", cnn_beside(teacher), "--image-size", 16, "--images-per-class", 3,
            "--images-per-batch", 10, "--amp", "off", "--steps", 3, "--synthesize", out]


@pytest.fixture(scope="module")
def two_processes(teacher, photos, tmp_path_factory):
    """A folder with what two processes left: a folder for each run below, stdout.txt, stderr.txt.

    SCRIPT is one step. In SCRIPT-nan, of two epochs, the second process has two bad steps.
    evaluated-RANK.pth: the weights of the last model that this process evaluated, of the run "cnn".
    """
    folder = tmp_path_factory.mktemp("two")
    runs = {}
    for script in SCRIPTS:
        clean = one_step(script, teacher, folder / script, "--accum", 2)
        bad = flags(script, teacher, folder / f"{script}-nan", "--data-fraction", 0.5)
        if script == "dearkd":
            bad += ["--stage1-epochs", 1]
        runs[script] = (script, 0, clean)
        runs[f"{script}-nan"] = (script, 1, bad)
    runs["cnn"] = ("dearkd", 0, cnn_flags(teacher, folder / "cnn"))
    runs["made"] = ("dearkd", 0, synthesis_flags(teacher, folder / "made"))
    runs["knn"] = ("eval_knn", 0, knn_flags(teacher, photos))
    # The last one ends the processes
    runs["wrong"] = ("vitkd", 0, flags("vitkd", teacher, folder / "wrong", "--batch-size", 15))
    with_ports = {name: (script, get_free_port(), bad, [str(word) for word in words])
                  for name, (script, bad, words) in runs.items()}
    (folder / "program.py").write_text(PROGRAM)
    out, err = run("torchrun", "--nproc_per_node", 2, folder / "program.py", json.dumps(with_ports),
                   PYTHONPATH=str(ROOT), EVALUATED=str(folder), status=1)
    assert out.count("2 process(es)") == len(runs), err  # the first process alone prints
    (folder / "stdout.txt").write_text(out)
    (folder / "stderr.txt").write_text(err)
    return folder


@pytest.mark.parametrize("script", SCRIPTS)
def test_processes_and_chunks_give_the_gradient_of_one_batch(
        script, teacher, two_processes, tmp_path):
    main(script, *one_step(script, teacher, tmp_path / "whole"))
    main(script, *one_step(script, teacher, tmp_path / "chunks", "--accum", 4))
    losses, moments = [], []
    for out in (tmp_path / "whole", tmp_path / "chunks", two_processes / script):
        moments.append(first_moment(out))
        losses.append(records(out)[0])
    assert losses[0]["skipped_steps"] == 0
    same = losses[0].keys() - {
        "seconds", "images_per_second", "waiting_for_data", "peak_memory_gb"}
    assert set(TERMS[script]) < same
    for i in (1, 2):
        assert (moments[i] - moments[0]).norm() <= 1e-6 * moments[0].norm()
        for name in same:
            assert losses[i][name] == pytest.approx(losses[0][name], rel=1e-5)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_nan_on_one_rank_is_skipped_by_all(script, two_processes):
    out = two_processes / f"{script}-nan"
    first, second = records(out)
    assert [first["skipped_steps"], second["skipped_steps"]] == [2, 0]
    assert all(first[term] > 0 for term in TERMS[script])
    # dearkd.py's second epoch is stage 2: without the CNN, and the aligners are not trained
    assert all(second[term] > 0 for term in (["ce"] if script == "dearkd" else TERMS[script]))
    assert all(value.isfinite().all() for value in student(out).values())


def test_two_processes_evaluate_and_save_the_same_cnn(two_processes):
    """With BatchNorm's statistics of the first process, since each has its own in training."""
    saved = student(two_processes / "cnn")
    for rank in (0, 1):
        evaluated = common.load_checkpoint(two_processes / f"evaluated-{rank}.pth")
        assert all(torch.equal(tensor, evaluated[name]) for name, tensor in saved.items())
    assert saved["bn1.running_mean"].abs().sum() > 0
    assert records(two_processes / "cnn")[0]["skipped_steps"] == 0


def test_two_processes_make_the_images_of_one(teacher, two_processes, tmp_path):
    main("dearkd", *synthesis_flags(teacher, tmp_path / "made"))
    ours = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*.png")}
    assert len(ours) == 30 + 1  # and preview.png
    for path, content in ours.items():
        assert (two_processes / path).read_bytes() == content
    assert len(list((two_processes / "made").rglob("*.png"))) == len(ours)


def test_two_processes_print_the_knn_of_one(teacher, photos, two_processes, capsys):
    main("eval_knn", *knn_flags(teacher, photos))
    _, *one = capsys.readouterr().out.splitlines()  # the first line says how many processes
    sections = (two_processes / "stdout.txt").read_text().split("run: ")
    section, = [section for section in sections if section.startswith("knn\n")]
    _, _, *two = section.splitlines()
    assert one == two
    assert "k = 200" in "".join(one) and "linear probe" in one[-1]


def test_several_processes_write_one_line_about_wrong_input_and_no_warning(two_processes):
    err = (two_processes / "stderr.txt").read_text()
    assert [line for line in err.splitlines() if ".py: error: " in line] == [
        "vitkd.py: error: --batch-size 15 is not divisible by processes x --accum = 2"]
    ours = err.partition("vitkd.py: error: ")[0]  # torchrun's own report follows
    assert "Traceback" not in ours
    assert "Warning" not in ours


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_gradient_is_clipped(script, teacher, tmp_path):
    """After one step AdamW's first moment is a tenth of the gradient."""
    main(script, *one_step(script, teacher, tmp_path, "--clip-grad", 1e-3))
    states = common.load_checkpoint(tmp_path / "last.pth")["optimizer"]["state"].values()
    moments = torch.cat([tensors["exp_avg"].flatten() for tensors in states])
    assert moments.norm().item() == pytest.approx(1e-4, rel=1e-3)


@pytest.mark.parametrize("script", SCRIPTS)
def test_twenty_bad_steps_in_a_row_end_the_run(script, teacher, tmp_path, monkeypatch):
    module = importlib.import_module(script)
    forward = module.Distillation.forward
    calls = []

    def spoiled(self, *inputs):
        calls.append(0)
        # 19 bad steps after the first, a good one, then bad ones alone
        factor = 1 if len(calls) in (1, 21) else math.inf
        return {name: loss * factor for name, loss in forward(self, *inputs).items()}

    monkeypatch.setattr(module.Distillation, "forward", spoiled)
    twenty_steps = ["--data-fraction", 0.25, "--batch-size", 2]  # an epoch
    message = error_of(script, *flags(script, teacher, tmp_path, "--epochs", 9, *twenty_steps))
    assert message.startswith("20 steps in a row had no finite gradients")
    assert len(calls) == 41
    assert [record["skipped_steps"] for record in records(tmp_path)] == [19, 19]
    # The last checkpoint stays whole
    assert all(value.isfinite().all() for value in student(tmp_path).values())


# ------------------------------------------------------------------ resume, init, images


def test_resume_refuses_other_settings_and_finished_runs_stay(teacher, tmp_path):
    words = flags("vitkd", teacher, tmp_path / "run", "--epochs", 1)
    main("vitkd", *words, "--resume")  # nothing to continue: starts
    last = tmp_path / "run" / "last.pth"
    assert error_of("vitkd", *words) == (
        f"{tmp_path}/run already holds a run: add --resume, or choose another folder")
    assert error_of("vitkd", *words, "--resume", "--lr", 0.5, "--no-nkd") == (
        f"{last} was written with other settings: no_nkd True, before False; lr 0.5, before 0.001. "
        f"For other settings start a new run in another folder, perhaps with --init {tmp_path}/run/student.pth")
    before = last.read_bytes()
    main("vitkd", *words, "--resume", "--workers", 2)  # finished: nothing is left to do
    assert last.read_bytes() == before
    assert len(records(tmp_path / "run")) == 1
    # Of another script, of another project, and a part of one
    torch.save({"args": {"beta": 1}}, last)
    assert error_of("vitkd", *words, "--resume").startswith(f"{last} was written with other settin")
    for content in ({"args": argparse.Namespace(lr=1)}, {"epoch": 1}, []):
        torch.save(content, last)
        assert error_of("vitkd", *words, "--resume") == f"{last} was not written by these scripts"
    last.write_bytes(before[:1000])
    assert error_of("vitkd", *words, "--resume").startswith(f"{last} is not a file of weights")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_new_run_does_not_overwrite_a_student(script, teacher, tmp_path):
    copy = shutil.copy(teacher, tmp_path / "student.pth")
    assert error_of(script, *flags(script, teacher, tmp_path)) == (
        f"{tmp_path} already holds a student.pth, which this run would overwrite: choose another "
        "folder")
    assert copy.read_bytes() == teacher.read_bytes()


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_file_of_a_named_teacher_is_compared_with_the_data_and_the_resumed_run(
        script, photos, teacher, tmp_path, monkeypatch, capsys):
    name = {"vitkd": "deit_t", "attndistill": "vit_t", "dearkd": "cifar_resnet20"}[script]
    if script == "dearkd":
        network = dearkd.make_cnn(name, num_classes=3)
    else:
        sizes = {"dim": 12, "depth": 2, "num_heads": 3}
        monkeypatch.setitem(importlib.import_module(script).SIZES, name, sizes)
        network = vitkd.ViT(image_size=16, patch_size=4, num_classes=3, **sizes)
    file, same = tmp_path / "a.pth", tmp_path / "b.pth"
    common.save_checkpoint(file, model=network.state_dict(),
                           trained_on={"classes": ["ant", "bee", "dog"], "image_size": 8})
    shutil.copy(file, same)
    words = flags(script, teacher, tmp_path / "run", "--data", photos, "--epochs", 1, "--teacher",
                  name, "--teacher-weights")
    main(script, *words, file)
    out = capsys.readouterr().out
    assert f"{file} learned from images of 8 px, here they have 16\n" in out
    difference = "First difference: output 2 was dog, here it is cat\n"
    assert (difference in out) == (script != "attndistill")  # which reads no labels
    said = error_of(script, *words, same, "--resume")
    assert f"other settings: teacher_weights {same}, before {file}. " in said


@pytest.mark.parametrize("script", SCRIPTS)
def test_init_starts_from_a_student_at_any_size_with_a_new_head(script, photos, teacher, tmp_path):
    # attndistill takes vitkd's students
    of = importlib.import_module("dearkd" if script == "dearkd" else "vitkd")
    arch = {**of.SIZES["micro"], "image_size": 16, "patch_size": 4, "num_classes": 10}
    own = {"mhca_blocks": 4} if script == "dearkd" else {}
    torch.manual_seed(5)  # not the run's seed
    weights = of.ViT(**arch, **own).state_dict()
    headless = {key: value for key, value in weights.items() if not key.startswith("head")}
    still = ["--epochs", 1, "--lr", 1e-12, "--min-lr", 0, "--weight-decay", 0,
             "--data-fraction", 0.1, "--batch-size", 8]
    alone = [] if script == "attndistill" else ["--teacher", "none"]
    shapes = teacher.with_name("shapes")
    cases = [(weights, shapes, 16), (weights, photos, 32), (headless, shapes, 16)]
    if script == "dearkd":
        cases.pop()  # its students always have heads
    for state, data, size in cases:
        common.save_checkpoint(tmp_path / "pre.pth", model=state, arch=arch, script=of.__name__)
        out = tmp_path / f"{size} {len(state)}"
        main(script, *flags(script, teacher, out, "--data", data, "--image-size", size, "--init",
                            tmp_path / "pre.pth", *still, *alone))
        tuned = student(out)
        prefix = weights["pos_embed"].shape[1] - 16
        for key, value in headless.items():
            now = tuned[key]
            if key == "pos_embed" and size == 32:  # the patches' part is resized
                now, value = now[:, :prefix], value[:, :prefix]
            assert torch.allclose(now, value, atol=1e-7), key
        assert tuned["pos_embed"].shape[1] == prefix + (size // 4)**2
        for key in weights.keys() & tuned.keys() - headless.keys():
            assert len(tuned[key]) == (3 if data == photos else 10)
            kept = torch.allclose(tuned[key][:3], weights[key][:3], atol=1e-7)
            assert kept == (state is weights and data == shapes) or "bias" in key
        assert ("head.weight" in tuned) == (script != "attndistill")


@pytest.mark.parametrize("script", [*SCRIPTS, "dearkd --train-teacher"])
def test_epochs_have_new_order_and_new_crops(script, teacher, tmp_path, monkeypatch):
    """The loader draws its items in an order, and each item at an epoch."""
    script, *more = script.split()
    more += ["cifar_resnet20"] if more else []
    get_item = common.Images.__getitem__
    seen = []

    def spy(self, i):
        if self.replace_unreadable:  # a training image
            seen.append((i, self.epoch))
        return get_item(self, i)

    monkeypatch.setattr(common.Images, "__getitem__", spy)
    main(script, *flags(script, teacher, tmp_path, "--data-fraction", 0.2, "--batch-size", 15,
                        *more))
    assert [epoch for _, epoch in seen] == [0] * 30 + [1] * 30
    first, second = ([i for i, epoch in seen if epoch == number] for number in (0, 1))
    assert sorted(first) == sorted(second) == list(range(30))
    assert list(range(30)) != first != second


@pytest.mark.parametrize("script", ["vitkd", "dearkd"])
def test_the_moving_average_is_saved(script, teacher, tmp_path, monkeypatch):
    module = importlib.import_module(script)
    forward = module.Distillation.forward
    seen = []

    def spy(self, *inputs):
        seen.append(self.student.norm.bias.detach().clone())
        return forward(self, *inputs)

    monkeypatch.setattr(module.Distillation, "forward", spy)
    main(script, *flags(script, teacher, tmp_path, "--teacher", "none", "--ema-decay", 0.5,
                        "--data-fraction", 0.5))

    # The mean of the weights after each of 10 steps, by its definition
    last = common.load_checkpoint(tmp_path / "last.pth")["model"]["student.norm.bias"]
    after_steps = [*seen[1:], last]
    mean = after_steps[0].double()
    for n, weights in enumerate(after_steps[1:], start=1):
        decay = min(0.5, (1 + n) / (10 + n))
        mean = decay * mean + (1 - decay) * weights
    saved = student(tmp_path)["norm.bias"]
    assert (saved - mean).norm() < 1e-4 * (last - mean).norm()


@pytest.mark.parametrize("module", [vitkd, dearkd])
def test_deit_b_has_its_own_defaults_and_the_rate_follows_the_batch(module):
    def parsed(*words):
        args = module.parse_args(words)
        return args.drop_path, args.ema_decay, args.lr

    assert parsed() == (0.0, 0.0, 1e-3)
    assert parsed("--student", "deit_b") == (0.1, 0.99996, 1e-3)
    assert parsed("--student", "deit_b", "--drop-path", "0", "--ema-decay", "0") == (0, 0, 1e-3)
    assert parsed("--drop-path", "0.3", "--ema-decay", "0.9") == (0.3, 0.9, 1e-3)
    assert parsed("--batch-size", "256")[2] == 5e-4  # the square root of a quarter
    assert parsed("--batch-size", "256", "--lr", "0.1")[2] == 0.1


def test_attndistills_rate_follows_the_batch():
    assert attndistill.parse_args([]).lr == 2.4e-3
    assert attndistill.parse_args(["--batch-size", "1024"]).lr == 1.2e-3
    assert attndistill.parse_args(["--batch-size", "1024", "--lr", "0.1"]).lr == 0.1


@pytest.mark.parametrize("module, number", [
    (vitkd, 38), (attndistill, 25), (dearkd, 52), (eval_knn, 9)])
def test_every_flag_is_explained(module, number, capsys):
    with pytest.raises(SystemExit) as end:
        module.parse_args(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    blocks = re.split(r"\n  (?=--)", text)[1:]
    assert len(blocks) >= number
    for block in blocks:
        assert len(block.split("\n\n")[0].split()) >= 4, block  # the flag, and words about it
    assert "None" not in text and "False" not in text


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_the_teacher_sees_the_mixed_images_of_the_student(amp, teacher, tmp_path, monkeypatch):
    forward = vitkd.Distillation.forward
    seen = []

    def spy(self, *inputs):
        seen.append(inputs)
        return forward(self, *inputs)

    monkeypatch.setattr(vitkd.Distillation, "forward", spy)
    main("vitkd", *flags("vitkd", teacher, tmp_path, "--amp", amp, *RANDOM, "--epochs", 1,
                         "--data-fraction", 0.25))
    frozen = vitkd.load_teacher(str(teacher), num_classes=10, image_size=16)
    mixed = []
    for images, target, (shallow, deep, logits) in seen:
        assert target.shape == (16, 10)
        assert torch.allclose(target.sum(1), torch.ones(16))
        mixed.append(((target > 0.01) & (target < 0.99)).any(1).float().mean())
        with torch.no_grad():
            for found, expected in zip((*shallow, deep, logits), flat_features(frozen, images)):
                tolerance = 0.1 if amp == "bf16" else 1e-2 if amp == "fp16" else 1e-5
                assert (found.float() - expected).norm() < tolerance * expected.norm()
    assert sum(mixed) / len(mixed) > 0.3
    record, = records(tmp_path)
    assert all(0 < record[name] < 10 for name in TERMS["vitkd"])
    assert record["skipped_steps"] == 0


def flat_features(vit, images):
    shallow, deep, logits = vit.features(images)
    return *shallow, deep, logits


@pytest.mark.parametrize("script, more, expected", [
    ("vitkd", "--gamma 0.7 --no-nkd --label-smoothing 0.3 --mask-ratio 0.25 --drop-path 0.2",
     {"gamma": 0.7, "nkd": False, "label_smoothing": 0.3, "vitkd_loss.mask_ratio": 0.25,
      "student.blocks.5.drop_path.p": 0.2}),
    ("attndistill", "--lambda-a 0.7", {"lambda_a": 0.7}),
    ("dearkd", "--alpha 0.25 --beta 3 --label-smoothing 0.3 --soft 2 --hints 1:1 --mhca-blocks 2 "
     "--pos-dropout 0.4 --drop-path 0.2",
     {"alpha": 0.25, "beta": 3.0, "label_smoothing": 0.3, "soft": 2.0,
      "student.blocks.1.attn.pos_dropout": 0.4, "student.blocks.5.drop_path.p": 0.2})])
def test_flags_reach_the_loss_the_student_and_the_images(
        script, more, expected, teacher, tmp_path, monkeypatch):
    seen = {}
    make_transform = common.train_transform

    def remember(*settings):
        seen["images"] = settings
        return make_transform(*settings)

    def first_step(self, images, *others):
        seen["model"] = self
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "train_transform", remember)
    monkeypatch.setattr(importlib.import_module(script).Distillation, "forward", first_step)
    more += " --crop-scale 0.6"
    settings = (16, (0.6, 1.0))
    if script != "attndistill":
        more += " --rand-augment 3 --random-erasing 0.4"
        settings += (3, 0.4)
    with pytest.raises(KeyboardInterrupt):
        main(script, *flags(script, teacher, tmp_path, *more.split()))
    assert seen["images"] == settings
    found = {}
    for path in expected:
        *parts, name = path.split(".")
        found[path] = getattr(seen["model"].get_submodule(".".join(parts)), name)
    assert found == expected
    if script == "dearkd":
        kinds = [type(block.attn) for block in seen["model"].student.blocks]
        assert kinds == [dearkd.ConvAttention] * 2 + [dearkd.Attention] * 4


def test_alpha_and_beta_keep_the_papers_weight_of_an_element(teacher, tmp_path, monkeypatch):
    seen = {}

    def spy(self, student_shallow, student_deep, *teachers):
        seen.update(alpha=self.alpha, beta=self.beta)
        return student_deep.sum() * 0, student_deep.sum() * 0

    monkeypatch.setattr(vitkd.ViTKDLoss, "forward", spy)
    main("vitkd", *flags("vitkd", teacher, tmp_path, "--epochs", 1, "--data-fraction", 0.1))
    scale = 196 * 384 / (16 * 48)  # to 16 tokens of width 48
    assert seen == pytest.approx({"alpha": 3e-5 * scale, "beta": 3e-6 * scale})


@pytest.mark.parametrize("name", ["deit_t", "micro"])
def test_a_teacher_worse_than_the_papers_student_is_warned_of(
        name, tmp_path, monkeypatch, capsys):
    """On 1,000 classes, as ImageNet's. Nothing is known about micro."""
    monkeypatch.setitem(vitkd.SIZES, name, {"dim": 8, "depth": 2, "num_heads": 1})
    arch = {**vitkd.SIZES[name], "image_size": 4, "patch_size": 4, "num_classes": 1000}
    always_0 = vitkd.ViT(**arch)
    always_0.head.bias.data[0] = 9.0
    common.save_checkpoint(tmp_path / "teacher.pth", model=always_0.state_dict(), arch=arch,
                           script="vitkd")
    train, val = common.Shapes(10, 4, seed=1), common.Shapes(10, 4, seed=2)
    train.classes = range(1000)
    monkeypatch.setattr(common, "load_data", lambda *args: (train, val))
    main("vitkd", "--image-size", 4, "--patch-size", 4, "--student", name, "--teacher",
         tmp_path / "teacher.pth", "--epochs", 1, "--batch-size", 10, "--workers", 0, "--amp",
         "off", "--rand-augment", 0, "--out", tmp_path / "out")
    out = capsys.readouterr().out
    # One of ten images is of class 0
    assert f"\nteacher {tmp_path}/teacher.pth: top-1 10.0 % on the validation images" in out
    warning = "\nWARNING: that is less than deit_t reaches without a teacher, 74.42 % (paper)\n"
    assert (warning in out) == (name == "deit_t")
    assert out.count("WARNING") == out.count(warning)


# ------------------------------------------------------------------ wrong input

WRONG = [
    (["--data", "nowhere"], "--data nowhere: .*nowhere/train"),
    (["--data", "differ"], "differ/val has classes that differ/train lacks: wasp"),
    (["--data", "shapes", "--val", "differ"], "--val differ: --data shapes has validation images"),
    (["--teacher", "vgg16"], "unknown teacher vgg16: choose "),
    (["--teacher", "half.pth"], "half.pth is not a file of weights, or damaged"),
    (["--init", "half.pth"], "half.pth is not a file of weights, or damaged"),
    (["--init", "gone.pth"], "gone.pth cannot be read: No such file or directory"),
    (["--image-size", 18], "--image-size 18 is not a multiple of --patch-size 4"),
    (["--batch-size", 15, "--accum", 2], "--batch-size 15 is not divisible by .* = 2"),
    (["--batch-size", 320], "--batch-size 320 is more than the 160 training images"),
    (["--epochs", 0], r"argument --epochs: 0 is not between 1 and 1e\+09"),
    (["--lr", "nan"], r"argument --lr: nan is not between 0 and 1e\+09"),
    (["--epoch", 3], "unrecognized arguments: --epoch 3"),
    (["--out", "/proc/nowhere"], "--out /proc/nowhere: "),
    (["--out", ""], "--out is empty"),
    (["--teacher-weights", ""], "--teacher-weights is empty"),
]

WRONG_FOR_VITKD = [
    (["--data", "one_class"], "the teacher has 10 classes, the data 1: see "),
    (["--val", "nowhere"], "--data .*: .*'nowhere'"),
    (["--teacher", "augreg_b16"], "augreg_b16 has no download: give its file as --teacher-weights"),
    (["--teacher", "deit_s", "--teacher-weights", "half.pth"], "half.pth is not a file of weights"),
    (["--teacher-weights", "half.pth"], ".*student.pth is a file already: leave out "),
    (["--teacher", "deit_s", "--teacher-weights", "page.pth"], "page.pth is a web page"),
    (["--init", "."], r"\. is a folder: give the file in it"),
    (["--init", "code.pth"], r"code.pth holds code \(vitkd.ViT\), which is never run"),
    (["--init", "other.pth"], "other.pth holds no network with a patch_embed.proj.weight"),
    (["--init", "deit.pth"], r"deit.pth belongs to another model: it has other sizes: cls_token "
     r"\(1, 1, 8\) instead of \(1, 1, 96\)"),
    (["--patch-size", 8], "teacher and student need the same patch size: add --patch-size 4"),
    (["--batch-size", "x"], "argument --batch-size: invalid positive_int value: 'x'"),
    (["--epochs"], "argument --epochs: expected one argument"),
    (["extra"], "unrecognized arguments: extra"),
    (["--student", "vit_x"], "argument --student: invalid choice: 'vit_x'"),
    (["--amp", "fp8"], "argument --amp: invalid choice: 'fp8'"),
    (["--rand-augment", 11], "argument --rand-augment: invalid choice: 11"),
    (["--mask-ratio", 0], "--mask-ratio 0 leaves nothing to generate"),
    (["--label-smoothing", 2], "argument --label-smoothing: 2.0 is not between 0 and 1"),
    (["--workers", -1], "argument --workers: -1 is not between 0 and"),
    (["--log-every", 0], "argument --log-every: 0 is not between 1 and"),
    (["--data-fraction", 1.5], "argument --data-fraction: 1.5 is not between 0 and 1"),
    (["--ema-decay", 1.5], "argument --ema-decay: 1.5 is not between 0 and 1"),
    (["--out", "page.pth"], "--out page.pth: "),
]


@pytest.fixture(scope="module")
def wrong_files(teacher, photos, tmp_path_factory):
    """A folder with files and folders that cannot be used."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "half.pth").write_bytes(teacher.read_bytes()[:500])
    (folder / "page.pth").write_bytes(b"<html>")
    small = vitkd.ViT(16, 4, 8, 6, 1)
    torch.save(small, folder / "code.pth")
    torch.save({"model": small.state_dict()}, folder / "deit.pth")
    torch.save({"model": {"fc.weight": torch.zeros(1)}}, folder / "other.pth")
    shutil.copytree(photos, folder / "differ")
    (folder / "differ" / "val" / "bee").rename(folder / "differ" / "val" / "wasp")
    for split in ("train", "val"):
        shutil.copytree(photos / split / "ant", folder / "one_class" / split / "ant")
    return folder


@pytest.mark.parametrize("script, more, message", [
    *[(script, *case) for case in WRONG for script in SCRIPTS],
    *[("vitkd", *case) for case in WRONG_FOR_VITKD],
    *[(script, ["--teacher", "none", "--teacher-weights", "x.pth"],
       "--teacher-weights needs the name of its --teacher") for script in ("vitkd", "dearkd")]])
def test_wrong_input_is_one_line(
        script, more, message, teacher, wrong_files, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(wrong_files)
    monkeypatch.setattr(sys, "argv", [f"here/{script}.py"])
    with pytest.raises(SystemExit, match=rf"^{script}\.py: error: {message}") as end:
        main(script, *flags(script, teacher, tmp_path / "out", *more))
    # Python prints this text as the last line on stderr, and its exit status is 1
    assert isinstance(end.value.code, str)
    assert len(end.value.code.splitlines()) == 1
    assert "error" not in capfd.readouterr().err
    assert not (tmp_path / "out" / "student.pth").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_bug_keeps_its_traceback(script, monkeypatch):
    """Only wrong input becomes one line."""
    module = importlib.import_module(script)

    def train(args, device):
        raise KeyError("a bug")

    monkeypatch.setattr(module, "train", train)
    with pytest.raises(KeyError, match="a bug"):
        main(script, "--data", "shapes")


# ------------------------------------------------------------------ long tests


@pytest.mark.slow
@pytest.mark.parametrize("demo", [*(f"{script} --demo" for script in SCRIPTS),
                                  "dearkd --demo-data-free"])
def test_demo(demo):
    script, flag = demo.split()
    out, _ = run(f"{script}.py", flag)
    table = out.rpartition("\n\n")[2].splitlines()  # the teacher, a baseline, ..., the method
    numbers = [float(line.strip(" %").split()[-1]) for line in table]
    assert numbers[-1] > 1.05 * numbers[1]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_two_compiled_processes_train_as_one_that_is_not(script, teacher, tmp_path):
    more = ["--epochs", 2, "--stage1-epochs", 1] if script == "dearkd" else []
    main(script, *one_step(script, teacher, tmp_path / "one", *more))
    run("torchrun", "--nproc_per_node", 2, f"{script}.py",
        *one_step(script, teacher, tmp_path / "two", "--accum", 2, "--compile", *more))
    one, two = (first_moment(tmp_path / out) for out in ("one", "two"))
    assert (two - one).norm() <= 1e-3 * one.norm()


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_nothing_recompiles(script, teacher, tmp_path):
    torch._dynamo.reset()
    own = ["--stage1-epochs", 3] if script == "dearkd" else []  # stage 2 is another graph
    with torch._dynamo.config.patch(error_on_recompile=True):
        main(script, *flags(script, teacher, tmp_path, "--compile", "--amp", "bf16", "--epochs", 3,
                            *own))
    assert len(records(tmp_path)) == 3
