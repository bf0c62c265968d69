"""More of somebody else's CRIS: what people made of its parts in models that descend from it, and near misses.

Written with torch alone, like strangers.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from strangers import Coordinates, block
from torch import nn


class SentenceGate(nn.Module):
    """Pixels (N, B, D) times what they find in the memory (L, B, D), which may be one vector."""

    def __init__(self, width: int, heads: int, **options):
        super().__init__()
        self.look = nn.MultiheadAttention(width, heads, **options)

    def forward(self, pixels, memory, padding=None, memory_pos=None):
        keys = memory if memory_pos is None else memory + memory_pos
        found = self.look(query=pixels, key=keys, value=memory, key_padding_mask=padding)[0]
        return self.join(pixels, found)

    def join(self, pixels, found):
        return pixels * found


class AddedSentence(SentenceGate):
    def join(self, pixels, found):
        return pixels + found


class SoftGate(SentenceGate):
    def join(self, pixels, found):
        return pixels * found.sigmoid()


class OpenGate(SentenceGate):
    def join(self, pixels, found):
        return pixels * (1 + found)


class CentredGate(SentenceGate):
    """What every pixel finds is the same, so nothing is left of it."""

    def join(self, pixels, found):
        return pixels * (found - found.mean(0))


class NoisyGate(SentenceGate):
    def join(self, pixels, found):
        return pixels * F.dropout(found, 0.001, self.training)


class LookingBackGate(SentenceGate):
    """Attends to the sentence and to the pixel itself: two keys."""

    def forward(self, pixels, memory):
        return pixels * self.look(pixels, torch.cat([memory, pixels[:1]]), torch.cat([memory, pixels[:1]]))[0]


class Alignment(nn.Module):
    """Three maps of one size, each gated by the sentence."""

    def __init__(self, inputs=(24, 32, 40), width: int = 16, sentence: int = 40, gate=SentenceGate, **options):
        super().__init__()
        self.fusion3, self.fusion4, self.fusion5 = (gate(width, 4, **options) for _ in range(3))
        self.txt_proj = nn.Linear(sentence, width)
        self.f3_proj, self.f4_proj, self.f5_proj = self.halved(inputs[0], width), block(inputs[1], width), None
        raised = nn.ConvTranspose2d(inputs[2], width, 2, 2, bias=False)
        self.f5_proj = nn.Sequential(raised, nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.aggr = block(3 * width, width)
        self.coordconv = nn.Sequential(Coordinates(width, width), block(width, width, 3))

    @staticmethod
    def halved(inputs: int, outputs: int) -> nn.Sequential:
        conv = nn.Conv2d(inputs, outputs, 2, stride=2, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))

    def forward(self, imgs, state):
        memory, maps = self.txt_proj(state.unsqueeze(0)), []
        for project, fuse, image in zip(
            (self.f3_proj, self.f4_proj, self.f5_proj), (self.fusion3, self.fusion4, self.fusion5), imgs, strict=True
        ):
            x = project(image)
            maps.append(fuse(x.flatten(2).permute(2, 0, 1), memory).permute(1, 2, 0).reshape(x.shape))
        return self.finish(self.aggr(torch.cat(maps, 1)))

    def finish(self, joined):
        return self.coordconv(joined)


class ResidualAlignment(Alignment):
    def finish(self, joined):
        return joined + self.coordconv(joined)


class EvenAlignment(Alignment):
    """For encoders whose maps have one size: nothing is halved or doubled."""

    def __init__(self, inputs=(24, 32, 40), width: int = 16, **options):
        super().__init__(inputs, width, **options)
        self.f3_proj = block(inputs[0], width)
        self.f5_proj[0] = nn.ConvTranspose2d(inputs[2], width, 1, bias=False)


class TaskHead(nn.Module):
    """Several maps scored by one text kernel, each with a bias of its own; published for five and for six maps."""

    order = None  # which map each answer is made of

    def __init__(self, word_dim: int = 48, width: int = 16, size: int = 3, maps: int = 5):
        super().__init__()
        self.in_dim, self.kernel_size, self.maps = width, size, maps
        self.vis = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="bilinear"),
            block(2 * width, 2 * width, 3),
            nn.Upsample(scale_factor=2, mode="bilinear"),
            block(2 * width, width, 3),
            nn.Conv2d(width, width * maps, 1),
        )
        self.txt = nn.Linear(word_dim, width * size**2 + maps)

    def forward(self, x, word):
        parameters = self.txt(word)
        kernel = parameters[:, : -self.maps].reshape(len(word), self.in_dim, self.kernel_size, self.kernel_size)
        biases, maps = parameters[:, -self.maps :], torch.chunk(self.vis(x), self.maps, dim=1)
        answers = [
            self.score(maps[place], kernel, biases[:, i]) for i, place in enumerate(self.order or range(self.maps))
        ]
        return self.give(answers)

    def score(self, image, kernel, bias):
        flat = image.reshape(1, -1, *image.shape[2:])
        padding = self.kernel_size // 2
        return F.conv2d(flat, kernel, bias, padding=padding, groups=len(kernel)).transpose(0, 1)

    def give(self, answers):
        return tuple(answers)


class ShuffledTaskHead(TaskHead):
    order = (0, 1, 3, 4, 2)


class StackedTaskHead(TaskHead):
    def give(self, answers):
        return torch.cat(answers, 1)


class ListedTaskHead(TaskHead):
    def give(self, answers):
        return answers


class SquashedTaskHead(TaskHead):
    """The first map is a probability."""

    def give(self, answers):
        return (answers[0].sigmoid(), *answers[1:])


class LinkedTaskHead(TaskHead):
    """The second map looks at the first."""

    def give(self, answers):
        return (answers[0], answers[1] + 0.1 * answers[0], *answers[2:])


class TurnedTaskHead(TaskHead):
    """One of the maps is scored by the kernel upside down."""

    def give(self, answers):
        return (*answers[:-1], answers[-1].flip(2).flip(2) * 1.001)


class MixedBatchHead(TaskHead):
    """Takes the channels before the samples, and so gives every sample channels of its neighbours."""

    def forward(self, x, word):
        parameters, x = self.txt(word), self.vis(x)
        kernel = parameters[:, : -self.maps].reshape(len(word), self.in_dim, self.kernel_size, self.kernel_size)
        x = x.transpose(0, 1).reshape(self.maps, -1, *x.shape[2:])
        score = F.conv2d(x, kernel, None, padding=self.kernel_size // 2, groups=len(word))
        return (score + parameters[:, -self.maps :].T[:, :, None, None]).transpose(0, 1)


class PaddedHead(nn.Module):
    """A projector without the published numbers, and with a padding of its own."""

    def __init__(self, word_dim: int = 48, width: int = 16, size: int = 1, padding: int = 1, stride: int = 1):
        super().__init__()
        self.size, self.padding, self.stride = size, padding, stride
        self.vis = TaskHead(word_dim, width, maps=1).vis
        self.txt = nn.Linear(word_dim, width * size**2 + 1)

    def forward(self, x, word):
        x, parameters = self.vis(x), self.txt(word)
        kernel = parameters[:, :-1].reshape(len(word), self.vis[4].out_channels, self.size, self.size)
        flat = x.reshape(1, -1, *x.shape[2:])
        out = F.conv2d(flat, kernel, parameters[:, -1], self.stride, self.padding, groups=len(word))
        return out.transpose(0, 1)


class HalvedHead(PaddedHead):
    """Names a width that is not its maps'."""

    def __init__(self, word_dim: int = 48, width: int = 16, size: int = 3):
        super().__init__(word_dim, width, size, size // 2)
        self.in_dim, self.kernel_size = 2 * width, size


class OnesAroundHead(PaddedHead):
    """Pads with ones."""

    def forward(self, x, word):
        x, parameters = F.pad(self.vis(x), (1, 1, 1, 1), value=1.0), self.txt(word)
        kernel = parameters[:, :-1].reshape(len(word), self.vis[4].out_channels, self.size, self.size)
        return F.conv2d(x.reshape(1, -1, *x.shape[2:]), kernel, parameters[:, -1], groups=len(word)).transpose(0, 1)


class OtherNamesHead(nn.Module):
    """A projector whose layers lie flat, under other names, with functional upsampling and one ReLU."""

    mode = "bilinear"

    def __init__(self, word_dim: int = 48, width: int = 16):
        super().__init__()
        self.to_kernel = nn.Linear(word_dim, width * 9 + 1)
        self.wide, self.wide_norm = nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width)
        self.slim, self.slim_norm = nn.Conv2d(2 * width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.rectify = nn.ReLU()
        self.final = nn.Conv2d(width, width, 1)

    def up(self, x):
        return F.interpolate(x, scale_factor=2, mode=self.mode)

    def forward(self, pixels, sentence):
        x = self.rectify(self.wide_norm(self.wide(self.up(pixels))))
        x = self.final(self.rectify(self.slim_norm(self.slim(self.up(x)))))
        numbers = self.to_kernel(sentence)
        kernels = numbers[:, :-1].reshape(len(x), 1, x.shape[1], 3, 3)
        return torch.cat([F.conv2d(x[i : i + 1], kernels[i], numbers[i, -1:], padding=1) for i in range(len(x))])


class OtherNamesInALine(OtherNamesHead):
    """The same in nested Sequentials."""

    def __init__(self, word_dim: int = 48, width: int = 16):
        nn.Module.__init__(self)
        first = nn.Sequential(nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU())
        second = nn.Sequential(nn.Conv2d(2 * width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.picture = nn.ModuleDict({"first": first, "second": second, "last": nn.Conv2d(width, width, 1)})
        self.to_kernel = nn.Linear(word_dim, width * 9 + 1)

    def forward(self, pixels, sentence):
        x = self.picture["first"](self.up(pixels))
        x = self.picture["last"](self.picture["second"](self.up(x)))
        numbers = self.to_kernel(sentence)
        kernels = numbers[:, :-1].reshape(len(x), 1, x.shape[1], 3, 3)
        return torch.cat([F.conv2d(x[i : i + 1], kernels[i], numbers[i, -1:], padding=1) for i in range(len(x))])


class NearestHead(OtherNamesHead):
    mode = "nearest"


class Wrapper(nn.Module):
    """Passes on what its one part says."""

    def __init__(self, part: nn.Module):
        super().__init__()
        self.part = part

    def forward(self, first, second, *rest):
        return self.part(first, second, *rest)
