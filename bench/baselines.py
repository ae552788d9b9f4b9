"""The memories that the paper compares φ with, as methods: see MemoryEncoder.

large-patchifier    one linear map per block: the DiT's patchify made larger (FramePack)
token-merging       the DiT's tokens, the most similar of a segment averaged (ToMe)
full                all of the DiT's tokens: the upper bound
sliding-window      those of the newest frames alone
keyframes           those of the first and the newest frame
none                no memory
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange, repeat

from encoder import MemoryEncoder
from model import PatchEmbedding, pad_replicate


class LargePatchifier(MemoryEncoder):
    """FramePack's memory: it begins as the base's patchify of latents averaged over boxes of the rate."""

    def build(self, base):
        self.large_patch = PatchEmbedding(base.dit.in_dim, base.dit.dim, self.block)

    @torch.no_grad()
    def start_from(self, dit):
        super().start_from(dit)
        t, h, w = self.rate
        kernel = repeat(dit.patch_embedding.weight, "d c f i j -> d c (f t) (i h) (j w)", t=t, h=h, w=w)
        self.large_patch.weight.copy_(kernel / math.prod(self.rate))
        self.large_patch.bias.copy_(dit.patch_embedding.bias)

    def forward(self, high, low):
        return self.large_patch(pad_replicate(high, self.block))


class Full(MemoryEncoder):
    """Every token of the history."""

    has_rate = may_skip_weights = False
    options = ("cross_attention", "cache_memory")

    def encode_segments(self, high, low, start, length):
        return self.embed_frames(high, start + torch.arange(high.shape[2]))


class TokenMerging(MemoryEncoder):
    """As many tokens per segment as the rate gives; each is the mean of the tokens merged into it, position included.

    Positions are (B, M, 3), since what is merged depends on the picture.
    """

    may_skip_weights = False

    def encode_segments(self, high, low, start, length):
        n = high.shape[2] // length
        count = len(self.block_centres((length, *high.shape[3:]), start))
        tokens, positions = self.embed_frames(high, start + torch.arange(high.shape[2]))
        tokens = rearrange(tokens.float(), "b (n k) d -> (b n) k d", n=n)
        positions = repeat(positions, "(n k) c -> (b n) k c", n=n, b=len(high))
        with torch.autocast(high.device.type, enabled=False):  # bf16 similarities would tie
            groups = bipartite_matching(tokens, count)
        sizes = group_sums(torch.ones_like(tokens[..., :1]), groups, count)
        means = (group_sums(x, groups, count) / sizes for x in (tokens, positions))
        return tuple(rearrange(x, "(b n) m d -> b (n m) d", n=n) for x in means)


def group_sums(x, groups, count):
    """Sum the tokens x (B, N, D) of each group; groups (B, N) holds numbers below count -> (B, count, D)."""
    rows = groups + count * torch.arange(len(x), device=x.device)[:, None]
    sums = x.new_zeros(len(x) * count, x.shape[2]).index_add(0, rows.flatten(), x.flatten(0, 1))
    return sums.unflatten(0, (-1, count))


@torch.no_grad()
def bipartite_matching(x, count):
    """Assign each token of x (B, N, D) to one of `count` groups, (B, N): bipartite soft matching of ToMe (Bolya et al.
    2023) in rounds, by the cosine similarity of the tokens themselves.

    In a round, every second token (or mean of a group) finds the most similar of the others; the closest pairs merge,
    at most a quarter of what is left. (Half, the most that a round could merge, forces unlike tokens together.)
    """
    groups = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    sums, n = x, x.shape[1]  # a group's sum has the cosines of its mean
    while n > count:
        unit = F.normalize(sums, dim=-1)
        similarity, partner = (unit[:, ::2] @ unit[:, 1::2].mT).max(-1)  # (B, n / 2) each, rounded up
        n_merged = min(max(1, n // 4), n - count)
        merged = similarity.argsort(dim=1, descending=True, stable=True)[:, :n_merged]
        merged, partner = 2 * merged, 2 * partner.gather(1, merged) + 1  # numbers among all n
        stays = groups.new_ones(len(x), n).scatter(1, merged, 0)
        number = stays.cumsum(1) - 1  # of each group after this round
        number = number.scatter(1, merged, number.gather(1, partner))
        groups, n = number.gather(1, groups), n - n_merged
        sums = group_sums(sums, number, n)
    return groups


class SlidingWindow(MemoryEncoder):
    """The newest `window` frames, uncompressed; at least one."""

    has_stage1 = has_rate = has_segments = may_skip_weights = False
    least_window = 1
    options = ("window", "anchor", "cross_attention", "cache_memory")

    def whole(self, n_frames, start=0):
        return 0


class Keyframes(SlidingWindow):
    """The first and the newest frame, uncompressed: the paper's two-picture baseline, as far as one model can be it."""

    least_window, options = 0, ()

    def __init__(self, base, rate, window=0, anchor=False):
        super().__init__(base, rate, window=1, anchor=True)


class NoMemory(SlidingWindow):
    """Nothing. It has no weights."""

    least_window, options = 0, ()

    def __init__(self, base, rate, window=0, anchor=False):
        with torch.device("meta"):
            super().__init__(base, rate)
        self.window, self.patch_embedding = 0, None

    def start_from(self, dit):
        pass
