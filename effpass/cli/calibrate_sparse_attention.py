"""`effpass calibrate sparse-attention`: find the channels of keys that scores come from."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from effpass.cli.console import stdout
from effpass.cli.model import Device, Dtype, Model, TrustRemoteCode, load
from effpass.cli.text import ArtifactFolder, TextFile, ids_of, most_tokens, pieces, read_text, tell_sample

__all__ = ["sparse_attention"]


def sparse_attention(
    model: Model,
    data: TextFile,
    output: ArtifactFolder,
    channels: Annotated[
        int | None,
        typer.Option(min=2, help="Channels to keep of a key. Default: 32, of latents 128.", show_default=False),
    ] = None,
    tokens: Annotated[int, typer.Option(min=16, help="Tokens of a sample.")] = 2048,
    samples: Annotated[int, typer.Option(min=1, help="At most so many samples, from the start of FILE.")] = 32,
    device: Device = "cpu",
    dtype: Dtype = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Choose the channels of each layer's keys that `sparse_attention` keeps in four bits a number."""
    text = read_text(data)
    from effpass.core.artifact import check_replaceable

    check_replaceable(output)
    loaded = load(model, device, dtype, trust_remote_code)
    from effpass.passes.runtime.mla_absorption import absorb
    from effpass.runtime.sparse_channels import calibrate

    ids = ids_of(text, loaded, model)
    is_latent = absorb(loaded.model) > 0
    artifact = calibrate(
        loaded.model, pieces(ids, most_tokens(tokens, loaded.model), samples),
        channels=channels or (128 if is_latent else 32),
        provenance={"model": model, "data": data.name}, each=tell_sample,
    )  # fmt: skip
    artifact.save(output)
    shares: dict[str, Any] = artifact.metrics["share"]
    mean = sum(shares.values()) / len(shares)
    stdout().print(
        f"{output}: {artifact.options['channels']} channels of {len(shares)} layers, {mean:.0%} of |q k| in the mean",
        markup=False, soft_wrap=True,
    )  # fmt: skip
