"""Wan's prompts: embeddings of umT5-xxl, from a local folder through transformers."""

import html
from importlib.util import find_spec

import torch

from bases.pretrained import (
    fingerprint,
    from_pretrained,
    import_transformers,
    open_tokenizer,
    run_text_model,
    subfolder,
)
from util.cli import UserError, warn


class UMT5Prompts:
    """Prompt embeddings (512, 4096), zero after the prompt's last token. 10.6 GiB in bf16, on a GPU or the CPU."""

    def __init__(self, folder, dim=4096, length=512, device="cpu"):
        transformers = import_transformers("umT5")
        self.dim, self.length = dim, length
        self.device = device if torch.device(device).type == "cuda" else "cpu"
        self.folder = subfolder(folder, "text_encoder", "--t5")
        beside = self.folder.parent / "tokenizer"
        self.words = beside if beside.is_dir() else self.folder
        self.tokenizer = open_tokenizer(self.words, f"--t5 {folder}")
        self.model = from_pretrained(
            transformers.UMT5EncoderModel, self.folder, f"--t5 {folder}", torch.bfloat16
        ).eval()
        if self.model.config.d_model != dim:
            raise UserError(
                f"--t5 {folder} makes vectors of {self.model.config.d_model} numbers, but the DiT reads {dim}: give "
                "umT5-xxl, the text_encoder of Wan 2.1"
            )

    @property
    def settings(self):
        return ["umt5", fingerprint(self.folder), fingerprint(self.words), find_spec("ftfy") is not None, self.length]

    def embed(self, tokens):
        """Token ids (1, n) -> (n, dim), on the device or, if it has too little memory, on the CPU."""
        made, self.device = run_text_model(self.model, tokens, self.device, "umT5")
        return made.last_hidden_state[0]

    @torch.no_grad()
    def __call__(self, prompt):
        """A text -> (length, dim) float32; all zeros for an empty prompt."""
        rows = torch.zeros(self.length, self.dim)
        prompt = " ".join(clean(prompt).split())
        if not prompt:
            return rows
        tokens = self.tokenizer(prompt, return_tensors="pt").input_ids
        if tokens.shape[1] > self.length:
            warn(f'a prompt of {tokens.shape[1]} tokens is cut to {self.length}: "{prompt[:60]}..."')
            tokens = torch.cat([tokens[:, : self.length - 1], tokens[:, -1:]], dim=1)  # keep the end-of-text token
        rows[: tokens.shape[1]] = self.embed(tokens).float()
        return rows


def clean(text):
    """Clean a prompt as Wan does: mend broken encodings (if ftfy is installed), undo HTML entities twice."""
    try:
        import ftfy

        text = ftfy.fix_text(text)
    except ImportError:
        pass
    return html.unescape(html.unescape(text)).strip()


class NoPrompts:
    """Stands in for a text encoder that was not given: knows the empty prompt alone."""

    settings = None

    def __init__(self, dim, length, whose="Wan need umT5"):
        self.dim, self.length, self.whose = dim, length, whose

    def __call__(self, prompt):
        """The empty prompt -> (length, dim) of zeros. Raises UserError for any other."""
        if prompt:
            raise UserError(f"prompts of {self.whose}: give --t5, a local folder in the diffusers layout")
        return torch.zeros(self.length, self.dim)
