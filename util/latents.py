"""A folder of videos as latents, encoded once per video."""

import hashlib
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

from util.cache import VERSION
from util.cli import UserError, warn
from util.files import atomic_write, file_hash
from util.folder import read_clip, why_unusable
from util.storyboard import storyboard_beside
from util.video import READING, to_pixels
from util.weights import open_safetensors


def encode_videos(folder, paths, base, cache, rate=None, captions=storyboard_beside):
    """Encode some videos of a folder -> ({name in the folder: (latents (C, F, h, w) float16, storyboard [(first latent
    frame, prompt)], low)}, [why a file cannot be used]).

    rate: (t, h, w) of `low`, or None; captions(path) -> [(seconds, prompt)] of a video, or None. Raises UserError.
    """
    encoded, skipped, longer = {}, [], []
    stride = base.codec.stride[0]
    for path in tqdm(paths, desc="encoding videos"):
        try:
            latents = encode_video(path, base, cache)
            if latents.shape[1] < 2 * base.section:
                least = 2 * base.section * stride / base.fps
                raise UserError(f"{path} is shorter than one segment and one section, {least:g} s")
            low = encode_video(path, base, cache, rate) if rate else None
            prompts = captions(path)
        except Exception as e:
            skipped.append(why_unusable(path, e))
            continue
        if prompts is None:
            warn(f"no caption beside {path} (.txt or .json): trained without a prompt")
        board = [(round(seconds * base.fps / stride), prompt) for seconds, prompt in prompts or []]
        if board and board[-1][0] >= latents.shape[1]:
            longer.append(path)
        encoded[path.relative_to(folder).as_posix()] = latents, board, low
    if longer:
        warn(f"{len(longer)} storyboards go on after their videos end (as that of {longer[0]}): the rest is not used")
    return encoded, skipped


def encode_video(path, base, cache, rate=None):
    """Latents (C, F, h, w) float16 of a whole video, or of the smaller video of this rate, cached under its content and
    all settings that matter."""
    key = repr((base.fps, base.sizes, base.codec.settings, rate and rate[1:], READING, VERSION, file_hash(path)))
    key = hashlib.sha256(key.encode()).hexdigest()
    file = Path(cache) / "videos" / f"{key[:24]}.safetensors"
    if not file.exists():
        frames = read_clip(path, base)
        pixels = to_pixels(frames[: base.codec.frames(len(frames))])[None]
        latents = (base.codec.encode_low(pixels, rate) if rate else base.codec.encode(pixels))[0]
        with atomic_write(file, replace=True) as part:
            save_file({"latents": latents.half().contiguous()}, part)
    try:
        with open_safetensors(file) as f:
            return f.get_tensor("latents")
    except (UserError, SafetensorError):
        raise UserError(f"{file} is damaged: delete it, then it is made again") from None
