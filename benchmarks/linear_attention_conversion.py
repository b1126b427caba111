"""What a converted model keeps: perplexity, needles, bytes of its cache. Cases of area `linear_attention`.

A case is named by the form of the layers and how many percent of them are replaced. All forms are learned by the same
trainer, for the same layers, from the same tokens, with states of the same bytes; `window` is the model's own attention
over as many tokens as have keys and values, in bfloat16, of a state's bytes. The text holds needle tasks, since prose
asks for little that lies far back. Models are those of `--model`, SmolLM2 by default; without a GPU and without
EFFPASS_MODEL, a random one.

    EFFPASS_STEPS      steps of the three stages together (default 400)
    EFFPASS_BATCH      sequences of a step (default 8)
    EFFPASS_LENGTH     tokens of a sequence (default 512)
    EFFPASS_RATE       learning rate (default 3e-3; of windows, whose weights are the attention's own, 1e-3)
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

import effpass
from benchmarks.quality import MODELS, _batches, _tiny
from benchmarks.rows import Row, row
from effpass.passes.weights.fg2_gdn import Learned
from effpass.runtime.linear_attention.attention_layers import attention_layers
from effpass.runtime.linear_attention.hybrid import linear_layers
from effpass.runtime.linear_attention.settings import Mode
from effpass.trainers.fg2_gdn.initial import chosen_layers, layer_settings
from effpass.trainers.fg2_gdn.memory import estimate
from effpass.trainers.fg2_gdn.run import StagedRun, convert
from effpass.trainers.fg2_gdn.settings import MODES, STAGES, Settings
from effpass.trainers.finetune.run import read_model
from effpass.trainers.lm.config import OptimizerConfig
from effpass.trainers.lm.tasks import make_example
from effpass.trainers.pruning.data import begin_run
from effpass.trainers.run_folder import METRICS, read_metrics

AREA = "linear_attention"
FORMS = (*MODES, "window")
SHARES = (25, 50, 100)
_HELD_OUT = 1 << 18  # bytes of WikiText-2 that perplexity is of
_LENGTHS = (256, 1024)  # bytes of a needle's text
_CACHED = 8192  # tokens


def conversion(form: str, percent: int, device: str, smoke: bool) -> Iterator[Row]:
    """Before and after, each row against the model that was converted."""
    small = smoke or (device != "cuda" and "EFFPASS_MODEL" not in os.environ)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        names = [_random(folder)] if small else os.environ.get("EFFPASS_MODEL", "smollm2").split(",")
        text, held_out = _texts(folder, small)
        for number, name in enumerate(names):
            found = str(MODELS / name) if (MODELS / name / "config.json").exists() else name
            out = folder / f"artifact-{number}"
            yield from _converted(found, form, percent, text, held_out, out, device, small)


def _converted(
    source: str, form: str, percent: int, text: Path, held_out: Path, out: Path, device: str, small: bool
) -> Iterator[Row]:
    usual = {"STEPS": 4, "BATCH": 2, "LENGTH": 32} if small else {"STEPS": 400, "BATCH": 8, "LENGTH": 512}
    steps, batch, length = (int(os.environ.get(f"EFFPASS_{name}", value)) for name, value in usual.items())
    mode = cast("Mode", "fg2+" if form == "window" else form)  # a window has the bytes of the states of any mode
    rate = float(os.environ.get("EFFPASS_RATE", "1e-3" if form == "window" else "3e-3"))
    settings = Settings(
        OptimizerConfig(lr=rate, weight_decay=0.0), mode=mode, share=percent / 100, save_every=0, log_every=50,
        steps=steps, batch=batch, sequence_length=length, dtype="bfloat16" if device == "cuda" else "float32",
    )  # fmt: skip
    started = time.perf_counter()
    windowed = None
    if form == "window":
        windowed, metrics = _windowed(source, text, out, settings, held_out)
    else:
        convert(source, text, out, settings, validation=held_out, say=lambda line: None)
        metrics = Learned.load(out).artifact.metrics
    seconds = time.perf_counter() - started
    case = f"{Path(source).name}, {form} in {percent} % of the layers"
    note = f"{steps} steps of {batch} x {length} tokens, rate {rate:g}, {seconds:.0f} s; seed 0"
    for stage in STAGES:
        if (key := f"eval_perplexity_after_{stage}") in metrics:
            yield row(AREA, case, f"perplexity after {stage}", metrics[key], "", device=device,
                      peer=metrics["eval_perplexity_teacher"], peer_name="before", note=note)  # fmt: skip
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    loaded = effpass.load_model(source, dtype=dtype)
    model, tokenizer = loaded.model.to(device).eval(), loaded.tokenizer
    before = {length: needles(model, tokenizer, length, 4 if small else 128) for length in _LENGTHS}
    kept = cache_bytes(model.config, _CACHED)
    if windowed is None:
        model = effpass.prepare(model, {"version": 1, "passes": [{"fg2_gdn": {"artifact": str(out)}}]})
        own = cache_bytes(model.config, _CACHED)
    else:
        model = windowed.to(dtype)
        own = sum(
            cache_bytes(model.config, getattr(layer.self_attn, "tokens", _CACHED)) // len(model.model.layers)
            for layer in model.model.layers
        )
    for length, (share, chance) in before.items():
        after, _ = needles(model, tokenizer, length, 4 if small else 128)
        yield row(AREA, case, f"needles found in {length} bytes", 100 * after, "%", device=device, peer=100 * share,
                  peer_name="before", lower_is_better=False, runs=4 if small else 128,
                  note=f"chance {chance:.1%}; {note}")  # fmt: skip
    yield row(AREA, case, f"cache of a sequence of {_CACHED} tokens", own / 2**20, "MiB", device=device,
              peer=kept / 2**20, peer_name="before", note="bfloat16, states float32")  # fmt: skip


class _Window(nn.Module):
    """Attention over the last `tokens` tokens, called as a linear layer is: with nothing but its inputs."""

    def __init__(self, attention: nn.Module, rotary: nn.Module, tokens: int) -> None:
        super().__init__()
        self.attention, self.rotary, self.tokens = attention, rotary, tokens

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        place = torch.arange(hidden_states.shape[1], device=hidden_states.device)
        distance = place[:, None] - place
        return self.attention(
            hidden_states, position_embeddings=self.rotary(hidden_states, place[None]),
            attention_mask=((distance >= 0) & (distance < self.tokens))[None, None],
        )  # fmt: skip


def _windowed(source: str, text: Path, work: Path, settings: Settings, held_out: Path) -> tuple[Any, dict[str, float]]:
    """The model with windows where a conversion has linear layers, which learned as those do; and its perplexities."""
    config, tokenizer = read_model(source)
    layers, shape = chosen_layers(settings, config.num_hidden_layers), layer_settings(settings, config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = effpass.load_model(source, dtype=settings.dtype).model.to(device).requires_grad_(False)
    student: Any = effpass.load_model(source, dtype="float32").model.to(device)
    begin_run(work, {}, text, held_out, tokenizer, settings.batch, settings.sequence_length)
    tokens = shape.state_bytes * config.num_hidden_layers // cache_bytes(config, 1)
    made: dict[int, Any] = {}
    for i, (parent, name) in attention_layers(student, layers).items():
        made[i] = _Window(getattr(parent, name), student.model.rotary_emb, tokens)
        setattr(parent, name, made[i])
    found = estimate(config, settings, layers, shape, device)
    run = StagedRun(work, settings, teacher, student, made, lambda line: None, found)
    for stage in STAGES:
        run.stage(stage)
    losses = {name: x for line in read_metrics(work / METRICS) for name, x in line.items() if name.startswith("eval_")}
    return student, {name.replace("loss", "perplexity"): math.exp(x) for name, x in losses.items()}


@torch.no_grad()
def needles(model: Any, tokenizer: Any, length: int, count: int) -> tuple[float, float]:
    """Share of codes that greedy decoding gets right, all of them, and that of guesses."""
    examples = [make_example("needle", np.random.default_rng((7, length, i)), length, 1, {}) for i in range(count)]
    right: list[bool] = []
    for parts in _batches(model, tokenizer, examples):
        answer = parts[2]
        for ids, wanted in zip(torch.cat(parts, 1)[:, :-1].split(16), answer.split(16), strict=True):
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=wanted.shape[1]).logits
            right += (logits.argmax(-1) == wanted).all(1).tolist()
    return float(np.mean(right)), examples[0].chance


def cache_bytes(config: Any, tokens: int) -> int:
    """Of a sequence: keys, values and inputs of convolutions in bfloat16, states in float32."""
    linear: list[int] = []
    state = 0
    if getattr(config, "linear_attention", None) is not None:
        linear, settings = linear_layers(config)
        state = settings.state_bytes + 2 * (settings.conv_kernel_size - 1) * settings.channels
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 2 * 2 * config.num_key_value_heads * size * tokens
    return len(linear) * state + (config.num_hidden_layers - len(linear)) * attention


def _texts(folder: Path, small: bool) -> tuple[Path, Path]:
    """What is learned from, and what perplexity is of."""
    tasks = [make_example("needle", np.random.default_rng((3, i)), 512, 1, {}) for i in range(8 if small else 2000)]
    needle = b"\n".join(example.text for example in tasks)
    prose, held_out = b"", needle[:2048]
    if not small:
        if "EFFPASS_DATA" not in os.environ:
            raise SystemExit("linear_attention: set EFFPASS_DATA (or --data) to the folder with text/ and wikitext-2/")
        data = Path(os.environ["EFFPASS_DATA"])
        prose = b"\n".join(path.read_bytes() for path in sorted((data / "text").glob("*.txt")))
        held_out = (data / "wikitext-2" / "valid.txt").read_bytes()[:_HELD_OUT].rpartition(b"\n")[0]
    text, other = folder / "text.txt", folder / "held-out.txt"
    text.write_bytes(prose + b"\n" + needle)
    other.write_bytes(held_out)
    return text, other


def _random(folder: Path) -> str:
    """A checkpoint of random weights for smoke runs."""
    model, tokenizer, _ = _tiny("cpu")
    for part in (model, tokenizer):
        part.save_pretrained(folder / "random")
    return str(folder / "random")


CASES: dict[str, Callable[[str, bool], Iterator[Row]]] = {
    f"conversion-{form}-{percent}": partial(conversion, form, percent) for form in FORMS for percent in SHARES
}
