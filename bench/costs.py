"""What a DiT costs, from its config alone: parameters, FLOPs, bytes per token. One function per question, one version
per architecture.

Letters as in model.py: N noisy tokens, M memory tokens, D width. A multiply-add is 2 FLOPs.
"""

import math
from functools import singledispatch

from bases.hunyuan_dit import HunyuanConfig


@singledispatch
def n_blocks(c):
    return c.layers


@singledispatch
def text_tokens(c):
    """Tokens of a prompt that pass through the blocks as others do, at most."""
    return 0


@singledispatch
def lora_parameters(c, rank):
    """Parameters of a LoRA on q, k, v, o of both attentions and on both feed-forward layers, in every block."""
    return c.layers * rank * (8 * (c.dim + c.dim) + 2 * (c.dim + c.ffn_dim))


@singledispatch
def matrices(c):
    """Parameters in the blocks' matrices, see bases.base.frozen_dtype()."""
    return c.layers * (8 * c.dim**2 + 2 * c.dim * c.ffn_dim)


@singledispatch
def flops(c, tokens, memory=0, cached=False, cross_attention=False):
    """FLOPs of one DiT forward pass on one sample; elementwise operations are left out.

    tokens: noisy ones; memory: clean ones before them, which skip the patch embedding and the head, but with them the
    time embedding is computed for two timesteps. cached: their keys and values are there already. cross_attention: they
    are read through that too.
    """
    N, D, T = tokens if cached else tokens + memory, c.dim, c.text_len
    block = (
        12 * N * D**2  # q, k, v, o of self-attention; q, o of cross-attention
        + 4 * N * (tokens + memory) * D  # products of self-attention
        + 4 * T * D**2  # k, v of cross-attention
        + 4 * N * T * D  # products of cross-attention
        + 4 * N * D * c.ffn_dim
        + cross_attention * 4 * D * (tokens * D + memory * D + tokens * memory)
    )
    ends = 2 * tokens * math.prod(c.patch) * (c.in_dim + c.out_dim) * D
    text = 2 * T * (c.text_dim * D + D**2)
    timesteps = 2 if memory and not cached else 1
    return c.layers * block + ends + text + 2 * timesteps * (c.freq_dim * D + 7 * D**2)


@singledispatch
def block_bytes(c, tokens, lora):
    """Bytes that one block keeps for its backward pass, one sample, under bf16 autocast with a flash kernel.

    (N, D) float32: x at three places; q, k, cross q before RMSNorm; unless the base's weights are frozen, the three
    after it and two layer norms too. (N, D) bf16: inputs of q, k and v (one tensor), o, cross q, cross o, ffn.0;
    rotated q and k, v, cross q, an attention's output; unless frozen, two gated outputs too. (N, F) bf16: before and
    after GELU, F being the feed-forward's width.
    """
    float32, bf16 = (6, 10) if lora else (11, 12)
    return tokens * (c.dim * (4 * float32 + 2 * bf16) + c.ffn_dim * 2 * 2)


@singledispatch
def inference_bytes(c, tokens, lora):
    """Bytes inside one block that keeps nothing, at most.

    It needs most in attention (x and its norm; q, k and v; q and k normalised and rotated in float32) or in the
    feed-forward (x and its norm; before and after GELU, or what a LoRA adds and the sum, in bf16). Both are upper
    bounds: a trace of one block finds up to a seventh less.
    """
    return tokens * max(31 * c.dim, 13 * c.dim + (6 if lora else 4) * c.ffn_dim)


# ---------------------------------------------------------------------------------------------------------------------
# HunyuanVideo: text beside the other tokens, with prompts of full length; double and single blocks


@n_blocks.register
def _(c: HunyuanConfig):
    return c.layers + c.singles


@text_tokens.register
def _(c: HunyuanConfig):
    return c.text_len - 1


@lora_parameters.register
def _(c: HunyuanConfig, rank):
    D, F = c.dim, c.ffn_dim
    double = 2 * ((D + 3 * D) + (D + D) + 2 * (D + F))  # qkv, proj, fc1, fc2; of video and of text
    return rank * (c.layers * double + c.singles * ((D + 3 * D + F) + (D + F + D)))


@matrices.register
def _(c: HunyuanConfig):
    D, F = c.dim, c.ffn_dim
    refiner = 2 * (4 + 2 * 4 + 2) * D**2  # qkv, proj; a feed-forward of 4 D; modulation
    return c.layers * 2 * (10 * D**2 + 2 * D * F) + c.singles * (7 * D**2 + 2 * D * F) + refiner


@flops.register
def _(c: HunyuanConfig, tokens, memory=0, cached=False, cross_attention=False):
    if cached or cross_attention:
        raise ValueError("HunyuanVideo's DiT has neither")
    D, F, L, levels = c.dim, c.ffn_dim, text_tokens(c), 2 if memory else 1
    S = tokens + memory + L
    block = S * (8 * D**2 + 4 * D * F) + 4 * S**2 * D  # the same in both kinds
    modulation = 12 * (levels + 1) * D**2 * c.layers + 6 * levels * D**2 * c.singles + 4 * D**2
    refiner = 2 * (24 * L * D**2 + 4 * L**2 * D + 4 * D**2)
    text = 2 * L * c.text_dim * D + 2 * (c.freq_dim + c.text_dim + 2 * D) * D + refiner
    ends = 2 * tokens * math.prod(c.patch) * (c.in_dim + c.out_dim) * D
    vector = 2 * levels * (c.freq_dim + c.pooled_dim + 2 * D + c.guided * (c.freq_dim + D)) * D
    return n_blocks(c) * block + modulation + text + ends + vector


@block_bytes.register
def _(c: HunyuanConfig, tokens, lora):
    """Of a double block, as a single one keeps no more. (N, D) float32: x at two places, q and k before RMSNorm; unless
    frozen, those after it and two layer norms too. bf16: inputs of qkv, proj, fc1; q, k, v; unless frozen, two gated
    outputs. (N, F) bf16: before and after GELU."""
    return tokens * (c.dim * (28 if lora else 48) + c.ffn_dim * 2 * 2)


@inference_bytes.register
def _(c: HunyuanConfig, tokens, lora):
    """Of a double block; traces of both kinds find up to a seventh less."""
    return tokens * max(37 * c.dim, 26 * c.dim + (6 if lora else 4) * c.ffn_dim)
