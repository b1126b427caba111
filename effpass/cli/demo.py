"""`effpass demo`: the main job, end to end, on a small model that comes as a package."""

from __future__ import annotations

import contextlib
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from logging import ERROR, getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from effpass.cli.console import hide_bars, megabytes, stdout
from effpass.cli.demo_recipes import WORKLOAD, measure_recipes, recipes_table
from effpass.cli.machine import OtherPrograms
from effpass.core.errors import EffpassError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from effpass.cli.demo_steps import Decode
    from effpass.core.inspection import Inspection
    from effpass.core.report import Report
    from effpass.lowering.targets.export import ExportedDecoder

__all__ = ["demo", "run_demo"]

RECIPE = "version: 1\npasses:\n  - merge_lora        # the adapter that PEFT has attached\n"

ATTACHED = "unrewritten: adapter beside"


def demo(
    keep: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Keep adapter, recipe, files and report here."),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Measure the recipes that have a name, too: some minutes more.")
    ] = False,
) -> None:
    """Show the main job on SmolLM2-135M: adapter, recipe, torch.compile, ONNX. Takes a few minutes on two cores.

    It needs no network and no GPU. Every number it prints was measured while it ran, except for the cost model's
    prediction. The report stays, and all other files only with --keep.
    """
    if keep is not None and (keep.exists() and (not keep.is_dir() or any(keep.iterdir()))):
        raise EffpassError(f"{keep} exists and is no empty folder", hint="choose another folder")
    folder = keep or Path(tempfile.mkdtemp(prefix="effpass-demo-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        run_demo("smollm2", folder.absolute(), workload=WORKLOAD if full else None)
    finally:
        if keep is None:
            _remove_all_but(folder, REPORT)
    kept = ", ".join(sorted(path.name for path in folder.iterdir()))
    stdout().print(f"Kept in {folder}: {kept}", markup=False, soft_wrap=True)


REPORT = "report.html"


def _remove_all_but(folder: Path, name: str) -> None:
    """Remove the contents of `folder` but for one file, and the folder if that leaves it empty."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != name:
            path.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


@dataclass
class _Story:
    """Prints each step with its time."""

    console: Console
    started: float = field(default_factory=time.perf_counter)

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        if self.console.is_terminal:
            with self.console.status(f"{what} …"):
                yield
        else:
            yield
        self.console.print(f"[green]✓[/green] {what}  [dim]{time.perf_counter() - started:.1f} s[/dim]")

    def say(self, what: Any = "", **style: Any) -> None:
        self.console.print(what, **style)

    def say_time(self) -> None:
        minutes, rest = divmod(round(time.perf_counter() - self.started), 60)
        self.say(f"Whole demo: {minutes} min {rest:02d} s.", style="dim")

    def quote(self, who: str, text: str) -> None:
        from rich.padding import Padding
        from rich.text import Text

        self.console.print(Padding(Text.assemble((f"{who}: ", "dim"), (text, "italic")), (0, 0, 0, 4)))


def run_demo(
    source: str,
    folder: Path,
    *,
    lessons: int = 6,
    max_new_tokens: int = 32,
    rounds: int = 2,
    workload: tuple[int, int, int, int] | None = None,
) -> None:
    """Run the demo.

    Args:
        source: as for :func:`effpass.load_model`.
        folder: where the adapter, the recipe, the ONNX file and the report go.
        lessons: training steps of the adapter.
        max_new_tokens: length of the generated texts.
        rounds: how often each way of running is timed.
        workload: batch, prompt, new tokens and pieces of text that named recipes are measured with; None leaves it out.
    """

    def generate(model: Any, **options: Any) -> Decode:
        return steps.decode(model, tokenizer, prompt, max_new_tokens, **options)

    hide_bars()
    story = _Story(stdout())
    _introduce(story)
    with story.step(f"load {source}"):
        from transformers.utils import logging

        from effpass import api, backend
        from effpass.cli import demo_steps as steps

        logging.set_verbosity_error()
        getLogger("effpass").setLevel(ERROR)  # the table at the end says it
        logging.disable_progress_bar()
        loaded = api.load_model(source)
        tokenizer = loaded.tokenizer
        prompt = steps.prompt_of(tokenizer, steps.QUESTION)
        before = generate(loaded.model)
    story.quote("question", steps.QUESTION)
    story.quote("the model as it comes", before.text)

    adapter, recipe = folder / "adapter", folder / "recipe.yaml"
    with story.step(f"train a LoRA adapter on one made-up fact, {lessons} steps, save it and attach it with PEFT"):
        losses = steps.teach(loaded.model, tokenizer, adapter, lessons)
        peft_model = steps.attach(loaded.model, adapter)
        unrewritten = generate(peft_model)
    story.quote(f"loss {losses[0]:.2f} → {losses[-1]:.2f}, and now", unrewritten.text)

    recipe.write_text(RECIPE, encoding="utf-8")
    _show_recipe(story)
    backend.reports.clear()
    compiled_step = steps.compiled_on_this_device(recipe)
    with story.step('compile the decode step: torch.compile(backend="effpass", options={"recipe": "recipe.yaml"})'):
        compiled = generate(peft_model, **compiled_step)
    story.quote("rewritten and compiled", compiled.text)
    story.say(f"    {_same(unrewritten, compiled)}", style="dim")

    with story.step("export to ONNX by the same recipe, and check the file with onnxruntime"):
        second = steps.attach(api.load_model(source).model, adapter)
        exported = api.export(second, recipe, folder / "model.onnx")
        merged_model = second.get_base_model()
        onnx = steps.onnx_decoder(exported.path, merged_model, tokenizer, prompt, max_new_tokens)
        answer = onnx()
    story.quote("onnxruntime", answer.text)
    story.say(f"    {_same(unrewritten, answer)}", style="dim")
    if steps.tensorrt_is_installed():
        with story.step("build a TensorRT engine from the ONNX file; running it takes a GPU"):
            engine = steps.tensorrt_engine(exported.path, merged_model, folder / "model.engine")
        story.say("    " + ", ".join(f"{what} {value}" for what, value in engine.items()), style="dim", markup=False)

    others = OtherPrograms()
    with story.step(f"time them, in turns, best of {rounds}"):
        seconds = steps.in_turns(
            {
                ATTACHED: lambda: generate(peft_model),
                "merged, eager": lambda: generate(merged_model),
                "merged, onnxruntime": onnx,
                "merged, compiled": lambda: generate(peft_model, **compiled_step),
            },
            rounds,
        )
    remark = others.remark()
    story.say(_timings(seconds, _bytes(peft_model), _bytes(merged_model)))
    if remark is not None:
        story.say(remark)
    report = folder / REPORT
    with story.step("inspect: what the recipe should gain on this CPU by the cost model, as a page"):
        inspection = steps.write_report(peft_model, source, recipe, report)
    story.say(f"    {report}", style="dim", markup=False, soft_wrap=True)
    story.say()
    story.say(_changes(backend.reports, exported))
    _say_how_exact(story, exported)
    _say_prediction(story, inspection)
    _conclude(story, seconds)
    if workload is not None:
        _measure_recipes(story, source, tokenizer, workload)
    story.say_time()


def _measure_recipes(story: _Story, source: str, tokenizer: Any, workload: tuple[int, int, int, int]) -> None:
    """The model as it comes beside the recipes that have a name, all on the decode engine."""
    from effpass import api
    from effpass.search.workload import Workload

    requests = Workload(*workload)
    story.say()
    others = OtherPrograms()
    found = measure_recipes(lambda: api.load_model(source).model, tokenizer, requests, story.step)
    story.say(recipes_table(found))
    remark = others.remark()
    if remark is not None:
        story.say(remark)
    story.say(
        f"After prompts of {requests.prompt} tokens of Python's reference, {requests.new_tokens} tokens each, batch"
        f" {requests.batch}. long-context attends to everything up to 2048 tokens; moe-serving is for mixtures of"
        " experts. A CPU runs the reference of sparse attention, and fuses nothing: the kernels need a GPU. `effpass"
        " optimize` finds the recipe for a model and a text.",
        style="dim",
    )


def _introduce(story: _Story) -> None:
    import torch

    cores = torch.get_num_threads()
    story.say("[bold]effpass demo[/bold]: one adapter, one recipe, three ways to run the result")
    story.say(
        f"on {_processor()}, {cores} thread{'s' * (cores != 1)}, torch {torch.__version__}, Python"
        f" {platform.python_version()}; float32, batch 1, greedy",
        style="dim",
    )
    story.say()


def _processor() -> str:
    """The processor's name where the system says it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or sys.platform


def _show_recipe(story: _Story) -> None:
    from rich.panel import Panel
    from rich.text import Text

    story.say(Panel(Text(RECIPE.rstrip()), title="recipe.yaml", title_align="left", expand=False))


def _same(expected: Decode, got: Decode) -> str:
    if got.tokens == expected.tokens:
        return f"the same {len(got.tokens)} tokens as the unrewritten model"
    agree = 0
    while agree < min(len(got.tokens), len(expected.tokens)) and got.tokens[agree] == expected.tokens[agree]:
        agree += 1
    return f"the first {agree} tokens are those of the unrewritten model; rounding decides the next one differently"


def _changes(compiled: Sequence[Report], exported: ExportedDecoder) -> Table:
    """What the passes did, as they counted it themselves."""
    table = _table("rewritten", "by", "layers", "operators", "weights read")
    for what, reports in (("compiled step", compiled), ("exported model", exported.reports)):
        for entry in (entry for report in reports for entry in report.passes):
            ops = ", ".join(f"{change:+d} {op.split('.')[1]}" for op, change in entry.ops.items())
            read = "" if entry.weight_bytes is None else f"{entry.weight_bytes / 1e6:+.1f} MB"
            table.add_row(what, entry.name, str(entry.hits), ops, read)
    return table


def _say_how_exact(story: _Story, exported: ExportedDecoder) -> None:
    worst = max(exported.checks, key=lambda check: check.export_error / check.tolerance)
    loss = max(check.method_loss for check in exported.checks)
    story.say(
        f"ONNX file: {megabytes(exported.size)}. In {len(exported.checks)} cases its logits differ from those of the"
        f" rewritten model by at most {worst.export_error:.1e} ({worst.tolerance:.1e} is allowed), and the rewritten"
        f" model's from those of the model with its adapter attached by {loss:.1e}."
    )


def _bytes(model: Any) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _timings(seconds: dict[str, float], attached_bytes: int, merged_bytes: int) -> Table:
    table = _table("measured here", "weights read", "time per token", "tokens/s", "speed")
    for name, taken in seconds.items():
        table.add_row(
            name,
            megabytes(attached_bytes if name == ATTACHED else merged_bytes),
            f"{taken * 1e3:.1f} ms",
            f"{1 / taken:.1f}",
            f"{seconds[ATTACHED] / taken:.2f} x",
        )
    return table


def _say_prediction(story: _Story, inspection: Inspection) -> None:
    """Beside the measured times: what the cost model says of the compiled step."""
    decode = next(work for work in inspection.workloads if work.name == "decode")
    if decode.stages:
        before, after = decode.stages[0].seconds, decode.stages[-1].seconds
        story.say(
            f"The cost model predicts {before * 1e3:.1f} ms per token compiled with the adapter beside, and"
            f" {after * 1e3:.1f} ms merged; {REPORT} shows where the time goes."
        )


def _table(first: str, *columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(first, box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _conclude(story: _Story, seconds: dict[str, float]) -> None:
    best = min(seconds, key=seconds.__getitem__)
    gain = seconds[ATTACHED] / seconds[best]
    if best == ATTACHED:
        story.say("On this CPU and in this run, no rewritten form was faster than the adapter beside the model.")
    else:
        story.say(f"Fastest on this CPU: {best}, [bold]{gain:.1f} times[/bold] the speed of the unrewritten model.")
    story.say(
        "Time per token is the median from one token to the next, prefill left out.\n"
        "Needs a GPU, and was not measured here: the decode engine's CUDA graphs and fused kernels, and weights in"
        " bfloat16.",
        style="dim",
    )
