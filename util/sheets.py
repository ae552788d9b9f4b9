"""Contact sheets: labelled rows of frames in one picture."""

import math

import imageio.v3 as iio
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from util.files import atomic_write

COLUMNS = 12  # of a SectionSheet


def sheet_path(video):
    """The path of a video's contact sheet, of its own: p.png of p.mp4, but p.gif.png of p.gif."""
    return video.with_suffix(".png") if video.suffix == ".mp4" else video.with_name(f"{video.name}.png")


def contact_sheet(rows, columns=None, scale=None):
    """A picture of rows of frames on white, each with its label at the left: uint8 array (H, W, 3).

    rows     list of (label, frames (F, H, W, 3) uint8)
    columns  captions above the columns
    scale    whole factor to enlarge by (nearest neighbour); by default the largest that keeps a frame's short side
             within 128
    """
    labels, captions = [str(label) for label, _ in rows], [str(caption) for caption in columns or []]
    rows = [torch.as_tensor(frames).cpu().numpy() for _, frames in rows]
    scale = scale or max(1, 128 // min(min(frames.shape[1:3]) for frames in rows))
    cell_h, cell_w = (scale * max(frames.shape[axis] for frames in rows) for axis in (1, 2))
    font = ImageFont.load_default(size=min(40, max(14, cell_h // 8)))
    label_w, caption_w = text_width(labels, font), text_width(captions, font)
    gap, margin = max(2, cell_h // 40), max(6, cell_h // 16)
    step_x, step_y = max(cell_w, caption_w + margin) + gap, cell_h + gap
    left = margin + (label_w + margin if label_w else 0)
    top = margin + (font.size + margin if captions else 0)
    n = max([len(captions), *map(len, rows)])
    sheet = Image.new("RGB", (left + n * step_x - gap + margin, top + len(rows) * step_y - gap + margin), "white")
    draw = ImageDraw.Draw(sheet)
    for i, caption in enumerate(captions):
        draw.text((left + i * step_x + (step_x - gap) / 2, margin), caption, "black", font, anchor="ma")
    for r, (label, frames) in enumerate(zip(labels, rows)):
        draw.multiline_text((margin, top + r * step_y + cell_h / 2), label, "black", font, anchor="lm")
        for i, frame in enumerate(frames):
            picture = Image.fromarray(frame.repeat(scale, 0).repeat(scale, 1))
            x = left + i * step_x + (step_x - gap - picture.width) // 2
            y = top + r * step_y + (cell_h - picture.height) // 2
            sheet.paste(picture, (x, y))
    return np.array(sheet)


def text_width(texts, font):
    """Width in pixels of the widest of these texts, which may have several lines; 0 if there are none."""
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    return max([0, *(math.ceil(ruler.multiline_textbbox((0, 0), text, font=font)[2]) for text in texts)])


def save_contact_sheet(rows, path, columns=None, scale=None, replace=False):
    """Write a contact_sheet() as a PNG. Raises UserError if `path` cannot be written."""
    sheet = contact_sheet(rows, columns, scale)
    with atomic_write(path, replace) as temporary:
        iio.imwrite(temporary, sheet, extension=".png")


class SectionSheet:
    """A labelled picture: the newest sections of the history above, one frame each; below, at most 48 new ones."""

    def __init__(self, newest, n_frames, length, sections, fps):
        """newest (F, H, W, 3): the last of the history's n_frames frames; length: frames per section; sections: how
        many will be added."""
        self.length, self.fps, self.n_added, self.kept = length, fps, 0, []
        first, middle = n_frames - len(newest), n_frames % length // 2
        places = [i for i in range(len(newest)) if (first + i) % length == middle]
        self.history = newest[places[-COLUMNS:]]
        self.every = max(1, self.length // 4, math.ceil(sections * self.length / 48))

    def add(self, frames):
        """Keep every so many of a section's frames, counted on across sections."""
        self.kept.append(frames[-self.n_added % self.every :: self.every].clone())
        self.n_added += len(frames)

    def save(self, path):
        rows, kept = [("history,\none frame per section", self.history)], torch.cat(self.kept)
        rows, after = (rows, "new, from {:g} s\nafter its end") if len(self.history) else ([], "from {:g} s")
        for first in range(0, len(kept), COLUMNS):
            seconds = first * self.every / self.fps
            rows.append((after.format(seconds), kept[first : first + COLUMNS]))
        save_contact_sheet(rows, path)


def save_preview(path, truth, result, n_clips=4, replace=False):
    """Write a PNG of the first clips with three rows each: original frames, what the model made, their difference."""
    rows = []
    for a, b in zip(truth[:n_clips], result[:n_clips]):
        difference = (a.int() - b.int()).abs().clamp(max=255).to(torch.uint8)
        rows += [("original", a), ("model", b), ("difference", difference)]
    save_contact_sheet(rows, path, replace=replace)
