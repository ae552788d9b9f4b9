"""HunyuanVideo's prompts: hidden states of LLaVA's LLaMA 3 and the pooled vector of CLIP, from a local folder through
transformers."""

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

TEMPLATE = (  # of videos
    "<|start_header_id|>system<|end_header_id|>\n\nDescribe the video by detailing the following aspects: "
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
)
SKIPPED_LAYERS = 2  # the last ones of LLaMA, and its norm: the DiT reads the hidden states before them


class LlavaPrompts:
    """Prompt embeddings (257, 4096): row 0 is CLIP's pooled vector, 768 numbers and zeros; then LLaMA's hidden states,
    zero after the prompt's last token. 14 GiB in float16, on a GPU or the CPU."""

    def __init__(self, folder, dim=4096, length=257, pooled_dim=768, device="cpu"):
        transformers = import_transformers("HunyuanVideo's text encoders")
        self.dim, self.length = dim, length
        self.device = device if torch.device(device).type == "cuda" else "cpu"
        self.folders, self.models, self.tokenizers = [], [], []
        for part, cls, width in ("", transformers.LlamaModel, dim), ("_2", transformers.CLIPTextModel, pooled_dim):
            path = subfolder(folder, f"text_encoder{part}", "--t5")
            flag = f"--t5 {folder}"
            words = path.parent / f"tokenizer{part}"
            self.folders += [path, words]
            self.tokenizers.append(open_tokenizer(words, flag))
            self.models.append(from_pretrained(cls, path, flag, torch.float16).eval())
            if self.models[-1].config.hidden_size != width:
                raise UserError(
                    f"{flag}: {path.name} makes vectors of {self.models[-1].config.hidden_size} numbers, but the DiT "
                    f"reads {width}: give the text encoders of HunyuanVideo"
                )
        del self.models[0].layers[-SKIPPED_LAYERS:]
        self.models[0].norm = torch.nn.Identity()
        self.start = len(self.tokenizers[0](TEMPLATE.partition("{}")[0]).input_ids)  # tokens before the prompt

    @property
    def settings(self):
        return ["llava", *map(fingerprint, self.folders), self.length]

    @torch.no_grad()
    def __call__(self, prompt):
        """A text -> (length, dim) float32; all zeros for an empty prompt."""
        rows, prompt = torch.zeros(self.length, self.dim), prompt.strip()
        if not prompt:
            return rows
        tokens = self.tokenizers[0](TEMPLATE.format(prompt), return_tensors="pt").input_ids
        most = self.start + self.length - 1
        if tokens.shape[1] > most:
            n = tokens.shape[1] - self.start
            warn(f'a prompt of {n} tokens is cut to {self.length - 1}: "{prompt[:60]}..."')
        made, self.device = run_text_model(self.models[0], tokens[:, :most], self.device, "LLaMA")
        made = made.last_hidden_state[0, self.start :].float()
        tokens = self.tokenizers[1](prompt, return_tensors="pt", truncation=True, max_length=77).input_ids
        pooled, _ = run_text_model(self.models[1], tokens, self.device, "CLIP")
        pooled = pooled.pooler_output[0].float()
        rows[0, : len(pooled)], rows[1 : 1 + len(made)] = pooled.cpu(), made.cpu()
        return rows
