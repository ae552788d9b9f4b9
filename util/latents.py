"""A folder of videos as latents, encoded once per video."""

import hashlib
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

from util.cache import VERSION
from util.cli import UserError, warn
from util.files import atomic_write, check_writable, file_hash
from util.folder import read_clip, warn_longer, why_unusable
from util.storyboard import storyboard_beside
from util.video import READING, to_pixels
from util.weights import open_safetensors


def encode_videos(folder, paths, base, cache, rate=None, captions=storyboard_beside):
    """Encode some videos of a folder -> ({name in the folder: fields of its Clip, by name}, [why a file cannot be
    used]).

    rate: (t, h, w) of `low`, or None; captions(path) -> [(seconds, prompt)] of a video, or None. Raises UserError.
    """
    encoded, skipped, longer = {}, [], []
    stride = base.codec.stride[0]
    for path in tqdm(paths, desc="encoding videos"):
        try:
            latents, *low = encode_video(path, base, cache, [None, rate] if rate else [None])
            if latents.shape[1] < 2 * base.section:
                least = 2 * base.section * stride / base.fps
                raise UserError(f"{path} is shorter than one segment and one section, {least:g} s")
            prompts = captions(path)
        except Exception as e:
            skipped.append(why_unusable(path, e))
            continue
        if prompts is None:
            warn(f"no caption beside {path} (.txt, .srt or .json): trained without a prompt")
        board = [(round(seconds * base.fps / stride), prompt) for seconds, prompt in prompts or []]
        if board and board[-1][0] >= latents.shape[1]:
            longer.append(path)
        clip = dict(latents=latents, storyboard=board)
        encoded[path.relative_to(folder).as_posix()] = clip | dict(zip(["low"], low))
    warn_longer(longer)
    return encoded, skipped


def encode_video(path, base, cache, rates):
    """Latents (C, F, h, w) float16 of a whole video, for each of `rates`, see encode_frames(); cached under its content
    and all settings that matter."""
    settings = base.fps, base.sizes, base.codec.settings, READING, VERSION, file_hash(path)

    def make(missing):
        frames = read_clip(path, base)
        return encode_frames(frames[: base.codec.frames(len(frames))], base.codec, missing)

    files = {rate: Path(cache) / "videos" / f"{digest(settings, rate)[:24]}.safetensors" for rate in rates}
    return load_or_make(files, make)


def digest(settings, rate):
    """A name in hexadecimal for latents that depend on these settings; rate: as in encode_frames()."""
    key = settings if rate is None else (*settings, rate)
    return hashlib.sha256(repr(key).encode()).hexdigest()


def encode_frames(frames, codec, rates):
    """Latents (C, F, h, w) float16 of frames uint8 (F, H, W, 3) for each of `rates`: None for the video itself,
    (t, h, w) for the smaller one."""
    pixels = to_pixels(frames)[None]
    return [(codec.encode(pixels) if rate is None else codec.encode_low(pixels, rate))[0].half() for rate in rates]


def load_or_make(files, make):
    """The tensor in each of `files` {key: path}. make(keys) -> those whose files are missing, which are then written.

    Raises UserError if a file is damaged, or cannot be written.
    """
    missing = [key for key, file in files.items() if not file.exists()]
    for key in missing:
        check_writable(files[key])
    for key, latents in zip(missing, make(missing) if missing else ()):
        with atomic_write(files[key], replace=True) as part:
            save_file({"latents": latents.contiguous()}, part)
    return [read_latents(file) for file in files.values()]


def read_latents(file):
    """The tensor in a file that load_or_make() wrote. Raises UserError."""
    try:
        with open_safetensors(file) as f:
            return f.get_tensor("latents")
    except (UserError, SafetensorError):
        raise UserError(f"{file} is damaged: delete it, then it is made again") from None
