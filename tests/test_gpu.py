"""The GPU path. Without a GPU on fake CUDA tensors; with one, `pytest tests/test_gpu.py` runs it.

Fake tensors have a device and a shape but no values. So a tensor left on the CPU raises an error,
and so does an operation that reads a value, which on a GPU waits for it.
"""

import pytest
import torch
from bench import make_models
from conftest import run
from test_runs import SCRIPTS, flags, main, records, student
from torch._subclasses.fake_tensor import FakeTensorMode

import common


@pytest.mark.parametrize("method, teacher, own", [
    ("vitkd", "deit_t", {}), ("dearkd", "resnet18", {}),
    ("attndistill", "vit_t", {"num_registers": 4, "rope": True})])  # as DINOv3's
def test_a_step_on_fake_cuda_tensors(method, teacher, own):
    model, guide = make_models(method, "micro", teacher, 32, 8, **own)
    target = [] if method == "attndistill" else [torch.rand(4, 1000)]
    with FakeTensorMode() as fake:
        for module in [*model.modules(), *guide.modules()]:  # .to("cuda") of fake tensors
            for name, p in module.named_parameters(recurse=False):
                fake_p = fake.from_tensor(p).detach().to("cuda")
                setattr(module, name, torch.nn.Parameter(fake_p, p.requires_grad))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, fake.from_tensor(buffer).to("cuda"))
        optimizer = torch.optim.AdamW(common.parameter_groups(model, 0.05), fused=True)
        batch = [fake.from_tensor(x).to("cuda") for x in (torch.randn(4, 3, 32, 32), *target)]
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        torch.set_autocast_enabled("cuda", True)  # torch.autocast would look for a real GPU
        with torch.no_grad():
            look = getattr(guide, "class_token_and_attention", None) or guide.features
            features = look(batch[0])
        losses = model(*batch, features)
        torch.set_autocast_enabled("cuda", False)
        for name, loss in losses.items():
            assert (loss.device.type, loss.dtype) == ("cuda", torch.float32), name
        for p in model.parameters():  # backward() needs a real GPU, even for fake tensors
            p.grad = torch.zeros_like(p)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        assert norm.isfinite().device.type == "cuda"
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


@needs_gpu
@pytest.mark.parametrize("script", SCRIPTS)
def test_resume_and_torchrun_on_a_gpu(script, teacher, tmp_path):
    words = flags(script, teacher, tmp_path, "--epochs", 2, "--amp", "bf16", "--workers", 2)
    run("torchrun", "--nproc_per_node", 1, f"{script}.py", *words)
    last = common.load_checkpoint(tmp_path / "last.pth")
    last["log"] = last["log"][:1]  # as if the second epoch were still to come
    common.save_checkpoint(tmp_path / "last.pth", **last)
    main(script, *words, "--resume")
    assert len(records(tmp_path)) == 2
