"""Attention over a divided sequence beside torch's own `context_parallel`, which needs GPUs."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from torch.nn.attention import SDPBackend, sdpa_kernel

from llama.parallel import context

PROCESSES = 2


def compare(rank: int, size: int) -> None:
    """This process's output and gradients, ours and torch's; both deal out the same pieces."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    group = init_device_mesh("cuda", (size,), mesh_dim_names=("context",))
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(2, 64 * size, 4, 32, generator=generator) for _ in range(4)]
    *parts, grad = (context.part(x, rank, size).to(device) for x in whole)

    ours = [x.clone().requires_grad_() for x in parts]
    ends = rank + 1, 2 * size - rank
    out = context._attend(group.get_group(), "sdpa", ends, True, *ours, None)
    out.backward(grad)

    heads_first = [x.transpose(1, 2).contiguous().to(device) for x in whole[:3]]
    # of the kernels that torch divides this one takes float32
    with (
        sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION),
        context_parallel(group, buffers=heads_first, buffer_seq_dims=[2] * 3),
    ):
        theirs = [x.detach().clone().requires_grad_() for x in heads_first]
        expected = F.scaled_dot_product_attention(*theirs, is_causal=True)
        expected.backward(grad.transpose(1, 2).contiguous())
    for found, truth in zip([out, *ours], [expected, *theirs], strict=True):
        pair = (found, truth) if found is out else (found.grad, truth.grad)
        a, b = pair[0].detach().cpu(), pair[1].detach().transpose(1, 2).cpu()
        assert (a - b).norm() < 1e-5 * b.norm()


def work(rank: int, size: int, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("nccl", rank=rank, world_size=size)
    compare(rank, size)
    dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < PROCESSES, reason="needs two GPUs")
def test_it_equals_torchs_own() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(work, (PROCESSES, port), nprocs=PROCESSES)
