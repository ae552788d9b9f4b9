"""The prompts of nano and small, and what every base has. (Codecs: test_codec.py, test_wan.py.)"""

import pytest
import torch

from bases import BASES, open_base
from bases.nano import HashPrompts, hash_word
from util.cli import UserError


def test_prompts_are_words_and_their_positions():
    prompts = HashPrompts(16, 5)
    a, b = prompts("A cat, a dog"), prompts("dog dog the cat a dog and more")
    assert a.shape == b.shape == (5, 16) and torch.equal(a, HashPrompts(16, 5)("a cat a dog"))

    def position(i):
        return 0.5 * torch.from_numpy(hash_word(f"position {i}", 16))

    assert torch.allclose(a[1] - position(1), b[3] - position(3))  # cat
    assert torch.allclose(a[3] - position(3), b[0] - position(0))  # dog
    assert torch.equal(a[4], torch.zeros(16)) and b.any(1).all()
    assert not prompts("").any() and not prompts(" ,. ").any()


def test_a_prompt_that_is_too_long_is_cut_with_a_warning(capsys):
    prompts = HashPrompts(16, 5)
    assert torch.equal(prompts("one two three four five six"), prompts("one two three four five"))
    assert 'a prompt of 6 words is cut to 5: "one two' in capsys.readouterr().err


def test_words_are_independent_vectors_and_the_same_on_every_machine():
    words = torch.stack([torch.from_numpy(hash_word(w, 64)) for w in "one two three four five six".split()])
    assert (torch.corrcoef(words) - torch.eye(6)).abs().max() < 0.6 and 0.8 < words.var() < 1.2
    # the shipped weights rely on it
    assert hash_word("cat", 3).tolist() == pytest.approx([2.32206, -0.77695, -1.08425], 1e-4)


def test_a_base_that_is_not_there():
    with pytest.raises(UserError, match="--preset nanno: choose one of .*nano"):
        open_base("nanno")
    with pytest.raises(UserError, match="--t5 here does nothing: --preset nano needs no such weights"):
        open_base("nano", t5="here")
    with pytest.raises(UserError, match="no file here: expected safetensors weights"):
        open_base("nano", vae="here")


@pytest.mark.parametrize("name", [name for name in BASES if not name.startswith("tiny")])
def test_sizes_and_histories_are_whole(name):
    """Every size is whole tokens, every history whole segments."""
    base = open_base(name)
    for size in base.sizes:
        assert all(n % (s * p) == 0 for n, s, p in zip(size, base.codec.stride[1:], base.dit.patch[1:]))
    assert (base.history - base.codec.causal) % base.section == 0
    assert base.dit.in_dim == base.codec.channels and base.prompts.length == base.dit.text_len
    seconds = base.history * base.codec.stride[0] / base.fps
    assert base.name == name and seconds == pytest.approx(20, abs=0.3)
