"""The bookkeeping of a training run: progress bar, log, signals, skipped steps."""

import json
import math
import signal
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from util.checkpoint import start_log
from util.cli import Failure, UserError, warn
from util.files import lock_folder, shipped
from util.weights import load_weights, own_config, read_config, weight_files

MOST_SKIPPED = 10  # steps in a row whose gradient is not finite, then the run is given up


def describe(batch, micro_batch, model, base, processes):
    """Print what is about to be trained."""
    dit, phi = (
        sum(p.numel() for p in module.parameters() if p.requires_grad) / 1e6 for module in (model.dit, model.encoder)
    )
    print(f"training {dit:.1f} M parameters of the DiT, {phi:.1f} M of the memory encoder")
    n = processes.world_size
    print(f"batch {batch} = {n} process{'es' * (n > 1)} x {batch / n:g} clips, at most {micro_batch} at once")
    height, width = (size // stride for size, stride in zip(base.sizes[0], base.codec.stride[1:]))  # of a latent
    history = torch.zeros(1, base.dit.in_dim, base.history, height, width, device=processes.device)
    with torch.no_grad():
        t, h, w = model.encoder.rate
        memory = model.encoder.encode(history, history[:, :, ::t, ::h, ::w])
    tokens = 0 if memory is None else memory[0].shape[1]
    uncompressed = base.history * math.prod(-(-size // n) for size, n in zip((height, width), base.dit.patch[1:]))
    print(
        f"memory: {tokens} tokens for a history of {base.history} latents of {height}x{width} (uncompressed: "
        f"{uncompressed}); {base.dit.dim * tokens / history.numel():.3g} channels per latent value"
    )


def check_init(config, base):
    """Refuse a base of another preset or without the expert, and a LoRA on random weights. Raises UserError."""
    base.noise_range(config.expert)
    if config.expert and config.cache_memory:
        raise UserError("--cache_memory --expert: what it caches is of one expert, and both read the memory; drop it")
    if config.init == "random":
        if config.lora:
            raise UserError(
                f"--init random --lora {config.lora}: a checkpoint would hold the LoRA, but not the random "
                "weights under it; give --init a base, or --lora 0"
            )
        return
    trained = own_config(weight_files(base.expert_weights(shipped(config.init), config.expert))[0])
    if trained and trained["preset"] != config.preset:
        raise UserError(
            f"--init {config.init} was trained with --preset {trained['preset']}, not {config.preset}: give a base of "
            "that preset, or train one with finetune.py --method none --init random"
        )


def check_encoder(config, has_stage1):
    """Refuse contradictory encoder flags of stage 2. has_stage1: of its method. Raises UserError."""
    if not has_stage1 and config.encoder not in (type(config).encoder, "none"):
        raise UserError(f"--encoder {config.encoder}: --method {config.method} has no φ of stage 1; drop it")
    for key in ("freeze_encoder", "history_noise"):
        if getattr(config, key) and config.method == "none":
            raise UserError(f"--{key} --method none: there is no memory encoder; drop one of the two")
    if config.expert == "low" and has_stage1 and not config.freeze_encoder:
        raise UserError(
            "--expert low: it reads the memory of the high one's φ; give --encoder its run, --freeze_encoder"
        )
    if config.freeze_encoder and config.encoder == "none":
        raise UserError("--freeze_encoder --encoder none: freezing an untrained φ is pointless; drop one of the two")


def encoder_file(config, has_stage1):
    """The weights of --encoder, or None for a fresh φ. Raises UserError if that run has another preset, method or
    rate."""
    if not has_stage1 or config.encoder == "none":
        return None
    path = Path(config.encoder)
    if not path.exists():
        raise UserError(f"--encoder {config.encoder} is not there: run pretrain.py first, or give none for a fresh φ")
    path = path / "model.safetensors" if path.is_dir() else path
    theirs = read_config(path)
    for key in ("preset", "method", "rate"):
        if theirs.get(key) != getattr(config, key):
            raise UserError(
                f"--encoder {config.encoder} has --{key} {theirs.get(key)}, but {getattr(config, key)} is asked for"
            )
    return path


def load_encoder(encoder, path, device):
    """Read φ from a run of either stage; returns a line that names the run and its step."""

    def rename(name):
        return name.removeprefix("encoder.") if name.startswith("encoder.") else None

    load_weights(encoder, [path], rename, device=device)
    trained = read_config(path)
    return f"φ: {path}, of {trained['stage']}.py, step {trained.get('step')} of {trained.get('steps')}"


def claim_folder(out, resume, processes):
    """Lock a run's folder, before the work begins. Raises UserError if another run writes there, or if it holds a run
    and is not to be resumed."""
    for name in ("state.pt", "model.safetensors", "log.jsonl") if not resume else ():
        if (Path(out) / name).exists():
            raise UserError(f"--out {out} holds a {name} already: go on with --resume, or give another folder")
    if processes.rank == 0:
        lock_folder(out)


class Run:
    """One training run, from step `first` on. Ctrl-C and SIGTERM are collected in `signals`: the step is finished, the
    run saved, then it stops."""

    def __init__(self, stage, out, first, steps, processes):
        self.stage, self.out, self.steps, self.processes = stage, Path(out), steps, processes
        self.signals, self.skipped, self.started = [], 0, time.time()
        if processes.rank == 0:
            if first >= steps:
                warn(f"{out} has {first} steps already: --steps {steps} asks for no more")
            start_log(self.out, first)
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, lambda number, frame: self.signals.append(number))
        self.bar = tqdm(range(first, steps), initial=first, total=steps, desc=stage, disable=processes.rank > 0)

    def is_finite(self, norm, step):
        """Whether the gradient of this norm can be used; counts steps that are skipped. The same on every rank."""
        if math.isfinite(norm):
            self.skipped = 0
            return True
        self.skipped += 1
        if self.processes.rank == 0:
            tqdm.write(f"step {step + 1}: the gradient is not finite, the step is skipped")
        return False

    @property
    def gave_up(self):
        return self.skipped == MOST_SKIPPED

    def log(self, record, validated):
        """Append a step's record to log.jsonl, and print it if it was validated."""
        if self.skipped:
            record["skipped"] = self.skipped
        if validated:
            record["minutes"] = round((time.time() - self.started) / 60, 2)  # since this start, after a --resume too
        self.bar.set_postfix(loss=f"{record['loss']:.3f}", refresh=False)
        if self.processes.rank == 0:
            if validated:
                tqdm.write("  ".join(f"{k} {v:.4g}" for k, v in record.items()))
            try:
                with (self.out / "log.jsonl").open("a") as log:
                    log.write(json.dumps(record) + "\n")
            except OSError as e:
                message = f"{self.out} cannot be written any more ({e.strerror})"
                raise Failure(f"{message}: what was saved there before is what there is") from None

    def finish(self, step, stop):
        """Say how the run ended, leave the other processes, and exit if it was stopped (by the signal `stop`) or gave
        up."""
        code = 1 if self.gave_up else 128 + stop if stop else 0
        if self.processes.rank == 0:
            if self.gave_up:  # the checkpoint stays that of a better time
                message = f"error: the gradient was not finite {self.skipped} times in a row, up to step {step}"
                tqdm.write(f"{message}; {self.out} stays as it was last saved", file=sys.stderr)
            elif stop:
                tqdm.write(f"stopped by a signal after step {step}, saved in {self.out}; go on with --resume")
            else:
                weights, log = self.out / "model.safetensors", self.out / "log.jsonl"
                print(f"{self.stage} done: weights {weights}, figures {log}, pictures {self.out}/preview_*.png")
        self.processes.shutdown()
        if code:
            raise SystemExit(code)
