"""HunyuanVideo's VAE and text encoders, tiny and random; they need diffusers and transformers."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import bases
import finetune
import pretrain
import sample
from bases import hunyuan, open_base
from bases.hunyuan import SCALE, HunyuanCodec
from bases.hunyuan_dit import HunyuanConfig, HunyuanDiT
from bases.llava import TEMPLATE, LlavaPrompts
from tests.common import randn, randomize, run, script, write_video
from tests.test_budget import Live
from util.cli import UserError
from util.video import read_video

pytestmark = pytest.mark.optional


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A folder with the VAE, tiny and random."""
    diffusers = pytest.importorskip("diffusers")
    path = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    tiny = dict(block_out_channels=[8, 8, 16, 16], layers_per_block=1, norm_num_groups=4)
    diffusers.AutoencoderKLHunyuanVideo(**tiny).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def video():
    return randn(1, 3, 37, 32, 48).clamp(-1, 1)


# ---------------------------------------------------------------------------------------------------------------------
# The VAE


def test_blocks_are_encoded_as_diffusers_encodes_them(vae, video):
    """Each block's latents are those of the VAE on the block's frames and the five before it."""
    codec = HunyuanCodec(vae)
    latents = codec.encode(video)
    assert latents.shape == (1, 16, 10, 4, 6)

    @torch.no_grad()
    def theirs(first, last):
        codec.vae.use_framewise_encoding = False
        return SCALE * codec.vae.encode(video[:, :, first:last]).latent_dist.mode()

    assert torch.allclose(latents[:, :, :1], theirs(0, 1), atol=1e-5)
    assert torch.allclose(latents[:, :, 1:5], theirs(0, 17)[:, :, 1:], atol=1e-5)
    assert torch.allclose(latents[:, :, 5:9], theirs(12, 33)[:, :, 2:], atol=1e-5)
    assert torch.allclose(latents[:, :, 9:], theirs(28, 37)[:, :, 2:], atol=1e-5)  # a rest
    assert (latents[:, :, :5] - theirs(0, 37)[:, :, :5]).abs().max() > 1e-3  # all at once: later frames matter
    with pytest.raises(ValueError, match="36 frames are not 1 \\+ 4k"):
        codec.encode(video[:, :, :36])


def test_blocks_are_decoded_after_two_latents(vae):
    codec, latents = HunyuanCodec(vae), randn(1, 16, 10, 4, 6)
    pixels = codec.decode(latents)
    assert pixels.shape == (1, 3, 37, 32, 48) and pixels.std() > 0.01

    @torch.no_grad()
    def theirs(first, last):
        codec.vae.use_framewise_decoding = False
        return codec.vae.decode(latents[:, :, first:last] / SCALE).sample.clamp(-1, 1)

    assert torch.allclose(pixels[:, :, :1], theirs(0, 1), atol=1e-5)
    assert torch.allclose(pixels[:, :, 1:17], theirs(0, 5)[:, :, 1:], atol=1e-5)
    assert torch.allclose(pixels[:, :, 17:33], theirs(3, 9)[:, :, 5:], atol=1e-5)
    assert torch.allclose(pixels[:, :, 33:], theirs(7, 10)[:, :, 5:], atol=1e-5)


def test_sections_in_pieces_equal_the_whole(vae, video):
    """Appending a section changes nothing that went before, in both directions."""
    codec = HunyuanCodec(vae)
    latents, encode, decode = codec.encode(video[:, :, :33]), codec.encoder(), codec.decoder()
    pieces = [encode(piece) for piece in video[:, :, :33].split([1, 16, 16], dim=2)]
    assert torch.equal(torch.cat(pieces, dim=2), latents) and torch.equal(codec.encode(video)[:, :, :9], latents)
    whole = codec.decode(latents)
    assert torch.equal(torch.cat([decode(piece) for piece in latents.split([1, 8], dim=2)], dim=2), whole)
    after, section = codec.decoder(), randn(1, 16, 8, 4, 6)
    after(latents[:, :, -codec.lookback :])
    assert torch.equal(after(section), decode(section))
    other = codec.decoder()
    other(latents[:, :, -1:])
    assert not torch.equal(other(section), after(section))


def test_low_is_a_stream_of_the_smaller_video(vae, video):
    codec, rate = HunyuanCodec(vae), (2, 2, 2)
    low, encode = codec.encode_low(video[:, :, :33], rate), codec.low_encoder(rate)
    assert low.shape == (1, 16, 5, 2, 3) and codec.block == 4
    pieces = [encode(piece) for piece in (video[:, :, :1], *video[:, :, 1:33].split(16, dim=2))]
    assert torch.equal(torch.cat(pieces, dim=2), low)
    assert torch.equal(codec.cut_low(low, 0, 5, 2), codec.encode_low(video[:, :, :17], rate))
    small = video[:, :, :33:2].unfold(3, 2, 2).unfold(4, 2, 2).mean((5, 6))
    codec.block = 2  # 4 latents of the video are 2 of the smaller one
    assert torch.allclose(codec.encode(small), low, atol=1e-5)


def test_frames_are_shown_in_their_place(vae):
    codec, latents, other = HunyuanCodec(vae), randn(2, 16, 10, 2, 2), randn(2, 16, 10, 2, 2, seed=1)
    shown = codec.show(latents, other[:, :, [0, 2, 6]], torch.tensor([[0, 2, 6], [3, 5, 9]]))
    assert shown.shape == (2, 3, 3, 16, 16)
    for i, at in enumerate(([0, 2, 6], [3, 5, 9])):
        video = latents[i : i + 1].clone()
        video[:, :, at] = other[i : i + 1, :, [0, 2, 6]]
        assert torch.allclose(shown[i], codec.decode(video)[0][:, [4 * k for k in at]], atol=1e-5)
    beyond = codec.show(latents[:, :, :5], latents[:, :, 5:7], torch.tensor([[5, 6]] * 2))  # the next section
    assert beyond.shape == (2, 3, 2, 16, 16) and beyond.isfinite().all()


def test_memory_of_decoding(monkeypatch):
    """Against all that lives while the real architecture decodes 480x832 in float16, without a number computed, with a
    fused attention."""
    diffusers = pytest.importorskip("diffusers")
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, *args, **options: torch.empty_like(q))
    codec = HunyuanCodec(device="meta")
    with torch.device("meta"):
        codec.vae = diffusers.AutoencoderKLHunyuanVideo().half().requires_grad_(False)
        latents = torch.empty(1, 16, 9, 60, 104)
    decode = codec.decoder()
    with Live() as live:
        for section in latents.split([1, 8], dim=2):
            decode(section)
        del section
    between, decoding = (list(needs.values()) for needs in codec.memory(480 * 832))
    assert between[0] == decoding[0] == sum(2 * p.numel() for p in codec.vae.parameters())
    assert between[1] == pytest.approx(live.now, rel=0.02) and decoding[1] == pytest.approx(live.most, rel=0.01)


@pytest.mark.parametrize("change, says", [(dict(latent_channels=8), "8 channels"), (dict(scaling_factor=0.5), "0.5")])
def test_another_vae_is_refused(vae, change, says, tmp_path):
    config = json.loads((vae / "config.json").read_text())
    type(HunyuanCodec(vae).vae).from_config(config | change).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=f"another VAE .*{says}"):
        open_base("hunyuan", vae=tmp_path / "other")


# ---------------------------------------------------------------------------------------------------------------------
# The text encoders


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder with both text encoders and their tokenizers, tiny and random, as in a diffusers pipeline."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    path = tmp_path_factory.mktemp("pipeline")
    words = "<pad> <s> </s> <unk> a cat dog walks 1. main content <|eot_id|>".split()
    for part, end in ("", ""), ("_2", " </s>"):
        tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        special = [("<s>", 1), ("</s>", 2)]
        tokenizer.post_processor = processors.TemplateProcessing(f"<s> $A{end}", special_tokens=special)
        names = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot_id|>", "<|end_header_id|>"]})
        tokenizer.save_pretrained(path / f"tokenizer{part}")
    torch.manual_seed(0)
    llama = dict(hidden_size=20, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, vocab_size=16)
    transformers.LlamaModel(transformers.LlamaConfig(**llama)).save_pretrained(path / "text_encoder")
    clip = dict(hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=16)
    clip = transformers.CLIPTextConfig(**clip, max_position_embeddings=77, eos_token_id=2)
    transformers.CLIPTextModel(clip).save_pretrained(path / "text_encoder_2")
    return path


def pipeline_embeds(prompts, prompt, llama):
    """What diffusers' pipeline makes of a prompt: (rows, mask, pooled). llama: LLaMA with all of its layers."""
    Pipeline = pytest.importorskip("diffusers").HunyuanVideoPipeline
    (words, words_2), (_, clip) = prompts.tokenizers, prompts.models
    its = SimpleNamespace(tokenizer=words, tokenizer_2=words_2, text_encoder=llama, text_encoder_2=clip)
    its._execution_device, template = "cpu", dict(template=TEMPLATE, crop_start=prompts.start)
    rows, mask = Pipeline._get_llama_prompt_embeds(its, prompt, template, max_sequence_length=prompts.length - 1)
    return rows[0].float(), mask[0].bool(), Pipeline._get_clip_prompt_embeds(its, prompt)[0].float()


@torch.no_grad()
def test_prompts_are_those_of_diffusers(texts, capsys):
    from transformers import LlamaModel

    prompts = LlavaPrompts(texts, 20, 9, 12)
    llama = LlamaModel.from_pretrained(texts / "text_encoder", dtype=torch.float16)
    for prompt in "a cat walks", "a dog":
        embedded, (rows, mask, pooled) = prompts(f" {prompt}\n"), pipeline_embeds(prompts, prompt, llama)
        n = int(mask.sum())
        assert embedded.shape == (9, 20) and n == len(prompt.split()) + 1 and not embedded[1 + n :].any()
        assert torch.allclose(embedded[1 : 1 + n], rows[:n], atol=2e-3) and embedded[1 : 1 + n].std() > 0.01
        assert torch.allclose(embedded[0, :12], pooled, atol=2e-3) and not embedded[0, 12:].any()
    assert not prompts("").any() and not prompts(" \n").any() and prompts.settings[-1] == 9
    long = prompts("a cat walks a dog walks a cat walks")
    assert "a prompt of 10 tokens is cut to 8" in capsys.readouterr().err and long.any(1).all()


def test_other_text_encoders_are_refused(texts):
    with pytest.raises(UserError, match="text_encoder makes vectors of 20 numbers, but the DiT reads 4096"):
        open_base("hunyuan", t5=texts)
    with pytest.raises(UserError, match="text_encoder_2 makes vectors of 12 numbers, but the DiT reads 16"):
        LlavaPrompts(texts, 20, 9, 16)
    with pytest.raises(UserError, match="no config.json"):
        open_base("hunyuan", t5=texts / "nowhere")


def test_the_template_is_that_of_diffusers():
    theirs = pytest.importorskip("diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video")
    assert TEMPLATE == theirs.DEFAULT_PROMPT_TEMPLATE["template"]


# ---------------------------------------------------------------------------------------------------------------------
# All of it


@pytest.fixture
def tiny_hunyuan(monkeypatch):
    """The preset with a narrow DiT, small pictures and a short history."""
    dit = HunyuanConfig(dim=48, ffn_dim=64, heads=2, layers=1, text_dim=20, text_len=9, pooled_dim=12)
    changes = dict(sizes=((32, 32),), fps=2, section=4, history=9, widths=(8, 8, 16, 16), lora=4, lr=0.03)
    monkeypatch.setitem(hunyuan.PRESETS, "tiny-hunyuan", hunyuan.PRESETS["hunyuan"] | changes | dict(dit=dit))
    monkeypatch.setitem(bases.BASES, "tiny-hunyuan", hunyuan)
    save_file(randomize(HunyuanDiT(dit)).state_dict(), "base.safetensors")


def test_both_stages_and_a_sample(tiny_hunyuan, vae, texts):
    """From videos with captions to a clip that is continued."""
    for i in range(3):
        write_video(Path("videos") / f"{i}.mp4", 60, i)
        Path(f"videos/{i}.txt").write_text("0s: a cat walks / 2s: a dog")
    given = "--preset", "tiny-hunyuan", "--device", "cpu"
    run(script("data"), "cache", *given, "--videos", "videos", "--out", "cache", "--vae", vae, "--t5", texts)
    given += "--init", "base.safetensors", "--data", "cache", "--batch", 2, "--steps", 4, "--warmup", 1, "--ema", 0
    given += "--sample_steps", 1, "--save_every", 4
    run(pretrain.main, *given, "--queries", 2, "--out", "one")
    run(finetune.main, *given, "--encoder", "one", "--out", "two", "--vae", vae)
    tensors = load_file("two/model.safetensors")
    assert all(x.abs().max() >= 1e-3 for name, x in tensors.items() if name.endswith("lora_B"))
    assert len([name for name in tensors if name.endswith("lora_B")]) == 8 + 2 * 2
    assert "psnr" in Path("two/log.jsonl").read_text() and "latent_mse" in Path("one/log.jsonl").read_text()
    written = []
    common = "--history", "videos/0.mp4", "--init", "base.safetensors", "--vae", vae, "--t5", texts, "--device", "cpu"
    common += "--checkpoint", "two/model.safetensors", "--seconds", 1, "--steps", 2
    for more in (), ("--merge",), ("--guidance", 1), ("--negative", "a dog"):
        run(sample.main, *common, *more)
        written.append(read_video("out/0.mp4", 2, 32, 32)[-16:].float())
    merged, plain, negative = ((x - written[0]).abs().mean() for x in written[1:])
    assert merged < 0.5 < plain and negative > 0.5, (merged, plain, negative)
    common = "--checkpoint", "one/model.safetensors", *common[:6], "--device", "cpu", "--steps", 1, "--queries", 2
    run(script("eval"), "retrieval", *common)
    assert Path("out/retrieval.png").is_file()
