"""The GPU path. Without a GPU on fake CUDA tensors; with one, `pytest tests/test_gpu.py` runs it.

Fake tensors have a device and a shape but no values. So a tensor left on the CPU raises an error,
and so does an operation that reads a value, which on a GPU waits for it.
"""

import pytest
import torch
from bench import make_models
from helpers import SCRIPTS, flags, main, records, run, student
from torch._subclasses.fake_tensor import FakeTensorMode

import common


@pytest.fixture
def fake():
    """A mode in which .to("cuda") works without a GPU."""
    mode = FakeTensorMode()
    try:
        with mode:
            mode.from_tensor(torch.zeros(1)).to("cuda")
    except RuntimeError:
        pytest.skip("this torch needs a GPU, even for fake CUDA tensors")
    return mode


def to_fake_cuda(module, fake):
    """Do what module.to("cuda") does."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            moved = fake.from_tensor(parameter).detach().to("cuda")
            setattr(part, name, torch.nn.Parameter(moved, parameter.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, fake.from_tensor(buffer).to("cuda"))


@pytest.mark.parametrize("method, teacher, own", [
    ("vitkd", "deit_t", {}), ("dearkd", "resnet18", {}),
    ("attndistill", "vit_t", {"num_registers": 4, "rope": True})])  # as DINOv3's
def test_a_step_stays_on_the_gpu_and_waits_for_no_value(method, teacher, own, fake):
    model, guide = make_models(method, "micro", teacher, 32, 8, **own)
    batch = [torch.randn(4, 3, 32, 32)]
    if method != "attndistill":  # it reads no labels
        batch.append(torch.rand(4, 1000))
    with fake:
        to_fake_cuda(model, fake)
        to_fake_cuda(guide, fake)
        batch = [fake.from_tensor(tensor).to("cuda") for tensor in batch]
        optimizer = torch.optim.AdamW(common.parameter_groups(model, 0.05), fused=True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        torch.set_autocast_enabled("cuda", True)  # torch.autocast would look for a real GPU
        try:
            with torch.no_grad():
                look = getattr(guide, "class_token_and_attention", None) or guide.features
                features = look(batch[0])
            losses = model(*batch, features)
        finally:
            torch.set_autocast_enabled("cuda", False)
        assert len(losses) >= 2
        for name, loss in losses.items():
            assert (loss.device.type, loss.dtype, loss.ndim) == ("cuda", torch.float32, 0), name
        for parameter in model.parameters():  # backward() needs a real GPU, even for fake tensors
            parameter.grad = torch.zeros_like(parameter)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()


# ------------------------------------------------------------------ on a real GPU

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@needs_gpu
@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("more", ["--amp bf16", "--amp fp16", "--amp bf16 --compile",
                                  "--amp fp16 --compile", "--amp off"])
def test_training_on_a_gpu(script, more, teacher, tmp_path, capsys):
    main(script, *flags(script, teacher, tmp_path, "--epochs", 3, *more.split()))
    assert torch.cuda.get_device_name() in capsys.readouterr().out
    log = records(tmp_path)
    assert len(log) == 3 and log[2]["skipped_steps"] == 0
    assert all(value.isfinite().all() for value in student(tmp_path).values())
    exported = torch.load(tmp_path / "student.pth", weights_only=True)["model"]
    assert {value.device.type for value in exported.values()} == {"cpu"}


@needs_gpu
@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("more", ["", "--compile"])
def test_resume_and_torchrun_on_a_gpu(script, more, teacher, tmp_path):
    words = flags(script, teacher, tmp_path, "--epochs", 2, "--amp", "bf16", "--workers", 2,
                  "--accum", 2, *more.split())
    if script != "attndistill":
        words += "--ema-decay 0.9 --mixup 0.8 --cutmix 1".split()
    if script == "dearkd":
        words += ["--stage1-epochs", "1"]
    # Two GPUs, if there are so many, exchange gradients
    run("torchrun", "--nproc_per_node", min(2, torch.cuda.device_count()), f"{script}.py", *words)
    last = common.load_checkpoint(tmp_path / "last.pth")
    last["log"] = last["log"][:1]  # as if the second epoch were still to come
    common.save_checkpoint(tmp_path / "last.pth", **last)
    main(script, *words, "--resume")
    assert len(records(tmp_path)) == 2
