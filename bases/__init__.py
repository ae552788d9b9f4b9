"""The bases: what a pretrained video model brings. Each base is one or two files. To add one,
name it twice here: in the import and in BASES."""

from bases import hunyuan, nano, wan, wan22
from util.cli import UserError

BASES = {name: module for module in (nano, wan, wan22, hunyuan) for name in module.PRESETS}


def open_base(name, vae="", t5="", device="cpu"):
    """The Base of this name.

    vae, t5: local folders of its codec's and its text encoder's weights, if it has any; without them everything works
    but encoding and decoding pixels, and prompts. device: where these two run.
    """
    if name not in BASES:
        raise UserError(f"--preset {name}: choose one of {', '.join(BASES)}")
    return BASES[name].open_base(name, vae, t5, device)
