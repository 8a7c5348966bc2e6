"""The encoders of transformers in the zoo: with a classification head, and few and narrow layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn
from zoo_imports import import_transformers

__all__ = ["ENCODERS", "build_encoder"]

_CLASSES: Final = 10
_VOCABULARY: Final = 500
_TOKENS: Final = 24
_SIDE: Final = 64
_SAMPLES: Final = 8000

_TEXT: Final = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_VIT: Final = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": _SIDE,
    "patch_size": 16,
}
_AUDIO: Final = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "conv_dim": (32,) * 7,
    "num_conv_pos_embedding_groups": 4,
    "num_conv_pos_embeddings": 16,
    "classifier_proj_size": 32,
}
_STAGES: Final = {"depths": [2, 2, 2, 2], "image_size": _SIDE}


@dataclass(frozen=True)
class _Encoder:
    """An encoder.

    Args:
        kind: ``"text"``, ``"image"`` or ``"audio"``.
        config: What differs from the defaults of its configuration.
        mask: Whether it takes an attention mask.
    """

    kind: str
    config: dict[str, Any] = field(default_factory=dict)
    mask: bool = True


def _text(mask: bool = True, **config: Any) -> _Encoder:
    return _Encoder("text", {**_TEXT, **config}, mask)


def _vit(**config: Any) -> _Encoder:
    return _Encoder("image", {**_VIT, **config})


def _image(**config: Any) -> _Encoder:
    return _Encoder("image", config)


def _audio(**config: Any) -> _Encoder:
    return _Encoder("audio", {**_AUDIO, **config}, mask=False)


ENCODERS: Final = {
    "albert": _text(embedding_size=32),
    "bert": _text(),
    "big_bird": _text(attention_type="original_full"),
    "camembert": _text(),
    "canine": _text(),
    "convbert": _text(embedding_size=64),
    "data2vec-text": _text(),
    "deberta": _text(relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "deberta-v2": _text(relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=16),
    "distilbert": _text(),
    "electra": _text(embedding_size=64),
    "ernie": _text(),
    "esm": _text(mask_token_id=4, position_embedding_type="rotary"),
    "eurobert": _text(num_key_value_heads=2),
    "flaubert": _text(),
    "fnet": _text(mask=False),
    "funnel": _Encoder(
        "text",
        {"vocab_size": _VOCABULARY, "block_sizes": [2, 2, 2], "d_model": 64, "n_head": 4, "d_head": 16},
    ),
    "gte": _text(),
    "ibert": _text(),
    "layoutlm": _text(),
    "lilt": _text(hidden_size=96),
    "longformer": _text(attention_window=8),
    "luke": _text(entity_vocab_size=50, entity_emb_size=16),
    "markuplm": _text(),
    "megatron-bert": _text(),
    "mobilebert": _text(intra_bottleneck_size=32, embedding_size=32, true_hidden_size=32),
    "modernbert": _text(global_attn_every_n_layers=2, local_attention=8),
    "mpnet": _text(),
    "mra": _text(block_per_row=1),
    "nomic_bert": _text(),
    "nystromformer": _text(mask=False, num_landmarks=4, segment_means_seq_len=_TOKENS),
    "rembert": _text(input_embedding_size=64, output_embedding_size=64),
    "roberta": _text(),
    "roberta-prelayernorm": _text(),
    "roc_bert": _text(),
    "roformer": _text(embedding_size=64),
    "squeezebert": _text(embedding_size=64),
    "tapas": _text(),
    "xlm": _text(),
    "xlm-roberta": _text(),
    "xlm-roberta-xl": _text(),
    "xlnet": _Encoder(
        "text", {"vocab_size": _VOCABULARY, "d_model": 64, "n_layer": 4, "n_head": 4, "d_inner": 128}
    ),
    "xmod": _text(languages=["en_XX"], default_language="en_XX"),
    "yoso": _text(),
    "beit": _vit(),
    "bit": _image(depths=[2, 2, 2, 2], embedding_size=16, hidden_sizes=[32, 64, 128, 256]),
    "clip": _image(vision_config=_VIT),
    "convnext": _image(**_STAGES, hidden_sizes=[16, 32, 64, 128]),
    "convnextv2": _image(**_STAGES, hidden_sizes=[16, 32, 64, 128]),
    "cvt": _image(embed_dim=[16, 32, 64], num_heads=[1, 2, 4], depth=[2, 2, 2]),
    "data2vec-vision": _vit(),
    "deit": _vit(),
    "dinov2": _vit(),
    "dinov2_with_registers": _vit(),
    "donut-swin": _image(**{**_STAGES, "embed_dim": 24, "window_size": 2}),
    "efficientnet": _image(image_size=_SIDE),
    "focalnet": _image(**_STAGES, embed_dim=24),
    "hgnet_v2": _image(depths=[2, 2, 2, 2]),
    "hiera": _image(image_size=[_SIDE, _SIDE], embed_dim=24, depths=[2, 2, 2, 2]),
    "ijepa": _vit(),
    "levit": _image(image_size=_SIDE),
    "mobilenet_v1": _image(image_size=_SIDE),
    "mobilenet_v2": _image(image_size=_SIDE),
    "mobilevit": _image(image_size=_SIDE),
    "mobilevitv2": _image(image_size=_SIDE),
    "poolformer": _image(),
    "pvt": _image(image_size=_SIDE),
    "pvt_v2": _image(image_size=_SIDE),
    "regnet": _image(hidden_sizes=[16, 32, 64, 128], depths=[2, 2, 2, 2], embedding_size=16, groups_width=8),
    "resnet": _image(hidden_sizes=[16, 32, 64, 128], depths=[2, 2, 2, 2], embedding_size=16),
    "segformer": _image(),
    "siglip": _image(vision_config=_VIT),
    "swiftformer": _image(),
    "swin": _image(**_STAGES, embed_dim=24, window_size=2),
    "swinv2": _image(**_STAGES, embed_dim=24, window_size=2),
    "textnet": _image(),
    "vit": _vit(),
    "vit_msn": _vit(),
    "audio-spectrogram-transformer": _Encoder(
        "image",
        {k: v for k, v in _VIT.items() if k != "image_size"} | {"max_length": 64, "num_mel_bins": 32},
    ),
    "data2vec-audio": _audio(),
    "hubert": _audio(),
    "unispeech": _audio(),
    "wav2vec2": _audio(),
    "wavlm": _audio(),
}
"""Model type -> what to make of it."""


def build_encoder(kind: str, rows: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """An encoder with random weights, in eval mode, and inputs for it.

    Args:
        kind: One of ``ENCODERS``.
        rows: Of the inputs.
    """
    transformers = import_transformers()
    encoder = ENCODERS[kind]
    config = transformers.AutoConfig.for_model(kind, num_labels=_CLASSES, **encoder.config)
    auto = {
        "text": transformers.AutoModelForSequenceClassification,
        "image": transformers.AutoModelForImageClassification,
        "audio": transformers.AutoModelForAudioClassification,
    }[encoder.kind]
    if kind == "audio-spectrogram-transformer":
        auto = transformers.AutoModelForAudioClassification
    return auto.from_config(config).eval(), _inputs(kind, encoder, rows)


def _inputs(kind: str, encoder: _Encoder, rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    if kind == "audio-spectrogram-transformer":
        return {"input_values": torch.randn(rows, 64, 32, generator=generator)}
    if encoder.kind == "image":
        return {"pixel_values": torch.randn(rows, 3, _SIDE, _SIDE, generator=generator)}
    if encoder.kind == "audio":
        return {"input_values": torch.randn(rows, _SAMPLES, generator=generator)}
    ids = torch.randint(5, _VOCABULARY, (rows, _TOKENS), generator=generator)
    if not encoder.mask:
        return {"input_ids": ids}
    lengths = torch.randint(_TOKENS // 2, _TOKENS + 1, (rows, 1), generator=generator)
    mask = (torch.arange(_TOKENS) < lengths).long()
    return {"input_ids": ids * mask, "attention_mask": mask}
