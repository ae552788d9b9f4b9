"""Stage 2: fine-tune φ and the DiT to generate the next section, given a clean history of varying length.

The loss of stage 1 with another target (paper, section 3.2, equation 2):

    ‖(ε - X_0) - G_θ(X_t, t, c, φ(H))‖²         X_0: the section that follows H; c: its prompt

    python finetune.py                            φ from runs/pretrain, the DiT from the base again
    python finetune.py --method none --init random         train the base (a DiT without memory) into runs/base
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from encoder import find_method
from model import add_noise
from pretrain import Batch, Config, check, collate, generator, noise_level, setup, train
from util.cli import parse_flags, run_main
from util.run import check_encoder, encoder_file, load_encoder


@dataclass
class FinetuneConfig(Config):
    out: str = None  # run folder [runs/finetune; runs/base for --method none]
    encoder: str = "runs/pretrain"  # the run to take φ from; "none": a fresh φ
    freeze_encoder: bool = False  # keep φ as it is (the paper's ablation)
    history_noise: float = 0.0  # against drift: noise on the history, of levels up to this
    t_mean: float = None  # noise levels that the DiT trains on: sigmoid of N(t_mean, t_std) [the preset's]
    t_std: float = None  # their spread [the preset's]
    text_drop: float = 0.1  # fraction of samples without a prompt, for classifier-free guidance


def section_starts(base, clip, sections, waiting):
    """First frames of the targets that can follow `sections` whole sections and `waiting` more frames."""
    lone = int(base.codec.causal)
    least = lone + sections * base.section + waiting
    # a causal codec's first latent is unlike all others, so its history begins where the clip does
    return [b for b in clip.targets(sections, base.section) if (b == least if lone else b >= least)]


def possible_lengths(base, clips, waiting):
    """History lengths (in sections, plus `waiting` frames) after which every clip has a target."""
    most = (base.history - int(base.codec.causal) - waiting) // base.section
    return [n for n in range(1, most + 1) if all(section_starts(base, clip, n, waiting) for clip in clips)]


def draw_continuation(config, base, encoder, clips, rows, step, longest=False):
    """Stage 2: the target is a section whose history has shown everything that its prompt mentions.

    Histories of a batch have one length. clips: the global batch; rows: which of them to return; longest: for
    validation, take the longest history.

    In more than a third of the batches histories do not end with a whole segment: their last frames wait uncompressed,
    and their segments straddle the cuts, as when a clip of your own is continued. With a causal codec all segments are
    whole, as in sample.py: waiting frames would be more tokens than all of φ.
    """
    lone, g = int(base.codec.causal), generator(config.seed, step)
    waiting = int(torch.randint(base.section, (), generator=g)) * int(torch.randint(2, (), generator=g))
    if lone or longest:
        waiting = 0
    lengths = possible_lengths(base, clips, waiting)
    if not lengths:  # some clip has no target for that
        waiting, lengths = 0, possible_lengths(base, clips, 0)
    length = lengths[-1] if longest else lengths[int(torch.randint(len(lengths), (), generator=g))]
    batches = []
    for row in rows:
        clip, g = clips[row], generator(config.seed, step, row)
        choices = section_starts(base, clip, length, waiting)
        begin = choices[int(torch.randint(len(choices), (), generator=g))]
        text = clip.text(begin, base.prompts) if torch.rand((), generator=g) >= config.text_drop else None
        first = begin - length * base.section - waiting - lone
        level = noise_level(config, base, step, row)
        batches.append(section_batch(base, encoder, clip, first, begin, text, level, g, config.history_noise))
    return collate(batches)


def section_batch(base, encoder, clip, first, begin, text, t, g, history_noise=0.0):
    """A batch of one row: the section that begins at latent frame `begin`, after the history from `first` on.

    text: (1, L, text_dim), or None for no prompt; t: (1,) noise level. history_noise: φ sees the history at a noise
    level from U(0, this), in one of ten rows clean: so the model learns to go on from what it has drawn imperfectly.
    """
    end = begin + base.section
    (high, low), target = clip.history(first, begin, encoder, base.codec), clip.cut(begin, end)  # (1, C, F, H, W)
    if history_noise and torch.rand((), generator=g) > 0.1:
        level = history_noise * torch.rand(1, generator=g)
        high, low = (add_noise(x, torch.randn(x.shape, generator=g), level) for x in (high, low))
    times = torch.arange(begin - first, end - first)[None].float()
    noise = torch.randn(target.shape, generator=g)
    text = base.prompts("")[None] if text is None else text
    truth = clip.truth(torch.arange(begin, end))
    return Batch(high, low, target, times, noise, t, text, truth)


def main():
    """Check the flags, build model and data, put φ of stage 1 into it, train."""
    config = parse_flags(FinetuneConfig, __doc__)
    check(config)
    has_stage1 = find_method(config.method).has_stage1
    check_encoder(config, has_stage1)
    config.out = config.out or ("runs/base" if config.method == "none" else "runs/finetune")
    resumed = config.resume and (Path(config.out) / "state.pt").is_file()  # then φ comes from there
    path = None if resumed else encoder_file(config, has_stage1)
    model, base, processes, clips, held_out = setup(config)
    if path:
        loaded = load_encoder(model.encoder, path, processes.device)
        if processes.rank == 0:
            print(loaded)
    if config.freeze_encoder:
        model.encoder.requires_grad_(False)
    draw = partial(draw_continuation, config, base, model.encoder)
    prompted = replace(config, text_drop=0.0, history_noise=0.0)
    draw_held_out = partial(draw_continuation, prompted, base, model.encoder, longest=True)
    train(config, "finetune", model, base, processes, clips, held_out, draw, draw_held_out)


if __name__ == "__main__":
    run_main(main)
