"""What Wan 2.1 brings besides its DiT: the causal video VAE and the umT5 text encoder, both from local folders in the
diffusers layout, and the names under which others read a LoRA. diffusers and transformers are imported only here.

Pixels are (B, 3, F, H, W) floats in [-1, 1], F = 1 + 4k; latents (B, 16, 1 + k, H/8, W/8), the first of one
frame alone.
"""
import hashlib
import html
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError

from flags import warn
from model import UserError, first_line, pad_replicate
from video import file_hash

MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
       3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)


def subfolder(folder, name, flag):
    """The part `name` of a downloaded diffusers pipeline, or `folder` itself if it is that part."""
    for path in (Path(folder) / name, Path(folder)):
        if (path / "config.json").is_file():
            return path
    raise UserError(f"{flag} {folder}: no config.json there or in its {name}; give the folder of "
                    "Wan2.1-T2V-1.3B-Diffusers or its part")


def fingerprint(folder):
    """SHA-256 over the files of a folder: what a cache was made with."""
    files = sorted(p for p in Path(folder).iterdir() if p.is_file())
    return hashlib.sha256(repr([(p.name, file_hash(p)) for p in files]).encode()).hexdigest()


def from_pretrained(cls, folder, flag, dtype):
    """A model of diffusers or transformers with all of its weights from a local folder: they only warn of missing ones.
    Raises UserError."""
    try:
        model, found = cls.from_pretrained(folder, torch_dtype=dtype, local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as e:
        raise UserError(f"{flag} cannot be read ({first_line(e)}): download it again") from None
    if found["missing_keys"]:
        lost = sorted(found["missing_keys"])[0]                     # some versions of transformers do not tie umT5's
        raise UserError(f"{flag} lacks {lost}: " + ("update transformers" if "embed_tokens" in lost else
                                                    "download it again"))
    return model


class WanCodec:
    """Wan's VAE, a frame or four at a time: its causal convolutions carry what they need in a cache, so that a video of
    any length takes the memory of four frames. Without a folder only what needs no VAE works (training on a cache)."""
    channels, stride, causal = 16, (4, 8, 8), True
    averages = slice(None)          # a small video is averaged latents here, see downsample()

    def __init__(self, folder=None, device="cpu"):
        self.vae, self.folder, self.device = None, None, device
        if folder:
            try:
                from diffusers import AutoencoderKLWan
            except ImportError:
                raise UserError("Wan's VAE needs the package diffusers: pip install diffusers") from None
            if folder == "random":      # to measure speed and memory
                self.vae = AutoencoderKLWan()
            else:
                self.folder = subfolder(folder, "vae", "--vae")
                self.vae = from_pretrained(AutoencoderKLWan, self.folder, f"--vae {folder}", torch.float32)
                c = self.vae.config                                 # Wan 2.2's small models have another
                space = 2 ** (len(c.dim_mult) - 1) * (c.patch_size or 1)
                if (c.z_dim, 2 ** sum(c.temperal_downsample), space) != (self.channels, *self.stride[:2]) or (
                        not torch.allclose(torch.tensor([c.latents_mean, c.latents_std]), torch.tensor([MEAN, STD]))):
                    raise UserError(f"--vae {folder} is another VAE ({c.z_dim} channels, {space} pixels a latent) than "
                                    "Wan 2.1's, whose latents the DiT knows: give that one")
            self.vae.eval().requires_grad_(False).to(device)

    @property
    def decodes(self):
        """Can it turn latents into pixels?"""
        return self.vae is not None

    @property
    def settings(self):
        """What a cache of latents depends on."""
        return ["wan", fingerprint(self.folder) if self.folder else None]

    def need_vae(self):
        if self.vae is None:
            raise UserError("latents of Wan need its VAE: give --vae, a local folder in the diffusers layout")

    def frames(self, n):
        """The most frames, of n, that are whole latents: 1 + 4k."""
        return 1 + (n - 1) // 4 * 4

    def statistics(self, like):
        return (torch.tensor(x).view(1, 16, 1, 1, 1).to(like) for x in (MEAN, STD))

    @torch.no_grad()
    def encode(self, pixels):
        """(B, 3, 1 + 4k, H, W), H and W multiples of 16 -> (B, 16, 1 + k, H/8, W/8), the mean, normalised."""
        self.need_vae()
        if (pixels.shape[2] - 1) % 4:
            raise ValueError(f"{pixels.shape[2]} frames are not 1 + 4k")
        cache = [None] * self.vae._cached_conv_counts["encoder"]
        parts = []
        for part in (pixels[:, :, :1], *pixels[:, :, 1:].split(4, dim=2)):
            if part.shape[2]:
                x = self.vae.encoder(part.to(self.device), feat_cache=cache, feat_idx=[0])
                parts.append(self.vae.quant_conv(x)[:, :16].to(pixels.device))
        latents = torch.cat(parts, dim=2)
        mean, std = self.statistics(latents)
        return (latents - mean) / std

    def decoder(self):
        """A function that decodes a video piece by piece, (B, 16, f, h, w) -> (B, 3, F, 8h, 8w), clamped: the very
        first latent becomes one frame and every other four. Pieces joined equal the whole decoded at once."""
        self.need_vae()
        cache, started = [None] * self.vae._cached_conv_counts["decoder"], False

        @torch.no_grad()
        def decode(latents):
            nonlocal started
            mean, std = self.statistics(latents)
            z = self.vae.post_quant_conv((latents * std + mean).float().to(self.device))
            parts = []
            for piece in z.split(1, dim=2):
                x = self.vae.decoder(piece, feat_cache=cache, feat_idx=[0], first_chunk=not started)
                parts.append(x.clamp(-1, 1).to(latents.device))
                started = True
            return torch.cat(parts, dim=2)
        return decode

    def decode(self, latents):
        """A whole video from its beginning: (B, 16, 1 + k, h, w) -> (B, 3, 1 + 4k, 8h, 8w)."""
        return self.decoder()(latents)

    def show(self, history, target, frames):
        """Pixels of `target` (B, 16, F', h, w), latents that belong at `frames` (B, F') of a video that begins with
        `history`: put in place there and decoded with all before them, since the VAE is causal. One frame, the last of
        its four, for each: (B, 3, F', H, W)."""
        shown = []
        for h, x, at in zip(history, target, frames.long()):
            video = h.new_zeros(h.shape[0], max(h.shape[1], int(at.max()) + 1), *h.shape[2:])
            video[:, :h.shape[1]] = h
            video[:, at] = x.to(video)
            decode, kept = self.decoder(), {}
            for k in range(int(at.max()) + 1):                      # of 20 s only the frames that are shown are kept
                pixels = decode(video[None, :, k:k + 1])[0]         # (3, 1 or 4, H, W)
                if k in at:
                    kept[k] = pixels[:, -1]
            shown.append(torch.stack([kept[k] for k in at.tolist()], dim=1))
        return torch.stack(shown)

    def downsample(self, latents, rate):
        """Mean over blocks (t, h, w): (B, 16, F, h', w') -> (B, 16, F/t, ...), sizes padded up to whole tokens by
        replication. The lone first latent is padded to a block of itself. (The paper encodes a smaller video; a causal
        VAE cannot do that for one segment.)"""
        latents = pad_replicate(latents.float(), (rate[0], 2 * rate[1], 2 * rate[2]))
        return F.avg_pool3d(latents, rate)


class UMT5Prompts:
    """Prompt embeddings of umT5-xxl, (512, 4096), zero after the prompt's last token. 10.6 GiB in bf16, on `device`."""

    def __init__(self, folder, dim=4096, length=512, device="cpu"):
        try:
            from transformers import AutoTokenizer, UMT5EncoderModel
        except ImportError:
            raise UserError("umT5 needs the package transformers: pip install transformers") from None
        self.dim, self.length, self.device = dim, length, device
        self.folder = subfolder(folder, "text_encoder", "--t5")
        beside = self.folder.parent / "tokenizer"
        self.words = beside if beside.is_dir() else self.folder
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(self.words)
        except (OSError, ValueError, RuntimeError) as e:
            raise UserError(f"--t5 {folder}: its tokenizer cannot be read ({first_line(e)}): download it "
                            "again") from None
        self.model = from_pretrained(UMT5EncoderModel, self.folder, f"--t5 {folder}", torch.bfloat16).eval()
        if self.model.config.d_model != dim:
            raise UserError(f"--t5 {folder} makes vectors of {self.model.config.d_model} numbers, but the DiT reads "
                            f"{dim}: give umT5-xxl, the text_encoder of Wan 2.1")

    @property
    def settings(self):
        """What a cache of prompts depends on."""
        return ["umt5", fingerprint(self.folder), fingerprint(self.words), find_spec("ftfy") is not None, self.length]

    def embed(self, tokens):
        """Token numbers (1, n) -> (n, dim), on the device or, where that has too little memory, on the CPU."""
        try:
            return self.model.to(self.device)(tokens.to(self.device)).last_hidden_state[0]
        except torch.OutOfMemoryError:
            warn(f"umT5 does not fit the memory of {self.device} and runs on the CPU, which is slow")
        self.device = "cpu"         # not inside `except`: the error holds on to what did not fit
        return self.model.to("cpu")(tokens).last_hidden_state[0]

    @torch.no_grad()
    def __call__(self, prompt):
        """A text -> (length, dim) float32; all zeros for an empty prompt."""
        rows = torch.zeros(self.length, self.dim)
        prompt = " ".join(clean(prompt).split())
        if prompt:
            tokens = self.tokenizer(prompt, return_tensors="pt").input_ids
            if tokens.shape[1] > self.length:
                warn(f'a prompt of {tokens.shape[1]} tokens is cut to {self.length}: "{prompt[:60]}..."')
                tokens = torch.cat([tokens[:, :self.length - 1], tokens[:, -1:]], dim=1)    # keep the end-of-text token
            rows[:tokens.shape[1]] = self.embed(tokens).float()
        return rows


def clean(text):
    """As Wan cleans prompts: broken encodings mended (where ftfy is installed), HTML entities undone twice."""
    try:
        import ftfy
        text = ftfy.fix_text(text)
    except ImportError:
        pass
    return html.unescape(html.unescape(text)).strip()


class ZeroPrompts:
    """In the place of a text encoder where every prompt is in the cache: knows only the empty one."""
    settings = None

    def __init__(self, dim, length):
        self.dim, self.length = dim, length

    def __call__(self, prompt):
        """"" -> (length, dim) of zeros."""
        if prompt:
            raise UserError("prompts of Wan need umT5: give --t5, a local folder in the diffusers layout")
        return torch.zeros(self.length, self.dim)


def comfy_name(name):
    """The name that ComfyUI reads for a LoRA tensor of the DiT: diffusion_model. + module + lora_A or lora_B."""
    return f"diffusion_model.{name.removeprefix('dit.')}.weight"
