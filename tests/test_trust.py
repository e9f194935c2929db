"""Damage done on purpose: kills, full disks, lost ranks, rotten files, numbers that go bad."""

import ctypes
import io
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    DATA,
    MICRO,
    ROOT,
    a_teacher,
    children,
    command_of,
    environment,
    finish,
    free_port,
    in_process,
    make_photos,
    run,
    start,
    start_ranks,
    torchrun,
    wait_for,
)
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import attndistill
import common
import dearkd
import vitkd

SHAPES = [*MICRO, "--data", "shapes", "--data-fraction", "0.02", "--teacher", "none",
          "--lr", "1e-3"]


def lines_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def same(a, b, name="student.pth"):
    a, b = (common.load_checkpoint(folder / name)["model"] for folder in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ------------------------------------------------------------------ kill -9, a full disk


@pytest.mark.parametrize("script, kills, epochs", [("vitkd", 2, 10), *(
    pytest.param(script, 30, epochs, marks=pytest.mark.slow)
    for script, epochs in (("vitkd", 60), ("attndistill", 40), ("dearkd", 40)))])
def test_kill_anything_any_time(script, kills, epochs, tmp_path):
    """SIGKILL at random moments, with --slow a good part of them while a checkpoint is written (22
    MB of student, 65 MB of last.pth after every two steps); --resume auto, to the same end. At last
    the log is damaged, too, as power losses leave it."""
    short = kills < 30
    student = "micro" if short else "vit_t" if script == "attndistill" else "deit_t"
    command = command_of(script, tmp_path, "--student", student, "--batch-size", 40, "--epochs",
                         epochs)
    if short:  # images read by workers, all the random numbers of the recipe
        command += ["--data", make_photos(tmp_path / "photos"), "--data-fraction", 1,
                    "--batch-size", 8, "--ema", 0.9, "--drop-path", 0.1]
    run(*command, "--out", tmp_path / "whole", timeout=900)
    folder, r, while_writing = tmp_path / "killed", random.Random(kills), 0
    for _ in range(kills):
        process = start(*command, "--resume", "auto", "--out", folder)
        log = folder / "log.jsonl"
        before = log.read_text().count("\n") if log.exists() else 0
        while process.poll() is None and (
                not log.exists() or log.read_text().count("\n") == before):
            time.sleep(0.01)  # until it has begun an epoch, or was through already
        time.sleep(r.uniform(0, 0.5))
        process.kill()
        _, out, err = finish(process)
        temporary = [path.name for path in folder.iterdir() if "tmp" in path.name]
        assert len(temporary) <= 1, (temporary, out, err)
        while_writing += len(temporary)
        if (folder / "last.pth").exists():
            common.load_checkpoint(folder / "last.pth")
    with open(folder / "log.jsonl", "ab") as log:
        log.write(b"\0" * 50 + b"\n\xff{]\n5\n" + b'{"epoch": 1000}\n{"epo')
    run(*command, "--resume", "auto", "--out", folder, timeout=900)
    for name in ("student.pth", "best.pth", "last.pth"):
        assert same(tmp_path / "whole", folder, name)
    timing = {"seconds", "images_per_second", "data_wait", "peak_memory_gb"}
    whole, killed = ([{k: v for k, v in line.items() if k not in timing} for line in lines_of(path)]
                     for path in (tmp_path / "whole", folder))
    assert killed == whole and [line["epoch"] for line in killed] == list(range(1, epochs + 1))
    assert not [path for path in folder.iterdir() if "tmp" in path.name]
    assert short or while_writing >= 3


def test_a_full_disk_is_one_line_and_keeps_the_last_good_checkpoint(tmp_path):
    """A limit on the size of files, between that of student.pth and of last.pth."""
    command = ["vitkd.py", *SHAPES, "--epochs", 15, "--out", tmp_path / "run"]
    process = start(*command)
    full = start(*command[:-1], tmp_path / "new")
    resource.prlimit(full.pid, resource.RLIMIT_FSIZE, (500, 500))
    last = tmp_path / "run" / "last.pth"
    wait_for(last.exists, process)
    process.kill()
    finish(process)
    epoch, size = common.load_checkpoint(last)["epoch"], last.stat().st_size
    assert epoch < 15
    process = start(*command, "--resume")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size // 2, size // 2))
    status, _, err = finish(process)
    line, = err.splitlines()
    assert status == 1 and "disk full?" in line
    assert line.startswith(f"vitkd.py: error: cannot write {last} (")
    assert common.load_checkpoint(last)["epoch"] == epoch
    assert not [path for path in last.parent.iterdir() if "tmp" in path.name]
    run(*command, "--resume")
    assert [line["epoch"] for line in lines_of(tmp_path / "run")] == list(range(1, 16))

    status, _, err = finish(full)
    line, = err.splitlines()
    assert status == 1 and "cannot write" in line and "args.json (" in line
    assert [path.name for path in (tmp_path / "new").iterdir()] == [".lock"]


def test_what_is_not_the_same_run_is_not_resumed(tmp_path, capsys, monkeypatch):
    """Another file in the place of one, a teacher trained anew; a log without its checkpoint is
    not overwritten, and neither is what another process still writes."""
    data = make_photos(tmp_path / "photos", counts=(("train", 8), ("val", 2)))
    teacher = a_teacher("attndistill", tmp_path)
    command = ["attndistill.py", *command_of("attndistill", tmp_path)[1:], "--data", data,
               "--data-fraction", 1, "--student", "micro", "--batch-size", 8, "--out",
               tmp_path / "run", "--resume", "auto", "--epochs", 400, "--eval-every", 1]
    process = start(*command)
    log, last = tmp_path / "run" / "log.jsonl", tmp_path / "run" / "last.pth"
    wait_for(last.exists, process)
    _, err = run(*command, status=2)
    assert "another run writes to --out" in err and len(err.splitlines()) == 1
    wait_for(lambda: log.read_text().count("\n") > 2, process)
    process.send_signal(signal.SIGTERM)
    finish(process)

    def refusal():
        status, _, err = in_process(attndistill, capsys, monkeypatch, *command[1:])
        assert status == 2 and len(err.splitlines()) == 1, err
        return err

    file = data / "train" / "bee" / "003.jpg"
    file.rename(file.with_name("x.jpg"))
    err = refusal()
    assert re.search(r"settings: --images 24 \+ 6, names' checksum (\w+) -> 24 \+ 6, .*(?!\1)", err)
    file.with_name("x.jpg").rename(file)
    torch.manual_seed(7)
    a_teacher("attndistill", tmp_path)
    err = refusal()
    assert "settings: --teacher-checksum " in err and teacher.exists()
    last.rename(tmp_path / "elsewhere")
    text = log.read_text()
    err = refusal()
    assert "but there is no " in err and log.read_text() == text


# ------------------------------------------------------------------ ranks and nodes


def test_an_elastic_restart_finishes_the_run(tmp_path):
    """torchrun --max-restarts 2: one rank is killed, all are started again, --resume auto. Without
    that variable the ranks of the second start may find the addresses of the first."""
    command = [*SHAPES, "--epochs", 6, "--resume", "auto", "--out"]
    words = list(torchrun(2, "vitkd.py", *command, tmp_path / "run"))
    process = start(*words[:1], "--max-restarts", 2, *words[1:],
                    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1)
    wait_for((tmp_path / "run" / "last.pth").exists, process)
    os.kill(max(children(process.pid)), signal.SIGKILL)
    code, _, err = finish(process)
    assert code == 0, err[-3000:]
    assert [line["epoch"] for line in lines_of(tmp_path / "run")] == list(range(1, 7))
    run("vitkd.py", *command, tmp_path / "whole", processes=2)
    assert same(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("script", ["vitkd", "attndistill", "dearkd", "synthesize", "eval_knn"])
def test_ranks_leave_in_time_with_the_signals_status(script, tmp_path):
    """Both ranks are started by hand, so that their own exit statuses are seen. In training it is
    enough that one of them is signalled: it tells the other."""
    data = make_photos(tmp_path / "photos", counts=(("train", 400), ("val", 4)))
    if script == "synthesize":
        command = ["dearkd.py", "--synthesize", tmp_path / "made", "--teacher",
                   a_teacher("dearkd", tmp_path), "--image-size", 16, "--images-per-class", 200,
                   "--images-per-batch", 32, "--steps", 20]
    elif script == "eval_knn":
        command = ["eval_knn.py", "--weights", a_teacher("attndistill", tmp_path), "--data", data,
                   "--workers", 1, "--micro-batch", 8]
    else:
        command = command_of(script, tmp_path, "--student", "micro", "--batch-size", 16,
                             "--epochs", 1000, "--out", tmp_path / "run")
    ranks = start_ranks(command, command)
    if script == "synthesize":
        wait_for(lambda: list((tmp_path / "made").glob("train/*/*.png")), ranks[0])
    elif script == "eval_knn":  # when a rank has workers, features are being computed
        wait_for(lambda: all(children(rank.pid) for rank in ranks), ranks[0])
    else:
        wait_for((tmp_path / "run" / "last.pth").exists, ranks[0])
    for rank in ranks[script in ("vitkd", "attndistill", "dearkd"):]:
        for _ in range(2):  # as a scheduler and torchrun do
            rank.send_signal(signal.SIGTERM)
    ends = [finish(rank, timeout=30) for rank in ranks]
    assert [code for code, *_ in ends] == [143, 143], ends
    assert re.fullmatch(r"\w+\.py: stopped by SIGTERM .*\n", ends[0][2])
    if script == "eval_knn":  # not in the midst of starting a worker
        assert "while computing features" in ends[0][2]


def test_ranks_that_see_other_files_do_not_start(tmp_path):
    """One node's copy has another file in place of one: as many, but not the same."""
    commands = []
    for name in "ab":
        data = make_photos(tmp_path / name, counts=(("train", 8), ("val", 2)))
        commands.append([*command_of("vitkd", tmp_path), "--data", data, "--data-fraction", 1,
                         "--student", "micro", "--batch-size", 4, "--out", tmp_path / "run"])
    (data / "train" / "bee" / "003.jpg").rename(data / "train" / "bee" / "x.jpg")
    ends = [finish(rank) for rank in start_ranks(*commands)]
    assert [code for code, *_ in ends] == [2, 2]
    assert "the processes do not have the same images in --data and --val: 24 + 6" in ends[0][2]
    assert len(ends[0][2].splitlines()) == 1 and not (tmp_path / "run").exists()


def test_ranks_with_other_settings_or_another_folder_do_not_start(tmp_path):
    command = ["vitkd.py", *SHAPES, "--epochs", 1, "--out", tmp_path / "a"]
    ends = [finish(rank) for rank in start_ranks(command, [*command, "--seed", 1])]
    assert [code for code, *_ in ends] == [2, 2]
    assert "settings differ from the first one's: , --seed 0 -> 1" in ends[0][2]
    run(*command)
    elsewhere = [*command[:-1], tmp_path / "b"]
    ends = [finish(rank) for rank in start_ranks([*command, "--resume"], [*elsewhere, "--resume"])]
    assert [code for code, *_ in ends] == [2, 2]
    assert "is not the same folder for all processes" in ends[0][2]
    assert len(ends[0][2].splitlines()) == 1


def test_two_nodes_and_then_one_process(tmp_path):
    """Two torchrun agents train like one process; and a run of theirs that is killed goes on in one
    process, with the same batches and learning rates."""
    data = make_photos(tmp_path / "photos", counts=(("train", 64), ("val", 13)))
    flags = ["vitkd.py", *MICRO, "--data", data, "--teacher", "none", "--mixup", 0, "--cutmix", 0,
             "--amp", "off", "--lr", 1e-4, "--epochs", 2]
    run(*flags, "--out", tmp_path / "one")

    def two_nodes(*more):
        port = free_port()
        return [start("torchrun", "--nnodes", 2, "--nproc_per_node", 1, "--rdzv_backend", "c10d",
                      "--rdzv_id", "test", "--rdzv_endpoint", f"localhost:{port}", *flags, *more)
                for _ in range(2)]

    for agent in two_nodes("--out", tmp_path / "two"):
        code, _, err = finish(agent)
        assert code == 0, err[-3000:]
    agents = two_nodes("--out", tmp_path / "cut")
    wait_for((tmp_path / "cut" / "last.pth").exists, agents[0])
    for pid in [pid for agent in agents for pid in children(agent.pid)]:
        os.kill(pid, signal.SIGKILL)
    for agent in agents:
        assert finish(agent)[0] != 0
    run(*flags, "--out", tmp_path / "cut", "--resume")
    torch.manual_seed(0)
    begin = vitkd.ViT(16, 4, 96, 6, 3, 3).state_dict()
    one = common.load_checkpoint(tmp_path / "one" / "student.pth")["model"]
    for name in ("two", "cut"):
        other = common.load_checkpoint(tmp_path / name / "student.pth")["model"]
        for key, value in one.items():
            moved = (value - begin[key]).norm()
            assert (value - other[key]).norm() <= 0.03 * moved + 1e-6, (name, key)
        for a, b in zip(lines_of(tmp_path / "one"), lines_of(tmp_path / name), strict=True):
            assert a["lr"] == b["lr"] and a["ce"] == pytest.approx(b["ce"], rel=1e-3)
            assert a["top1"] == pytest.approx(b["top1"], abs=6)


# ------------------------------------------------------------------ rotten images


def jpegs(count):
    """Bytes of real JPEG files, or of made ones where the real ones are not at hand."""
    file = DATA / "cifar10_val.zip"
    if file.exists():
        with zipfile.ZipFile(file) as archive:
            names = [name for name in archive.namelist() if name.endswith(".jpg")]
            step = len(names) // count
            return [archive.read(name) for name in names[::step][:count]]
    rng, made = np.random.default_rng(0), []
    for _ in range(count):
        with io.BytesIO() as file:
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(file, "JPEG")
            made.append(file.getvalue())
    return made


def bomb():
    """A PNG whose header says 30,000 x 30,000."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header
            + struct.pack(">I", zlib.crc32(header)))


def lose_roots_right_to_read_everything():
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP: lost at exec


class Look(Dataset):
    """Item i: MiB that this process has to itself, after a look at the i-th tenth of samples."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return 10

    def __getitem__(self, i):
        tenth = len(self.samples) // 10
        for j in range(i * tenth, (i + 1) * tenth):
            self.samples[j]
        own, = re.findall(r"Private_Dirty: +(\d+) kB", Path("/proc/self/smaps_rollup").read_text())
        return int(own) / 1024


def test_workers_share_the_list_of_files():
    """A list of tuples, ImageFolder's, is copied by every worker that reads it; two arrays not."""
    samples = [(f"/imagenet/train/n{i % 1000:08d}/n{i:08d}.JPEG", i % 1000) for i in range(200_000)]
    grown = []
    for look in (Look(samples), Look(common.Samples(samples))):
        own = list(DataLoader(look, batch_size=None, num_workers=1, multiprocessing_context="fork"))
        grown.append(own[-1] - own[0])
    assert grown[0] > 10 and grown[1] < 2, grown
    ours = common.Samples([*samples[:3], ("/sch\udcf6n/\u00e9.jpg", 7)])
    assert len(ours) == 4 and [ours[i] for i in (2, 3)] == [samples[2], (
        "/sch\udcf6n/\u00e9.jpg", 7)]


def test_colours_are_right_in_every_format(tmp_path):
    def colour(image, name, **keywords):  # of the first pixel, as it is read
        image.save(tmp_path / name, **keywords)
        opened = common.open_rgb(tmp_path / name)
        assert opened.mode == "RGB" and opened.size == image.size
        return list(opened.getpixel((0, 0)))

    assert colour(Image.new("RGB", (8, 8), (200, 30, 90)), "rgb.png") == [200, 30, 90]
    cmyk = colour(Image.new("RGB", (8, 8), (250, 10, 10)).convert("CMYK"), "cmyk.jpg")
    assert np.abs(np.array(cmyk) - [250, 10, 10]).max() <= 6
    palette = Image.new("RGB", (8, 8), (200, 30, 90)).quantize(4)
    assert colour(palette, "palette.png", transparency=bytes([255, 0, 9, 0])) == [200, 30, 90]
    assert colour(Image.new("LA", (8, 8), (77, 128)), "grey_alpha.png") == [77] * 3
    deep = Image.fromarray(np.full((8, 8), 0x8040, np.uint16))
    assert colour(deep, "deep.png") == [0x80] * 3  # not cut off at 255
    assert colour(Image.new("L", (1, 1), 9), "tiny.png") == [9] * 3
    assert colour(Image.new("1", (8, 8), 1), "bits.png") == [255] * 3


def test_a_rotten_folder_is_used_as_far_as_it_can_be_read(tmp_path):
    """2,000 JPEGs and what people find among theirs: bad files are named once and counted once an
    epoch, hidden and empty folders don't disturb, nothing hangs."""
    images = jpegs(2000)
    for split, part in (("train", images), ("val", images[:60])):
        for i, data in enumerate(part):
            folder = tmp_path / "data" / split / f"class{i % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{i:05d}.jpg").write_bytes(data)
        (tmp_path / "data" / split / "class2").mkdir()  # empty
        (tmp_path / "data" / split / ".cache").mkdir()
    train = tmp_path / "data" / "train" / "class0"
    (train / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    bad = {"zero.jpg": b"", "cut.jpg": images[0][:300], "cut2.jpg": images[1][:len(images[1]) // 2],
           "text.jpg": b"no image at all\n", "bomb.png": bomb()}
    for name, data in bad.items():
        (train / name).write_bytes(data)
    (train / "link.jpg").symlink_to(tmp_path / "nowhere.jpg")
    bad["link.jpg"] = None
    Image.new("L", (1, 60_000)).save(train / "thin.png")  # 256 px wide it would be 12 GB
    bad["thin.png"] = None
    (train / "locked.jpg").write_bytes(images[0])
    (train / "locked.jpg").chmod(0)
    bad["locked.jpg"] = None
    Image.new("L", (1, 1), 9).save(train / "one.png")
    Image.new("RGB", (32, 32), (9, 99, 199)).convert("CMYK").save(train / "cmyk.jpg")
    palette = Image.new("RGB", (32, 32), (9, 99, 199)).quantize(4)
    palette.save(train / "palette.png", transparency=bytes([0, 255, 9, 0]))
    Image.fromarray(np.full((32, 32), 40_000, np.uint16)).save(train / "deep.png")
    command = [sys.executable, "vitkd.py", *MICRO, "--data", tmp_path / "data", "--teacher", "none",
               "--epochs", "2", "--batch-size", "100", "--eval-every", "2", "--out",
               tmp_path / "run"]
    err = subprocess.run(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True,
                         check=True, preexec_fn=lose_roots_right_to_read_everything).stderr
    named = re.findall(r"unreadable image, replaced by the next: \S*/(\S+) \(", err)
    assert sorted(named) == sorted(bad)
    assert [line["unreadable"] for line in lines_of(tmp_path / "run")] == 2 * [len(bad)]
    assert err.count("no images in") == 2 and "of 1 classes: class2" in err
    assert len(err.splitlines()) == len(bad) + 2, err


def test_a_thousand_mutated_jpegs(tmp_path):
    """Workers survive what a decoder makes of them: an image, or an unreadable file."""
    (tmp_path / "train" / "a").mkdir(parents=True)
    r = random.Random(0)
    for i, data in enumerate(jpegs(1000)):
        data = bytearray(data)
        for _ in range(r.choice([1, 2, 10, 50])):
            data[r.randrange(len(data))] = r.randrange(256)
        if r.random() < 0.2:
            del data[r.randrange(len(data)):]
        (tmp_path / "train" / "a" / f"{i:04d}.jpg").write_bytes(data)
    base = common.ClassFolders(tmp_path / "train")
    data = common.Photos(base, common.train_transform(16))
    count = unreadable = 0
    for images, labels, skipped in DataLoader(data, 50, num_workers=2):
        assert images.shape == (50, 3, 16, 16) and images.dtype == torch.uint8
        count, unreadable = count + len(labels), unreadable + int((skipped > 0).sum())
    assert count == 1000 and 50 < unreadable < 950
    assert int(data.named.sum()) == unreadable


def test_a_worker_that_dies_is_one_line(tmp_path):
    data = make_photos(tmp_path / "photos", counts=(("train", 40), ("val", 4)))
    process = start(*command_of("vitkd", tmp_path), "--data", data, "--data-fraction", 1,
                    "--student", "micro", "--batch-size", 4, "--out", tmp_path / "run")
    wait_for((tmp_path / "run" / "last.pth").exists, process)
    os.kill(children(process.pid)[0], signal.SIGKILL)  # as the kernel does when memory is short
    code, _, err = finish(process)
    assert code == 1 and "the processes that read images fail" in err
    assert len(err.splitlines()) == 1


def test_a_worker_that_hangs_is_one_line(tmp_path, capsys, monkeypatch):
    """On a file that nobody ever writes to, as on a disk that is gone."""
    monkeypatch.setattr(common, "WORKER_TIMEOUT", 3)
    make_photos(tmp_path / "photos")
    os.mkfifo(tmp_path / "photos" / "train" / "ant" / "pipe.jpg")
    code, _, err = in_process(vitkd, capsys, monkeypatch, *command_of("vitkd", tmp_path)[1:],
                              "--data", tmp_path / "photos", "--data-fraction", 1, "--student",
                              "micro", "--workers", 1, "--out", tmp_path / "run")
    assert code == 1 and "timed out after 3 seconds" in err
    assert len(err.splitlines()) == 1
    for worker in multiprocessing.active_children():
        worker.join(5)
        assert not worker.is_alive()


# ------------------------------------------------------------------ rotten weights, bad numbers


def test_rotten_weights_are_refused_or_right(tmp_path):
    out, _ = run(ROOT / "tests" / "rotten_weights.py", tmp_path, 200)
    result = json.loads(out.splitlines()[-1])
    counts = result["refused, loaded"]
    assert sum(map(sum, counts.values())) == 200 and result["grown_gib"] < 0.5
    assert all(counts[kind][1] == 0 for kind in
               ("truncated", "swapped", "nan", "nested", "code", "absurd"))
    assert counts["flipped"][1] <= 2  # bits that no weight depends on


def test_a_flipped_bit_in_last_pth_is_noticed(tmp_path):
    common.save_checkpoint(tmp_path / "last.pth", weights=torch.ones(1000))
    data = bytearray((tmp_path / "last.pth").read_bytes())
    data[data.index(np.ones(8, np.float32).tobytes()) + 100] ^= 1
    (tmp_path / "last.pth").write_bytes(data)
    assert not torch.equal(torch.load(tmp_path / "last.pth", weights_only=True)["weights"],
                           torch.ones(1000))  # torch itself does not notice
    with pytest.raises(common.Abort, match="does not fit its checksum"):
        common.load_checkpoint(tmp_path / "last.pth")


def test_a_teacher_that_yields_nan_ends_the_run(tmp_path):
    arch = {"image_size": 16, "patch_size": 4, "dim": 24, "depth": 2, "num_heads": 2,
            "num_classes": 10}
    state = vitkd.ViT(**arch).state_dict()
    state["head.weight"] *= 3e38  # finite still; its logits are not
    state["norm.weight"] *= 1e6
    common.save_checkpoint(tmp_path / "t.pth", model=state, arch=arch, script="vitkd", top1=None)
    _, err = run("vitkd.py", *SHAPES, "--teacher", tmp_path / "t.pth", "--epochs", 9, "--out",
                 tmp_path / "run", status=1)
    line, = [line for line in err.splitlines() if "warning" not in line.lower()]
    assert "the loss was not finite ten steps in a row" in line


def test_gradients_that_do_not_fit_into_fp16(tmp_path):
    """Finite losses, gradients beyond 65504: both ranks skip the same steps, until the scale has
    come down; where it never does, ten steps at scale 1 end the run."""
    flags = ["attndistill.py", *command_of("attndistill", tmp_path)[1:], "--student", "micro",
             "--data-fraction", 0.005, "--batch-size", 4, "--amp", "fp16", "--epochs", 6,
             "--clip-grad", 1, "--lambda-a"]
    run(*flags, 3e4, "--out", tmp_path / "run", processes=2)
    skipped = [line["skipped_steps"] for line in lines_of(tmp_path / "run")]
    assert skipped[0] > 2 and sum(skipped) < 20 and skipped[-1] == 0, skipped
    assert all(v.isfinite().all() for v in common.load_checkpoint(
        tmp_path / "run" / "last.pth")["model"].values())
    _, err = run(*flags, 1e12, "--out", tmp_path / "never", processes=2, status=1)
    line, = [line for line in err.splitlines() if line.startswith("attndistill.py: error")]
    assert "the loss was not finite ten steps in a row" in line


def test_nan_does_not_stay_in_a_cnns_batch_norm(tmp_path, capsys, monkeypatch):
    class Epoch(common.Epoch):
        def batches(self):
            for step, (images, *rest) in enumerate(super().batches()):
                yield (images * torch.nan if self.epoch == 0 and step == 2 else images), *rest

    monkeypatch.setattr(common, "Epoch", Epoch)
    status, _, err = in_process(
        dearkd, capsys, monkeypatch, "--train-teacher", "cifar_resnet20", "--data", "shapes",
        "--data-fraction", 0.02, "--image-size", 16, "--batch-size", 16, "--epochs", 2, "--out",
        tmp_path / "run")
    assert status == 0, err
    assert [line["skipped_steps"] for line in lines_of(tmp_path / "run")] == [1, 0]
    cnn = common.load_checkpoint(tmp_path / "run" / "student.pth")["model"]
    assert all(v.isfinite().all() for v in cnn.values())
    assert (cnn["layer1.0.bn1.running_mean"] != 0).all()


# ------------------------------------------------------------------ a long run


@pytest.mark.slow
@pytest.mark.parametrize("script", ["vitkd", "attndistill", "dearkd"])
def test_soak(script, tmp_path):
    """2,000 steps: memory and file descriptors stay flat, the same workers live to the end."""
    data = make_photos(tmp_path / "photos", [f"c{i}" for i in range(10)],
                       (("train", 5), ("val", 2)))
    process = start(*command_of(script, tmp_path), "--data-fraction", 1, "--student", "micro",
                    "--data", data, "--batch-size", 5, "--epochs", 200, "--eval-every", 50,
                    *(["--stage1-epochs", 20] if script == "dearkd" else []), "--out",
                    tmp_path / "run")
    proc, seen = Path("/proc", str(process.pid)), []
    log = tmp_path / "run" / "log.jsonl"
    while process.poll() is None:
        time.sleep(0.2)
        try:
            epoch = log.read_text().count("\n")
            workers = sorted(children(process.pid))
            memory = [int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                      * resource.getpagesize() / 2**20 for pid in (process.pid, *workers[:2])]
            seen.append((epoch, memory, len(list((proc / "fd").iterdir())), tuple(workers)))
        except OSError:
            continue
    code, _, err = finish(process)
    assert code == 0, err
    warm = [row for row in seen if 50 <= row[0] < 199 and row[0] % 50 > 1]
    early, late = ([row for row in warm if low <= row[0] < high]
                   for low, high in ((52, 80), (160, 199)))
    assert len(early) > 5 and len(late) > 5
    for i in range(3):  # the script and its two lasting workers
        growth = max(row[1][i] for row in late) - max(row[1][i] for row in early)
        assert growth < 10, (i, growth)  # MiB
    # The least: at times a log or checkpoint is being written.
    assert min(row[2] for row in late) <= min(row[2] for row in early)
    workers = set(early[0][3])
    assert len(workers) >= 2 and all(workers <= set(row[3]) for row in (*early, *late))
    assert len(lines_of(tmp_path / "run")) == 200
