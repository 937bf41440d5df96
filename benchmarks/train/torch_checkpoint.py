#!/usr/bin/env python3
"""PyTorch's asynchronous distributed checkpoint of a training state, for a side-by-side run with
Stretto's snapshots: seconds for which the trainer is blocked, and seconds until it is on disk.

usage: torch_checkpoint.py [--parameters 1.51e9] [--path DIR] [--repeat 4] [--pinned]
       torchrun --nproc-per-node 2 torch_checkpoint.py ...
bf16 parameters, f32 masters and two f32 moments (14 bytes a parameter), on one GPU, or sharded over
those of torchrun. --pinned keeps the staging copy in page-locked memory from one save to the next
where this PyTorch can; without it each save allocates. Prints one JSON line. Stretto's two figures
come from `stretto-bench snapshot`: blocked_seconds_per_step, and committed_seconds or, with --spill
DIR, spilled_seconds.
"""
import argparse
import inspect
import json
import os
import shutil
import statistics
import tempfile
import time

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

ROWS, COLUMNS = 8192, 2048  # of each tensor


def state_of(parameters, mesh):
    """The tensors by name, this rank holding its rows of each."""
    count = max(1, round(parameters / (ROWS * COLUMNS)))
    world = dist.get_world_size()
    rows = ROWS // world
    device = torch.device("cuda", torch.cuda.current_device())
    state = {}
    for i in range(count):
        for kind, dtype in (("parameter", torch.bfloat16), ("master", torch.float32),
                            ("exp_avg", torch.float32), ("exp_avg_sq", torch.float32)):
            local = torch.full((rows, COLUMNS), 1.0 + i, dtype=dtype, device=device)
            state[f"{kind}.{i}"] = local if world == 1 else DTensor.from_local(
                local, mesh, [Shard(0)])
    return state, count * ROWS * COLUMNS * 14


def pinned_stager():
    """What keeps a page-locked copy between saves, as an argument of async_save; {} without one."""
    if "async_stager" not in inspect.signature(dcp.async_save).parameters:
        return {}
    from torch.distributed.checkpoint import staging
    # Not DefaultStager, which PyTorch 2.11 closes behind the first save.
    return {"async_stager": staging.BlockingAsyncStager(cache_staged_state_dict=True)}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=1.51e9)
    parser.add_argument("--path", default=None, help="a folder on the disk in question")
    parser.add_argument("--repeat", type=int, default=4)
    parser.add_argument("--pinned", action="store_true")
    args = parser.parse_args()
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"),
                        ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29531")):
        os.environ.setdefault(name, value)
    if args.path is not None:
        os.makedirs(args.path, exist_ok=True)
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl")  # saving talks among CPUs
    mesh = init_device_mesh("cuda", (dist.get_world_size(),))
    folder = [tempfile.mkdtemp(prefix="torch-checkpoint-", dir=args.path)
              if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    try:
        state, size = state_of(args.parameters, mesh)
        stager = pinned_stager() if args.pinned else {}
        blocked, durable = [], []
        for i in range(args.repeat):
            where = os.path.join(folder[0], str(i))
            torch.cuda.synchronize()
            dist.barrier()
            start = time.perf_counter()
            saved = dcp.async_save(state, checkpoint_id=where, **stager)
            torch.cuda.synchronize()
            blocked.append(time.perf_counter() - start)
            getattr(saved, "upload_completion", saved).result()
            durable.append(time.perf_counter() - start)
            dist.barrier()
            if dist.get_rank() == 0:
                if not os.path.exists(os.path.join(where, ".metadata")):
                    raise RuntimeError(f"{where} holds no checkpoint")
                shutil.rmtree(where)
        if dist.get_rank() == 0:
            later = slice(1 if args.repeat > 1 else 0, None)  # the first one also allocates
            print(json.dumps({
                "device": torch.cuda.get_device_name(), "torch": torch.__version__,
                "ranks": dist.get_world_size(), "bytes": size, "pinned": bool(stager),
                "first_blocked_seconds": blocked[0],
                "blocked_seconds": statistics.median(blocked[later]),
                "durable_seconds": statistics.median(durable[later])}))
    finally:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(folder[0], ignore_errors=True)
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
