"""Stage 2: fine-tune φ and the DiT to generate the next section, given a clean history of varying length.

The same loss as stage 1 with another target (paper, section 3.2, equation 2):

    ‖(ε - X_0) - G_θ(X_t, t, c, φ(H))‖²         X_0: the section that follows H; c: its prompt

    python finetune.py                            φ from runs/pretrain, the DiT from the base again
    python finetune.py --method none --init random         the base: the DiT alone, from prompts, in runs/base
"""
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from encoder import FRAME_METHODS
from flags import parse_flags, run_main
from model import UserError
from pretrain import Batch, Config, check, collate, downsample, generator, noise_level, setup, train
from weights import load_weights, read_metadata


@dataclass
class FinetuneConfig(Config):
    out: str = None               # run folder [runs/finetune; runs/base for --method none]
    encoder: str = "runs/pretrain"     # a run of either stage whose φ is taken; "none": a fresh one
    freeze_encoder: bool = False  # keep φ as it is (the paper's ablation)
    t_mean: float = None          # noise levels that the DiT trains on: sigmoid of N(t_mean, t_std) [the preset's]
    t_std: float = None           # their spread [the preset's]
    text_drop: float = 0.1        # share of samples without a prompt, for classifier-free guidance


def starts(tools, clip, sections, waiting):
    """First frames of the targets that may follow a history of so many sections and waiting frames."""
    section, lone = tools.preset.section, int(tools.codec.causal)
    least = lone + sections * section + waiting
    # a causal codec's first latent is unlike all others, so that its history begins where the clip does
    return [b for b in clip.targets(sections, section) if (b == least if lone else b >= least)]


def possible_lengths(tools, clips, waiting):
    """Whole sections of history, beside so many waiting frames, after which every clip has a target."""
    most = (tools.preset.history - int(tools.codec.causal) - waiting) // tools.preset.section
    return [n for n in range(1, most + 1) if all(starts(tools, clip, n, waiting) for clip in clips)]


def draw_continuation(config, tools, clips, rows, step, longest=False):
    """Stage 2: a history of one length a batch, all that the next section asks for seen in it; the target is that
    section. clips: the global batch; rows: those to return. longest: for figures, the longest history.

    In more than a third of the batches histories do not end with a whole segment: their last frames wait uncompressed,
    and their segments straddle the cuts, as they do when one's own clip is continued. With a causal codec all segments
    are whole, as in sample.py: what waits would be more tokens than all of φ.
    """
    section, lone = tools.preset.section, int(tools.codec.causal)
    g = generator(config.seed, step)
    waiting = int(torch.randint(section, (), generator=g)) * int(torch.randint(2, (), generator=g))
    if lone or longest:
        waiting = 0
    lengths = possible_lengths(tools, clips, waiting)
    if not lengths:                                                 # too short or too particular a clip for that
        waiting, lengths = 0, possible_lengths(tools, clips, 0)
    length = lengths[-1] if longest else lengths[int(torch.randint(len(lengths), (), generator=g))]
    parts = []
    for row in rows:
        clip, g = clips[row], generator(config.seed, step, row)
        choices = starts(tools, clip, length, waiting)
        begin = choices[int(torch.randint(len(choices), (), generator=g))]
        text = clip.text(begin, tools.prompts) if torch.rand((), generator=g) >= config.text_drop else None
        parts.append(ask(tools, clip, begin - length * section - waiting - lone, begin, text,
                         noise_level(config, step, row), g))
    return collate(parts)


def ask(tools, clip, first, begin, text, t, g):
    """A batch of one: the section that begins at latent frame `begin`, after the history from `first` on.
    text: (1, L, text_dim), or None for no prompt; t: (1,) noise level."""
    section = tools.preset.section
    hr, target = clip.cut(first, begin), clip.cut(begin, begin + section)       # (1, C, F, H, W)
    frames = torch.arange(begin - first, begin - first + section)[None].float()
    return Batch(hr, downsample(tools, hr), target, frames, torch.randn(target.shape, generator=g),
                 t, tools.prompts("")[None] if text is None else text,
                 clip.truth(torch.arange(begin, begin + section)))


def encoder_file(config):
    """The weights of --encoder; refuses a run of another preset, method or rate. None for a fresh φ, one of a method
    without stage 1, or none at all."""
    if config.method in (*FRAME_METHODS, "none") or config.encoder == "none":
        return None
    path = Path(config.encoder)
    if not path.exists():
        raise UserError(f"--encoder {config.encoder} is not there: run pretrain.py first, or give none for a fresh φ")
    path = path / "model.safetensors" if path.is_dir() else path
    theirs = read_metadata(path)
    for key in ("preset", "method", "rate"):
        if theirs.get(key) != getattr(config, key):
            raise UserError(f"--encoder {config.encoder} has --{key} {theirs.get(key)}, "
                            f"but {getattr(config, key)} is asked for")
    return path


def main():
    """Check the flags, build model and data, put φ of stage 1 into it, train."""
    config = parse_flags(FinetuneConfig, __doc__)
    check(config)
    if config.method in (*FRAME_METHODS, "none") and config.encoder not in (FinetuneConfig.encoder, "none"):
        raise UserError(f"--encoder {config.encoder}: --method {config.method} has no φ of stage 1; drop it")
    config.out = config.out or ("runs/base" if config.method == "none" else "runs/finetune")
    if config.freeze_encoder and config.method == "none":
        raise UserError("--freeze_encoder --method none: there is no memory encoder to freeze; drop one of the two")
    if config.freeze_encoder and config.encoder == "none":
        raise UserError("--freeze_encoder --encoder none: a fresh φ that is never trained tells nothing; drop one of "
                        "the two")
    resumed = config.resume and (Path(config.out) / "state.pt").is_file()       # then φ comes from there
    encoder = None if resumed else encoder_file(config)
    model, clips, held_out, tools = setup(config)
    if encoder:
        ours = lambda name: name.removeprefix("encoder.") if name.startswith("encoder.") else None
        load_weights(model.encoder, [encoder], ours, device=tools.device)
        if tools.rank == 0:
            trained = read_metadata(encoder)                        # it may have stopped early: say so
            print(f"φ: {encoder}, of {trained['stage']}.py, step {trained.get('step')} of {trained.get('steps')}")
    if config.freeze_encoder:
        model.encoder.requires_grad_(False)
    train(config, "finetune", draw_continuation, model, clips, held_out, tools, replace(config, text_drop=0.0),
          partial(draw_continuation, longest=True))


if __name__ == "__main__":
    run_main(main)
