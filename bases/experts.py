"""Bases with two DiTs, experts for high and for low noise levels, as Wan 2.2 A14B has them."""

from pathlib import Path

import torch
import torch.nn as nn

from bases.base import Base
from util.cli import UserError
from util.weights import load_weights, open_safetensors, read_config, weight_files

PAIRED = "stage", "preset", "expert", "method", "rate", "window", "anchor", "cross_attention"  # must agree

# where the weights of each lie in the folder of both: diffusers' layout, the official one
FOLDERS = {"high": ("transformer", "high_noise_model"), "low": ("transformer_2", "low_noise_model")}


class Experts(nn.Module):
    """Two DiTs called like one: `high` from the noise level `boundary` on, `low` below it.

    The one that is not needed waits in host memory: it is no submodule, so it stays there wherever this one goes.
    low_reads: False for a low one that was not trained to read memory.
    """

    def __init__(self, high, low, boundary, low_reads=True):
        super().__init__()
        self.current, self.waiting = high, [low.to("cpu")]
        self.is_high, self.boundary, self.low_reads = True, boundary, low_reads

    def forward(self, x, t, text, times=None, memory=None):
        """As DiT.forward; all noise levels of a batch are on one side of the boundary."""
        if self.is_high != (t[0].item() >= 1000 * self.boundary):
            current = self.waiting.pop()
            self.waiting.append(self.current.to("cpu"))  # first, so that both are never on one GPU
            self.current, self.is_high = current.to(x.device), not self.is_high
        return self.current(x, t, text, times, memory if self.is_high or self.low_reads else None)


class TwoExperts(Base):
    """A base of two experts. Each is trained alone, on its own noise levels, and has a checkpoint of its own; both read
    the memory of one φ, which is trained with the high one."""

    def noise_range(self, expert):
        ranges = {"high": (self.boundary, 1.0), "low": (0.0, self.boundary)}
        if expert not in ranges:
            raise UserError(f"--expert {expert}: --preset {self.name} has two DiTs; choose high or low")
        return ranges[expert]

    def expert_weights(self, path, expert):
        self.noise_range(expert)
        path, other = Path(path), "low" if expert == "high" else "high"
        ours, theirs = ([path / name for name in FOLDERS[which]] for which in (expert, other))
        found = [folder for folder in ours if folder.is_dir()]
        if path.name in FOLDERS[other] or not found and any(folder.is_dir() for folder in theirs):
            names = " or ".join(FOLDERS[expert])
            raise UserError(f"--init {path} has no weights of the {expert} expert: give the folder of both, or {names}")
        return found[0] if found else path

    def check_low(self, config, trained):
        if config.low_guidance is None:  # one number is for both, as in Wan's own code
            config.low_guidance = self.low_guidance if config.guidance is None else config.guidance
        path = config.low_checkpoint
        if not trained and path:
            raise UserError(f"--low_checkpoint {path} does nothing for random weights: drop it")
        if not trained:  # one random DiT for all noise levels takes as long
            return
        if trained.get("expert") != "high":
            raise UserError(
                f"{config.checkpoint} is of the low expert: give it as --low_checkpoint, and the high one's"
            )
        if config.lora:
            raise UserError(f"--lora {config.lora}: two DiTs would need a file each, which is not supported; drop it")
        if not path and not trained.get("lora"):
            raise UserError("--low_checkpoint is missing: give the low expert's")
        if path:
            self.check_pair(config.checkpoint, trained, path, read_config(path))
        if config.init:
            weight_files(self.expert_weights(config.init, "low"))

    def check_pair(self, high, trained, low, theirs):
        """Raise UserError unless two checkpoints with these configs are of both experts, with one φ."""
        for key, value in {**trained, "expert": "low"}.items():
            if key in PAIRED and theirs.get(key) != value:
                raise UserError(f"--low_checkpoint {low} has {key} {theirs.get(key)}, but {value} is needed")
        with open_safetensors(high) as a, open_safetensors(low) as b:
            names = [{name for name in f.keys() if name.startswith("encoder.")} for f in (a, b)]
            if names[0] != names[1] or not all(torch.equal(a.get_tensor(n), b.get_tensor(n)) for n in names[0]):
                raise UserError(
                    f"--low_checkpoint {low} has another φ than {high}: train it with --encoder {high} --freeze_encoder"
                )

    def add_low(self, dit, config):
        device, path = next(dit.parameters()).device, config.low_checkpoint
        trained = read_config(path) if path else {}
        with torch.device("meta"):
            low = self.make_dit()
        lora = trained.get("lora", 1)
        if lora:
            self.load_dit(low, self.expert_weights(config.init, "low"), device, frozen=True, wait=True)
        if path and lora:
            self.add_lora(low, lora)
        if trained.get("cross_attention"):
            low.add_cross_attention()
        if path:
            names = [name for name in low.state_dict() if not lora or ".lora_" in name or "memory" in name]
            rename = lambda name: name.removeprefix("dit.") if name.startswith("dit.") else None
            load_weights(low, [path], rename, names)
        if config.merge:
            self.merge_lora(low)
        return Experts(dit, low.eval(), self.boundary, low_reads=bool(path))
