"""What only a CUDA device can show: the same numbers, chunks, packed documents, decoding and text as on the CPU."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from golden_files import ARCHS, MANIFEST, read
from tolerances import assert_close

import samba_lm
from samba_lm import zoo
from samba_lm.checkpoint import build, create
from samba_lm.data.loader import Batch
from samba_lm.tokenizer import ByteTokenizer
from samba_lm.train.parallel import connect
from samba_lm.train.prepare import make_optimizer, prepare_model
from samba_lm.train.recipe import TrainSection
from samba_lm.train.step import train_step

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", ARCHS)
def test_golden_logits(name: str) -> None:
    config, tensors, weights = read(name)
    logits, _ = build(config, weights).cuda()(tensors["input_ids"].cuda())
    assert (logits.cpu() - tensors["logits"]).abs().max() <= MANIFEST["tolerances"]["logits_atol"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["samba-tiny", "llama-tiny", "mamba-tiny"])
def test_chunks_documents_and_steps(name: str, dtype: torch.dtype) -> None:
    model = create(name, device="cuda", dtype=dtype)
    ids = torch.randint(0, 256, (2, 300), device="cuda")
    scale = 3.0 if dtype == torch.bfloat16 else 10.0
    with torch.no_grad():
        expected, _ = model(ids)
        first, state = model(ids[:, :137])
        second, state = model(ids[:, 137:299], state)
        last = model.step(ids[:, 299], state)
        chunked = torch.cat((first, second, last[:, None]), dim=1)
        assert_close(chunked, expected, "chunks and a step", dtype, scale)
        segments = torch.tensor([[0] * 100 + [1] * 200, [-1] * 50 + [3] * 250], device="cuda")
        packed, _ = model(ids, None, segments)
        assert_close(packed[0, 100:], model(ids[:1, 100:])[0][0], "second document", dtype, scale)
        assert_close(packed[1, 50:], model(ids[1:, 50:])[0][0], "after padding", dtype, scale)


@pytest.mark.parametrize("name", zoo.names()[:8])
def test_gradients_equal_the_cpus(name: str) -> None:
    ids = torch.randint(0, 256, (2, 200))
    grads = []
    for device in ("cpu", "cuda"):
        model = create(name, device=device)
        logits, _ = model(ids.to(device))
        logits.float().log_softmax(-1).square().mean().backward()
        grads.append({n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None})
    for key, expected in grads[0].items():
        assert_close(grads[1][key], expected, key, torch.float32, 20.0)


def test_segments_may_lie_on_the_cpu() -> None:
    model = create("samba-tiny", device="cuda")
    ids = torch.randint(0, 256, (3, 60), device="cuda")
    segments = torch.tensor([[0] * 25 + [1] * 35, [-1] * 20 + [3] * 40, [0] * 10 + [-1] * 5 + [0] * 45])
    with torch.no_grad():
        assert torch.equal(model.features(ids, None, segments)[0], model.features(ids, None, segments.cuda())[0])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_gpu_that_is_not_the_current_one() -> None:
    ids = torch.randint(0, 256, (2, 60))
    results = []
    for device in ("cuda:0", "cuda:1"):
        model = create("samba-tiny").to(device)
        logits, state = model(ids.to(device))
        logits.float().logsumexp(-1).sum().backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([t.detach().cpu() for t in (logits, model.step(ids[:, 0].to(device), state), *grads)])
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("documents", [False, True])
def test_a_training_step_waits_for_the_gpu_once(documents: bool) -> None:
    section = TrainSection(
        steps=4, batch_size=4, micro_batch=2, length=200, device="cuda", dtype="bfloat16", warmup_fraction=0.0
    )
    ids = torch.randint(0, 256, (4, 200))
    batch = Batch(ids, ids.roll(-1, 1), (torch.arange(200) // 70).expand(4, -1).contiguous() if documents else None)
    model = prepare_model(create("samba-tiny"), section, connect("cuda"))
    optimizer = make_optimizer(model, section)
    train_step(model, optimizer, batch, section, connect("cuda"), step=1)  # compiles the kernels
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            train_step(model, optimizer, batch, section, connect("cuda"), step=2)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [str(w.message) for w in caught if "called a synchronizing" in str(w.message)]
    assert len(waits) == 1, waits


def test_text_from_the_gpu(tmp_path: Path) -> None:
    samba_lm.save(create("samba-tiny"), tmp_path / "m", ByteTokenizer())
    texts = []
    for device in ("cpu", "cuda"):
        model, tokenizer = samba_lm.load(tmp_path / "m", device=device)
        assert tokenizer is not None
        texts.append(samba_lm.generate(model, tokenizer, ["One", "Another, longer"], max_tokens=30, temperature=0))
    assert texts[0] == texts[1]
