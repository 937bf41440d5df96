#!/usr/bin/env python3
"""Optimizer steps of a Llama-style model in PyTorch under FSDP2, for a side-by-side run with Stretto.

usage: torchrun --nproc-per-node N torch_fsdp2.py CONFIG [--steps 8] [--no-compile] [--reduce-each]

CONFIG is one of Stretto's configurations (configs/bench_llama_1.5b_cuda.json): its sizes, batches
and sequence length are taken, on random tokens. fully_shard around each block and the whole,
parameters gathered in bf16, gradients reduced in f32, torch.compile of the blocks, flash
attention, fused AdamW on f32 shards. Gradients are reduced at the last micro-batch of a step, or
with --reduce-each at every one. Prints one JSON line with the median step after four of warm-up.
"""
import argparse
import json
import os
import re
import statistics
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F


def rotate(x, cos, sin):  # [batch, heads, length, dim], halves turned against each other
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Block(nn.Module):
    def __init__(self, m):
        super().__init__()
        width, self.heads, self.kv_heads, self.dim = m["hidden"], m["heads"], m["kv_heads"], m["head_dim"]
        self.attn_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, (self.heads + 2 * self.kv_heads) * self.dim, bias=False)
        self.out = nn.Linear(self.heads * self.dim, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * m["ffn"], bias=False)
        self.down = nn.Linear(m["ffn"], width, bias=False)

    def forward(self, x, cos, sin):
        b, t, _ = x.shape
        q, k, v = self.qkv(self.attn_norm(x)).split(
            [self.heads * self.dim, self.kv_heads * self.dim, self.kv_heads * self.dim], dim=2)
        q = rotate(q.view(b, t, self.heads, self.dim).transpose(1, 2), cos, sin)
        k = rotate(k.view(b, t, self.kv_heads, self.dim).transpose(1, 2), cos, sin)
        v = v.view(b, t, self.kv_heads, self.dim).transpose(1, 2)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(o.transpose(1, 2).reshape(b, t, -1))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=2)
        return x + self.down(F.silu(gate) * up)


class Llama(nn.Module):
    def __init__(self, m, length):
        super().__init__()
        self.embed = nn.Embedding(m["vocabulary"], m["hidden"])
        self.blocks = nn.ModuleList(Block(m) for _ in range(m["layers"]))
        self.norm = nn.RMSNorm(m["hidden"])
        self.head = nn.Linear(m["hidden"], m["vocabulary"], bias=False)
        half = m["head_dim"] // 2
        angle = torch.outer(torch.arange(length).float(),
                            m.get("rope_theta", 10000.0) ** (-torch.arange(half).float() / half))
        self.register_buffer("cos", angle.cos().bfloat16())
        self.register_buffer("sin", angle.sin().bfloat16())

    def forward(self, ids, targets):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), targets.flatten())


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--reduce-each", action="store_true")
    args = parser.parse_args()
    with open(args.config, encoding="utf-8") as f:
        config = json.loads(re.sub(r"//.*", "", f.read()))
    m, batch = config["model"], config["batch"]
    length = config["data"]["sequence_length"]
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = torch.device("cuda", torch.cuda.current_device())
    dist.init_process_group("nccl", device_id=device)
    torch.manual_seed(1)
    with torch.device("cuda"):
        model = Llama(m, length)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.blocks:
        if not args.no_compile:
            block.compile()
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1,
                                  fused=True)
    micro = max(1, batch["global"] // (batch["micro"] * ranks))
    torch.manual_seed(2 + rank)
    times = []
    warm_up = 4
    for _ in range(args.steps + warm_up):
        batches = [torch.randint(m["vocabulary"], (batch["micro"], length + 1), device=device)
                   for _ in range(micro)]
        torch.cuda.synchronize()
        dist.barrier()
        start = time.perf_counter()
        for i, ids in enumerate(batches):
            model.set_requires_gradient_sync(args.reduce_each or i + 1 == micro)
            loss = model(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()) / micro
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    median = statistics.median(times[warm_up:])
    if rank == 0:
        print(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__,
                          "ranks": ranks, "step_ms": median * 1e3,
                          "tokens_per_second": micro * ranks * batch["micro"] * length / median,
                          "peak_bytes": torch.cuda.max_memory_allocated()}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
