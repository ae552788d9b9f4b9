"""The names of Wan's tensors: official, diffusers', and those that ComfyUI reads for a LoRA."""

DIFFUSERS_NAMES = [  # (diffusers, Wan); norm1 and the remaining norm have no parameters
    (".norm2.", ".norm3."),
    (".attn1.", ".self_attn."),
    (".attn2.", ".cross_attn."),
    (".to_q.", ".q."),
    (".to_k.", ".k."),
    (".to_v.", ".v."),
    (".to_out.0.", ".o."),
    (".ffn.net.0.proj.", ".ffn.0."),
    (".ffn.net.2.", ".ffn.2."),
    (".scale_shift_table", ".modulation"),
    ("condition_embedder.time_embedder.linear_1.", "time_embedding.0."),
    ("condition_embedder.time_embedder.linear_2.", "time_embedding.2."),
    ("condition_embedder.text_embedder.linear_1.", "text_embedding.0."),
    ("condition_embedder.text_embedder.linear_2.", "text_embedding.2."),
    ("condition_embedder.time_proj.", "time_projection.1."),
    ("proj_out.", "head.head."),
]


def wan_name(name):
    """The official name of a DiT parameter that may be named as in diffusers or by a training wrapper."""
    name = name.removeprefix("model.").removeprefix("diffusion_model.").removeprefix("dit.")
    if name == "scale_shift_table":
        return "head.modulation"
    for theirs, ours in DIFFUSERS_NAMES:
        name = name.replace(theirs, ours)
    return name


def comfy_name(name):
    """The name under which ComfyUI reads a LoRA tensor of the DiT: diffusion_model.MODULE.lora_A (or B).weight."""
    return f"diffusion_model.{name.removeprefix('dit.')}.weight"
