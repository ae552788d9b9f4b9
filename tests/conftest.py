"""Fixtures that tests share. Data is tiny, seeded and made here."""

import importlib
import os
import signal

import pytest
import torch

import finetune
import pretrain
from bases.wan import WanCodec
from bases.wan22 import Wan22Codec
from data import story_clips
from tests.common import flags, run, tiny_base
from util.cli import warn

if os.environ.get("OPTIONAL") == "required":  # then a package that is missing is an error, no reason to skip
    pytest.importorskip = importlib.import_module

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored
torch.set_num_threads(1)  # everything here is so small that threads only wait for each other
# oneDNN and ideep keep what they compile for each new shape, 1,024 kernels each: tests of memory would measure that
os.environ |= {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32", "LRU_CACHE_CAPACITY": "32"}


@pytest.fixture(autouse=True)
def nothing_left_behind(tmp_path, monkeypatch):
    """Files go to tmp_path; training takes over the signals of the process, so they are restored."""
    monkeypatch.chdir(tmp_path)
    warn.cache_clear()  # a warning is said once per process
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for s, handler in handlers.items():
        signal.signal(s, handler)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A folder that holds the encoded stories of all tests."""
    path = tmp_path_factory.mktemp("cache")
    for split, count in ("train", 8), ("held-out", 2):
        story_clips(split, count, tiny_base(), path, (2, 4, 4))
    return path


@pytest.fixture
def clips(cache):
    return story_clips("train", 8, tiny_base(), cache, (2, 4, 4)).clips


@pytest.fixture
def refused(capsys, tmp_path):
    """refused(main, *flags): a user's mistake is one line, exit code 2, and changes no file; returns the line."""

    def check(main, *flags):
        def files():
            return sorted(p for p in tmp_path.rglob("*") if p.is_file())

        before = files()
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run(main, *flags)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
        assert files() == before
        return error

    return check


def quiet_runs(main, folder, given):
    """Tiny runs {name: flags} of a stage in this folder, which leave the signals of the process alone."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(signal, "signal", lambda *a: None)
        for name, changes in given.items():
            run(main, *flags(out=folder / name, **changes))
    return folder


@pytest.fixture(scope="session")
def stage1(cache, tmp_path_factory):
    """A short run of stage 1."""
    return quiet_runs(pretrain.main, tmp_path_factory.mktemp("stage1"), {"run": dict(cache=cache, steps=40)}) / "run"


@pytest.fixture(scope="session")
def stage1_runs(cache, tmp_path_factory):
    """Short runs of stage 1 that one table may hold: proposed-0, proposed-1, full-0."""
    given = {
        f"{method}-{seed}": dict(cache=cache, method=method, seed=seed, steps=2)
        for method, seed in (("proposed", 0), ("proposed", 1), ("full", 0))
    }
    return quiet_runs(pretrain.main, tmp_path_factory.mktemp("runs"), given)


@pytest.fixture(scope="session")
def stage2_runs(cache, stage1, tmp_path_factory):
    """Short runs of stage 2 that one table may hold, a to f."""
    given = dict(
        a=dict(encoder=stage1),
        b=dict(encoder=stage1, seed=1),
        c=dict(encoder="none"),
        d=dict(encoder=stage1, freeze_encoder=True),
        e=dict(method="sliding-window", window=3),
        f=dict(method="none"),
    )
    given = {name: dict(cache=cache, steps=2) | changes for name, changes in given.items()}
    return quiet_runs(finetune.main, tmp_path_factory.mktemp("stage2"), given)


def tiny_vae(codec, path, **changes):
    """A folder with the VAE of one of Wan's codecs, tiny and random."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    tiny = dict(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    diffusers.AutoencoderKLWan(**codec.architecture | tiny | changes).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def vae(tmp_path_factory):
    """Wan 2.1's."""
    return tiny_vae(WanCodec, tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="session")
def vae22(tmp_path_factory):
    """Wan 2.2's."""
    return tiny_vae(Wan22Codec, tmp_path_factory.mktemp("vae22"), decoder_base_dim=12)


@pytest.fixture(scope="session")
def t5(tmp_path_factory):
    """A folder with umT5 and its tokenizer, tiny and random, as in a diffusers pipeline."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    path = tmp_path_factory.mktemp("pipeline")
    words = {w: i for i, w in enumerate("<pad> </s> <unk> a cat dog walks & 'quoted'".split())}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    special = dict(eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(path / "tokenizer")
    torch.manual_seed(0)
    config = transformers.UMT5Config(
        vocab_size=9, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, tie_word_embeddings=False
    )
    transformers.UMT5EncoderModel(config).save_pretrained(path / "text_encoder")
    return path
