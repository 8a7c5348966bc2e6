"""Small seeded models of every kind that capture has to cope with, and some that it must refuse.

Every builder takes a seed and returns a module in training mode (as a careless user hands it over),
with batch-norm statistics that are not the defaults. ``ZOO`` pairs each with a function that makes
example inputs: a dict of tensors by the model's parameter names, ``rows`` rows each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from exitcompiler.capture import Captured, capture

__all__ = [
    "CLASSES",
    "ZOO",
    "BatchMeanModel",
    "BertLike",
    "BranchesOnData",
    "CountsCalls",
    "DenseNet",
    "DepthwiseNet",
    "Mlp",
    "MutatesBuffer",
    "RandomModel",
    "ResNet",
    "RowAttention",
    "Sample",
    "Vit",
    "WindowNet",
    "bert",
    "captured",
    "densenet",
    "depthwise",
    "digits_resnet",
    "images",
    "mlp",
    "resnet",
    "tokens",
    "vectors",
    "vit",
    "windows",
]

CLASSES = 5


def images(rows: int, seed: int = 0) -> dict[str, Tensor]:
    """``{"x": float32[rows, 3, 16, 16]}``."""
    return {"x": torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(seed))}


def vectors(rows: int, seed: int = 0) -> dict[str, Tensor]:
    """``{"x": float32[rows, 12]}``."""
    return {"x": torch.randn(rows, 12, generator=torch.Generator().manual_seed(seed))}


def tokens(rows: int, seed: int = 0) -> dict[str, Tensor]:
    """``{"input_ids", "attention_mask": int64[rows, 10]}``; every row has its own length."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 11, (rows, 1), generator=generator)
    mask = (torch.arange(10) < lengths).long()
    return {"input_ids": torch.randint(1, 50, (rows, 10), generator=generator) * mask, "attention_mask": mask}


def _seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A model with seeded weights and seeded, plausible batch-norm statistics."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.1)
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
    return model


class BasicBlock(nn.Module):
    """The basic block of He et al. 2016 with the option-A shortcut (no parameters)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.stride = stride
        self.pad = (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.stride != 1 or self.pad:
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        out += x
        answer: Tensor = self.relu(out)
        return answer


class ResNet(nn.Module):
    """A CIFAR-style ResNet with three stages, flattened by ``x.view(x.size(0), -1)``."""

    def __init__(self, blocks: int = 2, width: int = 4, channels: int = 3, classes: int = CLASSES) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(width, width, blocks, 1)
        self.layer2 = self._stage(width, 2 * width, blocks, 2)
        self.layer3 = self._stage(2 * width, 4 * width, blocks, 2)
        self.linear = nn.Linear(4 * width, classes)

    @staticmethod
    def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(inputs, outputs, stride)
        return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = functional.avg_pool2d(x, x.size()[3])
        answer: Tensor = self.linear(x.view(x.size(0), -1))
        return answer


class DenseLayer(nn.Module):
    """Adds ``growth`` channels to what it was given."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.conv = nn.Conv2d(inputs, growth, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        answer: Tensor = self.conv(functional.relu(self.norm(torch.cat(features, 1))))
        return answer


class DenseBlock(nn.Module):
    """Every layer reads all the layers before it: no cut inside."""

    def __init__(self, inputs: int, growth: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DenseLayer(inputs + i * growth, growth) for i in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    """Three dense blocks with pooling between them; returns a tuple (logits, features)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.block1 = DenseBlock(4, 4, 3)
        self.block2 = DenseBlock(16, 4, 3)
        self.block3 = DenseBlock(28, 4, 2)
        self.classifier = nn.Linear(36, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = functional.max_pool2d(self.block1(self.stem(x)), 2)
        x = functional.max_pool2d(self.block2(x), 2)
        features = self.block3(x).mean((2, 3))
        return self.classifier(features), features


class DepthwiseBlock(nn.Module):
    """Depthwise, then pointwise; squeeze and excitation in between; residual where it fits."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.depthwise = nn.Sequential(
            nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False),
            nn.BatchNorm2d(inputs),
            nn.Hardswish(inplace=True),
        )
        self.squeeze = nn.Conv2d(inputs, inputs, 1)
        self.pointwise = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(x)
        y = y * torch.sigmoid(self.squeeze(functional.adaptive_avg_pool2d(y, 1)))
        y = self.pointwise(y)
        answer: Tensor = x + y if self.residual else y
        return answer


class DepthwiseNet(nn.Module):
    """A small mobile network: ``features.N`` blocks, then a two-layer classifier with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Sequential(
                nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish(inplace=True)
            ),
            DepthwiseBlock(8, 8, 1),
            DepthwiseBlock(8, 16, 2),
            DepthwiseBlock(16, 16, 1),
            DepthwiseBlock(16, 16, 1),
        )
        self.classifier = nn.Sequential(
            nn.Linear(16, 16), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(16, CLASSES)
        )

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.classifier(
            torch.flatten(functional.adaptive_avg_pool2d(self.features(x), 1), 1)
        )
        return answer


class Attention(nn.Module):
    """Multi-head self-attention, with an additive mask if given."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        rows, length, width = x.shape
        qkv = self.qkv(x).view(rows, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], attn_mask=mask)
        answer: Tensor = self.out(y.transpose(1, 2).reshape(rows, length, width))
        return answer


class EncoderLayer(nn.Module):
    """A transformer layer, norm first (ViT) or norm last (BERT)."""

    def __init__(self, width: int, heads: int, *, norm_first: bool) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.attention = Attention(width, heads)
        self.norm1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.norm2 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.norm_first:
            x = x + self.dropout(self.attention(self.norm1(x), mask))
            x = x + self.dropout(self.mlp(self.norm2(x)))
        else:
            x = self.norm1(x + self.dropout(self.attention(x, mask)))
            x = self.norm2(x + self.dropout(self.mlp(x)))
        return x


class Vit(nn.Module):
    """A vision transformer: patches, an expanded class token, a position table without batch."""

    def __init__(self, width: int = 16, layers: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.class_token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 17, width))
        self.layers = nn.ModuleList(EncoderLayer(width, 2, norm_first=True) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        for layer in self.layers:
            x = layer(x)
        answer: Tensor = self.head(self.norm(x)[:, 0])
        return answer


class Embeddings(nn.Module):
    """Word and position embeddings, normalised."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.word = nn.Embedding(50, width)
        self.position = nn.Embedding(10, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, input_ids: Tensor) -> Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        answer: Tensor = self.norm(self.word(input_ids) + self.position(positions).unsqueeze(0))
        return answer


class BertLike(nn.Module):
    """An encoder whose additive mask ``[batch, 1, s, s]`` feeds every layer; returns a dict."""

    def __init__(self, width: int = 16, layers: int = 4) -> None:
        super().__init__()
        self.embeddings = Embeddings(width)
        self.layers = nn.ModuleList(EncoderLayer(width, 2, norm_first=False) for _ in range(layers))
        self.pooler = nn.Linear(width, width)
        self.classifier = nn.Linear(width, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        x = self.embeddings(input_ids)
        rows, length = input_ids.shape
        mask = attention_mask[:, None, None, :].expand(rows, 1, length, length).to(x.dtype)
        mask = (1.0 - mask) * torch.finfo(x.dtype).min
        for layer in self.layers:
            x = layer(x, mask)
        return {"logits": self.classifier(torch.tanh(self.pooler(x[:, 0]))), "hidden": x}


class WindowLayer(nn.Module):
    """Attention inside 4 x 4 windows, which are folded into the batch and back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, 2)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        rows, height, width, channels = x.shape
        y = self.norm(x).view(rows, height // 4, 4, width // 4, 4, channels).permute(0, 1, 3, 2, 4, 5)
        y = self.attention(y.reshape(-1, 16, channels))
        y = y.view(rows, height // 4, width // 4, 4, 4, channels).permute(0, 1, 3, 2, 4, 5)
        x = x + y.reshape(rows, height, width, channels)
        answer: Tensor = x + self.mlp(x)
        return answer


class WindowNet(nn.Module):
    """Swin-like: dim 0 is four windows per row inside every layer."""

    def __init__(self, width: int = 8, layers: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 2, 2)
        self.layers = nn.Sequential(*(WindowLayer(width) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(self.patches(x).permute(0, 2, 3, 1))
        answer: Tensor = self.head(self.norm(x).mean((1, 2)))
        return answer


class Mlp(nn.Sequential):
    """A plain ``nn.Sequential``: leaf modules only, and its parameter is called ``input``."""

    def __init__(self) -> None:
        layers = [nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU()]
        super().__init__(*layers, nn.Linear(16, CLASSES))


def resnet(seed: int = 0) -> nn.Module:
    """ResNet-14 of width 4."""
    return _seeded(ResNet, seed)


def digits_resnet(seed: int = 0) -> nn.Module:
    """A ResNet for one-channel images and ten classes, such as scikit-learn's digits."""
    return _seeded(lambda: ResNet(blocks=1, width=4, channels=1, classes=10), seed)


def densenet(seed: int = 0) -> nn.Module:
    """A small DenseNet that returns (logits, features)."""
    return _seeded(DenseNet, seed)


def depthwise(seed: int = 0) -> nn.Module:
    """A small mobile network."""
    return _seeded(DepthwiseNet, seed)


def vit(seed: int = 0) -> nn.Module:
    """A four-layer vision transformer."""
    return _seeded(Vit, seed)


def bert(seed: int = 0) -> nn.Module:
    """A four-layer BERT-like encoder that returns {"logits", "hidden"}."""
    return _seeded(BertLike, seed)


def windows(seed: int = 0) -> nn.Module:
    """A three-layer network with windows folded into the batch."""
    return _seeded(WindowNet, seed)


def mlp(seed: int = 0) -> nn.Module:
    """Four linear layers in an ``nn.Sequential``."""
    return _seeded(Mlp, seed)


@dataclass(frozen=True)
class Sample:
    """A model of the zoo: how to build it, how to feed it, what ``logits=`` it needs."""

    build: Callable[[int], nn.Module]
    inputs: Callable[[int, int], dict[str, Tensor]]
    logits: str | int | None = None


def _sequential_vectors(rows: int, seed: int = 0) -> dict[str, Tensor]:
    return {"input": vectors(rows, seed)["x"]}


ZOO: dict[str, Sample] = {
    "resnet": Sample(resnet, images),
    "densenet": Sample(densenet, images, logits=0),
    "depthwise": Sample(depthwise, images),
    "vit": Sample(vit, images),
    "bert": Sample(bert, tokens, logits="logits"),
    "windows": Sample(windows, images),
    "mlp": Sample(mlp, _sequential_vectors),
}


@cache
def captured(name: str) -> Captured:
    """A model of the zoo, captured; nobody may change it."""
    sample = ZOO[name]
    return capture(sample.build(0), sample.inputs(1, 0), logits=sample.logits)


class MutatesBuffer(nn.Module):
    """Counts its calls in a buffer and answers with the count."""

    def __init__(self) -> None:
        super().__init__()
        self.counter: Tensor
        self.register_buffer("counter", torch.zeros(1))
        self.fc = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        self.counter += 1
        answer: Tensor = self.fc(x) + self.counter
        return answer


class CountsCalls(nn.Module):
    """Counts its calls in a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.fc = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        answer: Tensor = self.fc(x)
        return answer


class Chooser(nn.Module):
    """The part of ``BranchesOnData`` that looks at the data."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.fc(x) if x.sum() > 0 else self.fc(-x)
        return answer


class BranchesOnData(nn.Module):
    """Takes one of two ways, depending on the values of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.chooser = Chooser()

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.chooser(x)
        return answer


class BatchMeanModel(nn.Module):
    """Centres its features over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.fc(x - 0.1 * x.mean(0, keepdim=True))
        return answer


class RowAttention(nn.Module):
    """Lets the rows of a batch attend to one another."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention(12, 2)
        self.fc = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.fc(self.attention(x.unsqueeze(0)).squeeze(0))
        return answer


class RandomModel(nn.Module):
    """Drops features even in ``eval()`` mode."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.fc(functional.dropout(x, 0.5, training=True))
        return answer
