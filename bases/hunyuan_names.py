"""The names of HunyuanVideo's tensors: official, ComfyUI's, and diffusers', of which several make an official one."""

import re

import torch

from util.weights import Part

COMFY_NAMES = [  # (pattern of ComfyUI's, official)
    (r"(mod|modulation)\.lin\.", r"\1.linear."),
    (r"_attn\.(qkv|proj)\.", r"_attn_\1."),
    (r"_attn\.norm\.(q|k)\w+_norm\.scale", r"_attn_\1_norm.weight"),
    (r"\.norm\.(q|k)\w+_norm\.scale", r".\1_norm.weight"),
    (r"(blocks\.\d+\.\w*mlp)\.0\.", r"\1.fc1."),
    (r"(blocks\.\d+\.\w*mlp)\.2\.", r"\1.fc2."),
    (r"c_embedder\.in_layer\.", "c_embedder.linear_1."),
    (r"c_embedder\.out_layer\.", "c_embedder.linear_2."),
    (r"(t_embedder|time_in|guidance_in)\.in_layer\.", r"\1.mlp.0."),
    (r"(t_embedder|time_in|guidance_in)\.out_layer\.", r"\1.mlp.2."),
]
DIFFUSERS_ENDS = {  # outside the blocks
    "x_embedder.proj": "img_in.proj",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "time_text_embed.timestep_embedder.linear_1": "time_in.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "time_in.mlp.2",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.mlp.0",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.mlp.2",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "context_embedder.proj_in": "txt_in.input_embedder",
    "context_embedder.time_text_embed.timestep_embedder.linear_1": "txt_in.t_embedder.mlp.0",
    "context_embedder.time_text_embed.timestep_embedder.linear_2": "txt_in.t_embedder.mlp.2",
    "context_embedder.time_text_embed.text_embedder.linear_1": "txt_in.c_embedder.linear_1",
    "context_embedder.time_text_embed.text_embedder.linear_2": "txt_in.c_embedder.linear_2",
}
REFINER = "context_embedder.token_refiner.refiner_blocks"
DIFFUSERS_BLOCKS = {  # list of blocks -> (official list, {module: official module, or (module, which part of it)})
    REFINER: (
        "txt_in.individual_token_refiner.blocks",
        {f"attn.to_{x}": ("self_attn_qkv", i) for i, x in enumerate("qkv")}
        | {"norm1": "norm1", "norm2": "norm2", "attn.to_out.0": "self_attn_proj"}
        | {"ff.net.0.proj": "mlp.fc1", "ff.net.2": "mlp.fc2", "norm_out.linear": "adaLN_modulation.1"},
    ),
    "transformer_blocks": (
        "double_blocks",
        {f"attn.to_{x}": ("img_attn_qkv", i) for i, x in enumerate("qkv")}
        | {f"attn.add_{x}_proj": ("txt_attn_qkv", i) for i, x in enumerate("qkv")}
        | {f"attn.norm_{x}": f"img_attn_{x}_norm" for x in "qk"}
        | {f"attn.norm_added_{x}": f"txt_attn_{x}_norm" for x in "qk"}
        | {"attn.to_out.0": "img_attn_proj", "attn.to_add_out": "txt_attn_proj"}
        | {"ff.net.0.proj": "img_mlp.fc1", "ff.net.2": "img_mlp.fc2"}
        | {"ff_context.net.0.proj": "txt_mlp.fc1", "ff_context.net.2": "txt_mlp.fc2"}
        | {"norm1.linear": "img_mod.linear", "norm1_context.linear": "txt_mod.linear"},
    ),
    "single_transformer_blocks": (
        "single_blocks",
        {x: ("linear1", i) for i, x in enumerate(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"))}
        | {"proj_out": "linear2", "norm.linear": "modulation.linear"}
        | {f"attn.norm_{x}": f"{x}_norm" for x in "qk"},
    ),
}


def swap_halves(x):
    return torch.cat(x.chunk(2)[::-1])


def hunyuan_name(name):
    """The official name of a DiT parameter that may be named as in diffusers, ComfyUI or by a wrapper; a Part of it
    where diffusers has several."""
    name = re.sub(r"^(model\.|diffusion_model\.|dit\.|module\.)*", "", name)
    stem, _, kind = name.rpartition(".")  # kind: weight or bias
    if stem in DIFFUSERS_ENDS:
        official = f"{DIFFUSERS_ENDS[stem]}.{kind}"
        return Part(official, change=swap_halves) if stem == "norm_out.linear" else official  # diffusers: scale, shift
    place = re.fullmatch(r"(.*blocks)\.(\d+)\.(.+)", stem)
    if place and place[1] in DIFFUSERS_BLOCKS:
        blocks, modules = DIFFUSERS_BLOCKS[place[1]]
        module, *order = [x] if isinstance(x := modules.get(place[3], place[3]), str) else x
        official = f"{blocks}.{place[2]}.{module}.{kind}"
        return Part(official, *order) if order else official
    for theirs, ours in COMFY_NAMES:
        name = re.sub(theirs, ours, name)
    return name
