"""DiTs that share the weights of ours, to compare with."""

import torch

from bases.names import wan_name
from model import DiT
from util.distributed import compile_blocks


def diffusers_dit(dit):
    """diffusers' WanTransformer3DModel that shares the matrices of `dit`; None where diffusers is not installed, or for
    another architecture."""
    if not isinstance(dit, DiT):
        return None
    try:
        from diffusers import WanTransformer3DModel
    except ImportError:
        return None
    c, weights = dit.config, dit.state_dict()
    with torch.device("meta"):
        theirs = WanTransformer3DModel(
            patch_size=c.patch,
            num_attention_heads=c.heads,
            attention_head_dim=c.dim // c.heads,
            in_channels=c.in_dim,
            out_channels=c.out_dim,
            text_dim=c.text_dim,
            freq_dim=c.freq_dim,
            ffn_dim=c.ffn_dim,
            num_layers=c.layers,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            eps=c.eps,
            rope_max_seq_len=1024,
        )
    theirs.load_state_dict({name: weights[wan_name(name)] for name in theirs.state_dict()}, assign=True)
    for p in theirs.parameters():  # all in one dtype: with its weight in another one, their RMSNorm is not fused
        p.data = p.data.to(dit.blocks[0].self_attn.q.weight.dtype)
    theirs.rope = type(theirs.rope)(c.dim // c.heads, c.patch, 1024)  # its tables are not in the state dict
    if dit.recompute:
        theirs.enable_gradient_checkpointing()
    return theirs.to(dit.head.head.weight.device)


def compiled_twin(dit, compile=compile_blocks):
    """A DiT with compiled blocks that shares the weights of `dit`."""
    with torch.device("meta"):
        twin = type(dit)(dit.config)
    twin.load_state_dict(dit.state_dict(), assign=True)
    twin.recompute = dit.recompute
    compile(twin)
    return twin
