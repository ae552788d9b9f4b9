"""What every base has: sizes, defaults, a codec, prompts, and how the weights of its DiT are read and written."""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.modules.module import register_module_module_registration_hook

from bases.external_lora import apply_loras
from bases.lora import add_lora, merge_lora
from bases.names import comfy_name, wan_name
from model import Block, DiT, DiTConfig, pad_replicate
from util.cli import UserError
from util.device import compute_dtype
from util.weights import load_weights, own_config, weight_files


@dataclass
class Base:
    name: str  # --preset
    dit: DiTConfig  # or the config of another architecture, with the same names for what both have
    codec: object  # pixels <-> latents: a Codec
    prompts: (
        object  # prompts(text) -> (L, text_dim); has `length` (L) and `settings`, what a cache of prompts depends on
    )
    sizes: tuple  # (height, width) of the aspect-ratio buckets, pixels; the first is the default
    fps: float  # frames per second
    section: int  # latent frames generated at once = encoded at once
    history: int  # latent frames of history, about 20 s
    widths: tuple  # channels of the memory encoder's convolutions
    rate: str = "4x4x2"  # compression of the history, rows x columns x frames, on the DiT's token grid
    lora: int = 0  # rank of the trained update of a frozen DiT; 0: the whole DiT is trained
    optimizer: str = "muon"  # muon or adamw, see util/optim.py
    lr: float = 0.04  # its peak learning rate
    recompute: bool = False  # compute activations again in the backward pass: a third more time, far less memory
    # frames of a nano section are so alike that prompt and memory are needed only near t = 1: go there often
    t_mean: float = 2.5  # noise levels of the base and of stage 2: sigmoid of N(t_mean, t_std)
    t_std: float = 2.0
    steps: int = 20  # sampler steps
    guidance: float = 1.5  # classifier-free guidance
    shift: float = 3.0  # timestep shift
    # from this noise level on another DiT denoises than below it, see bases/experts.py; 0: one DiT
    boundary: float = 0.0
    low_guidance: float = None  # guidance below the boundary
    needs_cache: bool = False  # its codec is too large to encode videos while training: it trains on a cache of latents

    passes: int = 2  # of the DiT per sampler step, with guidance

    rename = staticmethod(wan_name)  # a tensor's name in others' files -> its name in the DiT, or a Part of one
    # the DiT's class; those of its blocks, which hold nearly all of its weights; flags of MemoryConfig it knows not
    architecture, blocks, lacks = DiT, (Block,), ()

    def __post_init__(self):
        if not self.dit.in_dim == self.dit.out_dim == self.codec.channels:
            raise ValueError(f"a DiT of {self.dit.in_dim} channels, a codec of {self.codec.channels}")

    def make_dit(self):
        """A DiT with new weights."""
        return self.architecture(self.dit)

    def noise_range(self, expert):
        """(lowest, highest) noise level that the DiT --expert is trained on. Raises UserError if there is none."""
        if expert:
            raise UserError(f"--expert {expert}: --preset {self.name} has one DiT; drop it")
        return 0.0, 1.0

    def expert_weights(self, path, expert):
        """Where in --init the weights of the DiT --expert lie. Raises UserError if they do not."""
        return path

    def check_low(self, config, trained):
        """Check sample.py's flags of a second expert, of a checkpoint with the config `trained`, and fill in their
        defaults. Raises UserError."""
        for key in ("low_checkpoint", "low_guidance"):
            if getattr(config, key):
                raise UserError(f"--{key} does nothing: --preset {self.name} has one DiT; drop it")

    def add_low(self, dit, config):
        """The DiT that samples, from the one in --checkpoint."""
        return dit

    def load_dit(self, dit, path, device="cpu", frozen=False, wait=False):
        """Read the DiT's weights: official or diffusers' naming, one file or shards, or a checkpoint of this project.

        float32, or as frozen_dtype() says; wait: in host memory, in the dtypes for `device`. Raises UserError; nothing
        is changed unless everything fits.
        """
        dtype = frozen_dtype(device) if frozen else lambda name, tensor: torch.float32
        files = weight_files(path)
        own = own_config(files[0])  # of our own checkpoints, take the DiT alone
        self.check_codec(files[0], own or {})

        def rename(name):
            return None if own and name.startswith("encoder.") else self.rename(name)

        load_weights(dit, files, rename, device="cpu" if wait else device, dtype=dtype)

    def check_codec(self, path, config):
        """Raise UserError if a checkpoint with this config was trained on the latents of another codec."""
        if config.get("codec") not in (None, self.codec.identity):
            raise UserError(f"{path} was trained with another codec: give that one, --vae FILE")

    @contextmanager
    def random_frozen(self, device):
        """A DiT made in here has random weights in the dtypes of a loaded, frozen one, if this base has a LoRA.

        Each block is cast as soon as it is made: the whole DiT never exists in float32.
        """

        def cast(parent, name, module):
            for p in module.parameters() if isinstance(module, self.blocks) else ():
                p.data = p.data.to(dtype(f"blocks.{name}", p))

        dtype, hook = frozen_dtype(device), register_module_module_registration_hook(cast) if self.lora else None
        try:
            yield
        finally:
            if hook:
                hook.remove()

    def add_lora(self, dit, rank):
        """Freeze the DiT and put a LoRA of this rank beside the linear layers of its blocks."""
        add_lora(dit, rank)

    def merge_lora(self, dit):
        """Add the LoRA to the weights."""
        merge_lora(dit)

    def apply_loras(self, dit, text):
        """Add LoRAs by others to the weights, "FILE:strength FILE ...". Raises UserError; then nothing is changed."""
        apply_loras(dit, text, self.rename)

    def exports(self, tensors):
        """{file name: {name: tensor}} of what others can read, from a checkpoint's tensors: its LoRA, for ComfyUI."""
        lora = {comfy_name(name): tensor for name, tensor in tensors.items() if ".lora_" in name}
        return {"lora.safetensors": lora} if lora else {}


class Codec:
    """Pixels (B, 3, F, H, W) in [-1, 1] <-> latents (B, C, f, h, w). What all codecs have; these defaults fit one that
    needs no weights and treats every frame alone."""

    channels: int  # C
    stride: tuple  # pixels per latent: frames, rows, columns
    causal = False  # its first latent is one frame, encoded alone
    lookback = 0  # how many latents before a piece its decoder must have seen
    decodes = True  # False where its weights are not at hand
    large = False  # True: the DiT has to make room while it decodes
    settings: list  # what a cache of latents depends on; None for weights that are not at hand
    identity = None  # tells codecs of one preset apart by their latents, which DiTs are trained on

    def encode(self, pixels):
        """(B, 3, F, H, W) -> (B, C, f, h, w)."""
        raise NotImplementedError

    def decode(self, latents):
        """A whole video from its beginning: (B, C, f, h, w) -> (B, 3, F, H, W)."""
        raise NotImplementedError

    def low_encoder(self, rate):
        """A function that encodes `low`, the video made smaller by a rate (t, h, w), piece by piece (a causal codec's
        first frame, then whole segments): (B, 3, F, H, W) -> (B, C, f/t, H/h, W/w)."""
        t, *space = rate
        return lambda pixels: self.encode(self.shrink(pixels[:, :, ::t], space))

    def encode_low(self, pixels, rate):
        """`low` of a clip to train on, from which cut_low() cuts: here at every frame, since a history may begin
        anywhere."""
        return self.low_encoder((1, *rate[1:]))(pixels)

    def cut_low(self, low, first, last, t):
        """`low` (B, C, f/t, ...) of the latents first..last-1 of a clip. low: from encode_low()."""
        return low[:, :, first:last:t]

    def shrink(self, pixels, space):
        """(B, 3, F, H, W) -> (B, 3, F, H/h, W/w): the mean over areas, padded up to whole latents by replication."""
        multiples = 1, *(n * s for n, s in zip(space, self.stride[1:]))
        return F.avg_pool3d(pad_replicate(pixels, multiples), (1, *space))

    def frames(self, n):
        """The most frames, out of n, that are whole latents."""
        return n

    def decoder(self):
        """A function that decodes a video piece by piece."""
        return self.decode

    def show(self, history, target, times):
        """Pixels (B, 3, F', H, W) of latents `target` (B, C, F', h, w) at `times` (B, F') of a history."""
        return self.decode(target)

    def memory(self, pixels):
        """({what: bytes} while the DiT denoises, {what: bytes} while the codec decodes) frames of so many pixels."""
        return {}, {}


class CausalCodec(Codec):
    """A codec of video whose first latent is one frame and every other four. Subclasses have encoder() and decoder():
    functions that take a video piece by piece and carry on what they need; `vae`, None where its weights are not at
    hand; and what it takes: weight_bytes, carried_per_pixel and decoding_per_pixel, bytes."""

    causal = True

    @property
    def decodes(self):
        return self.vae is not None

    def memory(self, pixels):
        what = "what it carries on, or decodes with"
        return tuple(
            {"VAE": self.weight_bytes, what: per_pixel * pixels}
            for per_pixel in (self.carried_per_pixel, self.decoding_per_pixel)
        )

    def frames(self, n):
        """The most frames, out of n, that are whole latents: 1 + 4k."""
        return 1 + (n - 1) // 4 * 4

    def encoder(self):
        """A function that encodes a video piece by piece: (B, 3, 1 + 4k, H, W), later (B, 3, 4k, H, W)."""
        raise NotImplementedError

    def encode(self, pixels):
        """A whole video: (B, 3, 1 + 4k, H, W), H and W multiples of the stride -> (B, C, 1 + k, h, w)."""
        return self.encoder()(pixels)

    def decode(self, latents):
        """A whole video from its beginning: (B, C, 1 + k, h, w) -> (B, 3, 1 + 4k, H, W)."""
        return self.decoder()(latents)

    def low_encoder(self, rate):
        """See Codec: frames 0, t, 2t, ... made smaller, as one stream."""
        (t, *space), encode, started = rate, self.encoder(), False

        def encode_low(pixels):
            nonlocal started
            # the stream's frame 0 comes alone, or before others; any later piece ends with a frame that counts
            chosen = pixels[:, :, t - 1 :: t] if started else pixels[:, :, ::t]
            started = True
            return encode(self.shrink(chosen, space))

        return encode_low

    def encode_low(self, pixels, rate):
        n = rate[0] * self.stride[0]  # frames per latent of the smaller video; a rest makes none
        return self.low_encoder(rate)(pixels[:, :, : 1 + (pixels.shape[2] - 1) // n * n])

    def cut_low(self, low, first, last, t):
        """See Codec; `first` is 0: a history begins where its clip does."""
        return low[:, :, : 1 + (last - 1) // t]


def frozen_dtype(device):
    """dtype(name, tensor) for a DiT that is not trained: compute dtype for its blocks' matrices, nearly all of it;
    float32 for the rest, as in Wan's own mixed precision."""

    def dtype(name, tensor):
        return compute_dtype(device) if "blocks." in name and tensor.ndim == 2 else torch.float32

    return dtype
