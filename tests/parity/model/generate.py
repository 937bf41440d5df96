#!/usr/bin/env python3
"""Writes data/<case>.safetensors: what PyTorch and transformers compute for tiny random models.

    pip install torch transformers safetensors
    python3 tests/parity/model/generate.py

Each file holds, for one two-layer model and one packed batch of two documents,
    initial.<name>      weights, under our names, exact in bf16        f32
    ids, targets, cu_seqlens                                           i32
    weights             of the tokens in the loss                      f32
    logits              [tokens, vocabulary]                           f64
    loss                [sum of weighted token losses, sum of weights] f64
    gradient.<name>     of the loss sum                                f64
    after.<name>        weights after three AdamW steps                f64
    bf16_error          of PyTorch's own bf16 model against the above: relative L2 norms of the
                        differences of [logits, all gradients]         f64
and in its metadata the `model` section of our configuration.

transformers computes norms, rotary tables and frequencies in f32 whatever the model's type, so this
script replaces them by the same formulas in f64, and checks the result against the unchanged model.
"""

import copy
import json
import math
import pathlib

import torch
import transformers
from safetensors.torch import save_file

LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY, STEPS = 1e-2, (0.9, 0.95), 1e-8, 0.1, 3
DOCUMENTS = (8, 5)
VOCABULARY, POSITIONS = 53, 17
LAYERS = 2


def gpt2(tied):
    ours = dict(family="gpt2", hidden=12, heads=3, kv_heads=3, head_dim=4, ffn=13, norm_eps=1e-5)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=POSITIONS, n_embd=12, n_layer=LAYERS, n_head=3,
        n_inner=13, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=tied)
    return ours, config


def rotary(family, config_class, tied, hidden, heads, kv_heads, head_dim, ffn, rope=None):
    ours = dict(family=family, hidden=hidden, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
                ffn=ffn, norm_eps=1e-6, rope_theta=(rope or {}).get("rope_theta", 10000.0))
    if rope is not None:
        ours |= dict(rope_scaling_factor=rope["factor"],
                     rope_low_freq_factor=rope["low_freq_factor"],
                     rope_high_freq_factor=rope["high_freq_factor"],
                     rope_original_positions=rope["original_max_position_embeddings"])
    config = config_class(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=ffn,
        num_hidden_layers=LAYERS, num_attention_heads=heads, num_key_value_heads=kv_heads,
        head_dim=head_dim, max_position_embeddings=POSITIONS, rms_norm_eps=1e-6,
        tie_word_embeddings=tied,
        rope_parameters=rope or {"rope_type": "default", "rope_theta": 10000.0})
    return ours, config


# With head_dim 6 the three frequencies are kept, blended and slowed down.
LLAMA31_ROPE = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 32}

CASES = {
    "gpt2_tied": lambda: gpt2(True),
    "gpt2_untied": lambda: gpt2(False),
    "llama_untied": lambda: rotary("llama", transformers.LlamaConfig, False, 15, 3, 1, 6, 11),
    "llama_scaled_tied": lambda: rotary("llama", transformers.LlamaConfig, True, 15, 3, 1, 6, 11,
                                        LLAMA31_ROPE),
    "qwen2_tied": lambda: rotary("qwen2", transformers.Qwen2Config, True, 14, 6, 2, 4, 11),
    "qwen3_untied": lambda: rotary("qwen3", transformers.Qwen3Config, False, 14, 6, 2, 4, 11),
}


def frequencies(rope, head_dim):
    result = []
    for pair in range(head_dim // 2):
        frequency = rope["rope_theta"] ** (-2.0 * pair / head_dim)
        if rope["rope_type"] == "llama3":
            context = rope["original_max_position_embeddings"]
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            wavelength = 2 * math.pi / frequency
            if wavelength > context / low:
                frequency /= rope["factor"]
            elif wavelength >= context / high:
                blend = (context / wavelength - low) / (high - low)
                frequency = (1 - blend) * frequency / rope["factor"] + blend * frequency
        result.append(frequency)
    return torch.tensor(result, dtype=torch.float64)


def compute_in_double(model):
    model.double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            def norm(x, m=module):
                return m.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)
                                                  + m.variance_epsilon)
            module.forward = norm
        elif type(module).__name__.endswith("RotaryEmbedding"):
            config = model.config
            inverse = frequencies(config.rope_parameters, config.head_dim)
            torch.testing.assert_close(inverse, module.inv_freq.double(), rtol=1e-6, atol=0)

            def tables(x, position_ids, f=inverse):
                angles = position_ids[..., None].double() * f
                angles = torch.cat((angles, angles), dim=-1)
                return angles.cos(), angles.sin()
            module.forward = tables


def our_names(family, named):
    """transformers' tensors under our names, projections packed as we pack them."""
    named = dict(named)
    take = named.pop
    ours = {}
    if family == "gpt2":
        ours["embed.weight"] = take("transformer.wte.weight")
        ours["embed.position.weight"] = take("transformer.wpe.weight")
        for i in range(LAYERS):
            theirs, block = f"transformer.h.{i}.", f"blocks.{i}."
            for a, b in (("attn_norm", "ln_1"), ("mlp_norm", "ln_2")):
                for kind in ("weight", "bias"):
                    ours[f"{block}{a}.{kind}"] = take(f"{theirs}{b}.{kind}")
            for a, b in (("attn.qkv", "attn.c_attn"), ("attn.out", "attn.c_proj"),
                         ("mlp.up", "mlp.c_fc"), ("mlp.down", "mlp.c_proj")):
                ours[f"{block}{a}.weight"] = take(f"{theirs}{b}.weight").T
                ours[f"{block}{a}.bias"] = take(f"{theirs}{b}.bias")
        for kind in ("weight", "bias"):
            ours[f"norm.{kind}"] = take(f"transformer.ln_f.{kind}")
    else:
        ours["embed.weight"] = take("model.embed_tokens.weight")
        for i in range(LAYERS):
            theirs, block = f"model.layers.{i}.", f"blocks.{i}."
            ours[block + "attn_norm.weight"] = take(theirs + "input_layernorm.weight")
            ours[block + "mlp_norm.weight"] = take(theirs + "post_attention_layernorm.weight")
            for kind in ("weight", "bias") if family == "qwen2" else ("weight",):
                ours[f"{block}attn.qkv.{kind}"] = torch.cat(
                    [take(f"{theirs}self_attn.{p}_proj.{kind}") for p in "qkv"])
            if family == "qwen3":
                for p in "qk":
                    ours[f"{block}attn.{p}_norm.weight"] = take(f"{theirs}self_attn.{p}_norm.weight")
            ours[block + "attn.out.weight"] = take(theirs + "self_attn.o_proj.weight")
            ours[block + "mlp.gate_up.weight"] = torch.cat(
                [take(f"{theirs}mlp.{p}_proj.weight") for p in ("gate", "up")])
            ours[block + "mlp.down.weight"] = take(theirs + "mlp.down_proj.weight")
        ours["norm.weight"] = take("model.norm.weight")
    if "lm_head.weight" in named:
        ours["head.weight"] = take("lm_head.weight")
    assert not named, f"not mapped: {sorted(named)}"
    return {name: tensor.detach().clone().contiguous() for name, tensor in ours.items()}


def draw(model, generator):
    for name, parameter in model.named_parameters():
        value = 0.3 * torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1 and name.endswith("weight"):
            value += 1.0
        parameter.data.copy_(value.bfloat16())


def generate(case, seed):
    ours, config = CASES[case]()
    ours |= dict(vocabulary=VOCABULARY, layers=LAYERS, max_positions=POSITIONS,
                 tie_embeddings=config.tie_word_embeddings)
    config._attn_implementation = "sdpa"
    generator = torch.Generator().manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    draw(model, generator)

    tokens = sum(DOCUMENTS)
    ids = torch.randint(VOCABULARY, (tokens,), generator=generator)
    targets = torch.randint(VOCABULARY, (tokens,), generator=generator)
    weights = torch.tensor([1.0, 1.0, 0.0, 0.5, 1.0])[torch.randint(5, (tokens,), generator=generator)]

    def logits(m):
        return torch.cat([m(part[None], use_cache=False).logits[0]
                          for part in ids.split(DOCUMENTS)])

    def loss_sum(m):
        losses = torch.nn.functional.cross_entropy(logits(m).double(), targets, reduction="none")
        return (losses * weights.double()).sum()

    with torch.no_grad():
        unchanged = logits(model)
    rough = copy.deepcopy(model).bfloat16()
    compute_in_double(model)
    initial = our_names(ours["family"], model.named_parameters())
    with torch.no_grad():
        exact = logits(model)
    torch.testing.assert_close(unchanged, exact.float(), rtol=0, atol=2e-5)

    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": WEIGHT_DECAY}, {"params": rest, "weight_decay": 0.0}],
        lr=LEARNING_RATE, betas=BETAS, eps=EPS)
    data, first_loss = {}, None
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_sum(model)
        loss.backward()
        if step == 0:
            first_loss = loss.item()
            gradients = [(name, p.grad) for name, p in model.named_parameters()]
            for name, gradient in our_names(ours["family"], gradients).items():
                data["gradient." + name] = gradient
        for parameter in model.parameters():
            parameter.grad /= weights.double().sum()
        optimizer.step()
    loss_sum(rough).backward()
    rough_gradients = our_names(ours["family"], [(n, p.grad) for n, p in rough.named_parameters()])
    with torch.no_grad():
        rough_logits = logits(rough)
    for name, value in our_names(ours["family"], model.named_parameters()).items():
        data["after." + name] = value
    for name, value in initial.items():
        data["initial." + name] = value.float()
    flat = torch.cat([data["gradient." + name].flatten() for name in initial])
    rough_flat = torch.cat([rough_gradients[name].double().flatten() for name in initial])
    bf16_error = torch.stack([(rough_logits - exact).norm() / exact.norm(),
                              (rough_flat - flat).norm() / flat.norm()])
    boundaries = [0]
    for length in DOCUMENTS:
        boundaries.append(boundaries[-1] + length)
    data |= {"ids": ids.int(), "targets": targets.int(), "weights": weights,
             "cu_seqlens": torch.tensor(boundaries, dtype=torch.int32), "logits": exact,
             "bf16_error": bf16_error, "loss": torch.tensor([first_loss, weights.double().sum()], dtype=torch.float64)}
    path = pathlib.Path(__file__).parent / "data" / f"{case}.safetensors"
    path.parent.mkdir(exist_ok=True)
    save_file(data, path, metadata={"model": json.dumps(ours)})
    print(f"{path.name}: {path.stat().st_size} bytes, loss {first_loss:.6f}, "
          f"error of bf16 {bf16_error.tolist()}")


if __name__ == "__main__":
    for index, case_name in enumerate(CASES):
        generate(case_name, 1234 + index)
