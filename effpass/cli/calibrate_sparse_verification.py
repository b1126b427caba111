"""`effpass calibrate sparse-verification`: find the layers that choose blocks for those behind them."""

from __future__ import annotations

from typing import Annotated

import typer

from effpass.cli.console import stdout
from effpass.cli.model import Device, Dtype, Model, TrustRemoteCode, load
from effpass.cli.text import ArtifactFolder, TextFile, ids_of, most_tokens, pieces, read_text, tell_sample

__all__ = ["sparse_verification"]


def sparse_verification(
    model: Model,
    data: TextFile,
    output: ArtifactFolder,
    attention: Annotated[float, typer.Option(min=0.01, max=1, help="Share of the blocks that are chosen.")] = 0.25,
    block: Annotated[int, typer.Option(min=1, help="Tokens of a block, as in the recipe.")] = 64,
    similarity: Annotated[
        float, typer.Option(min=0, max=1, help="Of a layer's choice to that of the layer it takes, at the least.")
    ] = 0.6,
    nodes: Annotated[int, typer.Option(min=2, help="Last tokens of a sample, which stand for a tree's nodes.")] = 32,
    tokens: Annotated[int, typer.Option(min=16, help="Tokens of a sample.")] = 4096,
    samples: Annotated[int, typer.Option(min=1, help="At most so many samples, from the start of FILE.")] = 16,
    device: Device = "cpu",
    dtype: Dtype = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Choose the layers that choose blocks in `sparse_verification`, and by which shares tokens may skip experts."""
    text = read_text(data)
    from effpass.core.artifact import check_replaceable

    check_replaceable(output)
    loaded = load(model, device, dtype, trust_remote_code)
    from effpass.runtime.speculative.calibrated import calibrate
    from effpass.runtime.speculative.redundancy import Budgets

    artifact = calibrate(
        loaded.model,
        pieces(ids_of(text, loaded, model), most_tokens(tokens, loaded.model), samples, least=nodes + 1),
        Budgets(attention, block, nodes=nodes), similarity=similarity,
        provenance={"model": model, "data": data.name}, each=tell_sample,
    )  # fmt: skip
    artifact.save(output)
    anchors, layers = artifact.tensors["anchors"].tolist(), len(artifact.metrics["similar"])
    told = f"{len(anchors)} of {layers} layers choose blocks"
    told += f": {', '.join(map(str, anchors))}" if anchors else ""
    stdout().print(f"{output}: {told}", markup=False, soft_wrap=True)
