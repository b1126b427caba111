"""`effpass inspect`: costs, the JSON report, the HTML page, and the page as a browser shows it."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from effpass.cli import units
from effpass.cli.html import Markup, tag
from effpass.cli.html_report import page

HOSTILE = "</style><script>alert('x')</script><img src=x onerror=alert(1)>\"'&"
VOID = {"meta", "wbr", "line", "rect", "path", "circle"}


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_adapter: Path) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), str(tiny_adapter)).eval()


@pytest.fixture(scope="module")
def report(adapted: Any) -> dict[str, Any]:
    """What ``effpass inspect --json`` would say of a PEFT model whose adapter is merged, on an H100."""
    import effpass

    found = effpass.inspect(adapted, {"passes": ["merge_lora"]}, predict_for="h100")
    return {"model": "tiny", "recipe": "r.yaml", **json.loads(json.dumps(found.to_json()))}


# -- the data ---------------------------------------------------------------------------------------------------------


def test_the_report_s_keys_are_stable(report):
    assert report["schema"] == 1
    assert set(report) == {
        "model", "recipe", "schema", "graphs", "reports", "decode_reports", "prepared", "ops_before", "ops_after",
        "weight_bytes", "derived_bytes", "unmet", "changed", "workloads", "memory", "ceilings", "dtype",
    }  # fmt: skip
    assert [w["name"] for w in report["workloads"]] == ["prefill", "decode"]
    for work in report["workloads"]:
        assert set(work) == {
            "name", "batch", "tokens", "cache_length", "stages", "flops_formula", "bytes_formula", "before", "after",
            "outline", "layer", "uncounted", "missing",
        }  # fmt: skip
        assert [set(stage) for stage in work["stages"]] == 2 * [
            {
                "name", "hits", "flops", "weight_bytes", "cache_bytes", "activation_bytes", "kernels", "seconds",
                "bound_seconds",
            }
        ]  # fmt: skip
        row = {"name", "kind", "operators", "count", "flops", "bytes", "seconds"}
        assert all(set(r) == row for r in work["before"] + work["after"])
    assert set(report["memory"]) == {"weights", "derived", "cache_per_token", "cache", "batch", "cache_length"}


def test_merging_gains_in_every_workload_and_all_parts_add_up(report):
    for work in report["workloads"]:
        first, last = work["stages"]
        assert (first["name"], first["hits"], last["name"], last["hits"]) == ("as loaded", 0, "merge_lora", 14)
        assert first["kernels"] - last["kernels"] == 28  # A and B of 14 layers; the sums are fused either way
        for key in ("flops", "weight_bytes", "seconds"):
            assert last[key] < first[key]
        for stage, rows in ((first, work["before"]), (last, work["after"])):
            assert sum(r["count"] for r in rows) == stage["kernels"]
            assert sum(r["flops"] for r in rows) == stage["flops"]
            assert sum(r["seconds"] for r in rows) == pytest.approx(stage["seconds"])
            assert 0 < stage["bound_seconds"] < stage["seconds"]
        assert work["missing"] == work["uncounted"] == []


def test_prefill_is_worked_out_for_sizes_it_was_not_traced_with(report):
    prefill = report["workloads"][0]
    assert (prefill["batch"], prefill["tokens"]) == (1, 512)
    batch, tokens = 1, 512
    assert eval(prefill["flops_formula"], {"batch": batch, "tokens": tokens}) == prefill["stages"][-1]["flops"]
    layers = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    attention = 2 * 2 * 2 * 4 * tokens**2 * 8
    assert prefill["stages"][-1]["flops"] == 2 * tokens * (layers + 257 * 32) + attention


def test_without_a_prompt_only_decode_is_traced(report, tiny_model, tiny_adapter):
    import effpass
    from effpass.core.errors import EffpassError

    model = effpass.load_model(str(tiny_model)).model
    found = effpass.inspect(model, {"passes": [{"merge_lora": {"adapter": str(tiny_adapter)}}]}, tokens=0)
    assert [workload.name for workload in found.workloads] == ["decode"]
    assert found.graphs == 1
    assert [entry.hits for entry in found.reports[0].passes] == [14]
    with pytest.raises(EffpassError, match=r"tokens is -1\n.*give 0 or more"):
        effpass.inspect(model, tokens=-1)


def test_decode_reads_the_cache_and_memory_counts_it(report):
    decode, memory = report["workloads"][1], report["memory"]
    per_token = 2 * 2 * 2 * 8 * 4  # layers, key and value, heads, size, bytes
    assert memory["cache_per_token"] == per_token
    assert memory["cache"] == 1024 * per_token
    assert decode["stages"][0]["cache_bytes"] == memory["cache"]


def test_one_layer_shows_what_changes(report):
    layer = report["workloads"][1]["layer"]
    names = [kernel["name"] for kernel in layer["before"]], [kernel["name"] for kernel in layer["after"]]
    assert (layer["stack"], layer["count"]) == ("model.layers", 2)
    assert sum("lora" in name for name in names[0]) == 14
    assert not any("lora" in name for name in names[1])
    assert [n for n in names[1] if n.endswith("_proj")].count("mlp.down_proj") == 1


def test_what_a_pass_does_in_a_step_alone_is_told(toy_passes, tiny_model, tmp_path, recipe_file, run):
    recipe, html = recipe_file("- touch_steps: {require: true}"), tmp_path / "r.html"
    result = run("inspect", tiny_model, "-r", recipe, "--predict-for", "h100", "--html", html)
    assert result.exit_code == 0, result.output
    assert "touch_steps (approximate): 0 rewritten, 1 in a decode step" in result.stdout
    assert "<b>0</b> places rewritten, 1 in a decode step" in html.read_text()


def test_a_graph_without_a_cache_says_so(toy_passes, capsys):
    import torch

    import effpass

    class NoCache(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(4))

        def forward(self, input_ids, use_cache=False):
            return input_ids.float() @ self.weight.repeat(4)

    found = effpass.inspect(NoCache(), {"passes": ["touch"]}, predict_for="h100")
    prefill, decode = found.workloads
    assert prefill.stages[0].flops > 0
    assert decode.stages == []
    assert "has no attribute 'config'" in decode.missing[0]
    assert found.memory.cache is None
    text = page({"model": "m", "recipe": "r", **found.to_json()})
    assert "decode: </b>not counted: AttributeError" in text


# -- the page ---------------------------------------------------------------------------------------------------------


class Outline(HTMLParser):
    """Elements with their texts; fails on one that is closed out of order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []

    def handle_starttag(self, name, attributes):
        self.tags.append((name, dict(attributes)))
        if name not in VOID:
            self.open.append(name)

    def handle_startendtag(self, name, attributes):
        self.tags.append((name, dict(attributes)))

    def handle_endtag(self, name):
        if name not in VOID:
            assert self.open.pop() == name

    def handle_data(self, data):
        self.texts.append(data)


def parsed(text: str) -> Outline:
    outline = Outline()
    outline.feed(text)
    assert outline.open == []
    return outline


def test_the_page_is_whole_and_loads_nothing(report):
    text = page(report)
    outline = parsed(text)
    names = [name for name, _ in outline.tags]
    assert {"script", "link", "img", "iframe", "object", "form"}.isdisjoint(names)
    assert not re.search(r"https?:|url\(|@import|src=|href=", text)
    assert names.count("svg") > 2
    # Every picture has words, every table its caption and headings.
    for name, attributes in outline.tags:
        if name == "svg":
            assert attributes["role"] == "img"
        if name == "th":
            assert attributes["scope"] in ("row", "col")
    assert names.count("table") == names.count("caption")
    shown = " ".join("".join(outline.texts).split())
    for words in ("merge_lora", "exact", "14 places rewritten", "NVIDIA H100", "Roofline", "self_attn.q_proj.lora_A"):
        assert words in shown
    decode = report["workloads"][1]["stages"]
    assert f"{units.duration(decode[0]['seconds'])} → {units.duration(decode[1]['seconds'])}" in shown


def _poisoned(value: Any) -> Any:
    """The report with every free text replaced by something hostile."""
    if isinstance(value, dict):
        return {key: value[key] if key in ("name",) and value[key] in ("prefill", "decode") else _poisoned(value[key])
                for key in value}  # fmt: skip
    if isinstance(value, list):
        return [_poisoned(item) for item in value]
    return HOSTILE if isinstance(value, str) else value


def test_no_text_of_a_report_becomes_markup(report):
    hostile = _poisoned(copy.deepcopy(report))
    hostile["unmet"] = [HOSTILE]
    hostile["prepared"] = [{"name": HOSTILE, "note": HOSTILE}]
    hostile["workloads"][0]["missing"] = hostile["workloads"][0]["uncounted"] = [HOSTILE]
    hostile["reports"][0]["passes"][0]["refusals"] = [{"node": HOSTILE, "reason": HOSTILE, "hint": HOSTILE}]
    hostile["reports"][0]["passes"][0]["ops"] = {HOSTILE: 1}
    text = page(hostile)
    outline = parsed(text)
    clean = {name for name, _ in parsed(page(report)).tags}
    assert {name for name, _ in outline.tags} <= clean | {"details", "summary", "ul", "li"}
    assert all(not key.startswith("on") for _, attributes in outline.tags for key in attributes)
    assert text.count("</style>") == 1
    assert HOSTILE in outline.texts


def test_tag_escapes_what_is_no_markup():
    assert tag("td", "a < b", Markup("<b>c</b>"), None, class_="x", aria_label='"') == (
        '<td class="x" aria-label="&quot;">a &lt; b<b>c</b></td>'
    )


def test_units():
    assert [units.bytes_(x) for x in (0, 999, 1_000, 513_100_000)] == ["0 B", "999 B", "1.00 kB", "513 MB"]
    assert [units.duration(x) for x in (2.5, 1.688e-3, 96.9e-6, 0)] == ["2.50 s", "1.69 ms", "96.9 µs", "0.00 µs"]
    assert (units.percent(2, 1), units.percent(1, 1), units.percent(0, 1)) == ("-50 %", "–", "new")  # noqa: RUF001
    assert units.formula("512*batch*tokens**2 + 3") == "512·batch·tokens² + 3"


# -- the command ------------------------------------------------------------------------------------------------------


def test_inspect_writes_a_page_and_prints_the_costs(run, recipe_file, tiny_model, tiny_adapter, tmp_path):
    file, out = recipe_file(f"- merge_lora: {{adapter: {tiny_adapter}}}"), tmp_path / "report.html"
    sizes = ("--batch", 3, "--tokens", 64, "--cache-length", 128)
    result = run("inspect", tiny_model, "-r", file, "--html", out, "--predict-for", "h100", *sizes)
    assert result.exit_code == 0, result.output
    shown = " ".join(result.stdout.split())
    for words in ("prefill, batch 3, 64 tokens", "decode, batch 3, cache of 128", "key-value cache: 98,304 bytes"):
        assert words in shown or words.replace("98,304 bytes", "0.1 MB") in shown
    assert "times are predicted, not measured, for NVIDIA H100" in shown
    assert "the weights are float32, the ceilings bfloat16" in shown
    assert f"report: {out}" in result.stdout.replace("\n", "")
    assert "64 tokens, batch 3" in "".join(parsed(out.read_text()).texts)
    assert [p.name for p in tmp_path.iterdir() if "tmp" in p.name] == []


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("folder", "is a folder"),
        ("nowhere/report.html", "does not exist"),
        ("there.html", "there.html exists"),
    ],
)
def test_a_page_that_cannot_be_written_is_refused_before_work(
    refused, recipe_file, tiny_model, tmp_path, monkeypatch, place, message
):
    from effpass.core import model

    monkeypatch.setattr(model, "load_model", lambda *a, **k: pytest.fail("loaded"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "there.html").write_text("mine")
    said = refused("inspect", tiny_model, "-r", recipe_file("- merge_lora"), "--html", tmp_path / place)
    assert message in said.replace("\n", "")
    assert (tmp_path / "there.html").read_text() == "mine"


def test_a_folder_without_permission_is_refused(refused, recipe_file, tiny_model, tmp_path, monkeypatch):
    access = os.access  # root may write anywhere, so that a folder's mode tells it nothing
    monkeypatch.setattr(os, "access", lambda path, mode, **more: mode != os.W_OK and access(path, mode, **more))
    said = refused("inspect", tiny_model, "-r", recipe_file("- merge_lora"), "--html", tmp_path / "report.html")
    assert "is not writable" in said.replace("\n", " ")


def test_an_unknown_device_is_refused_before_work(refused, recipe_file, tiny_model, monkeypatch):
    from effpass.core import model

    monkeypatch.setattr(model, "load_model", lambda *a, **k: pytest.fail("loaded"))
    said = refused("inspect", tiny_model, "-r", recipe_file("- merge_lora"), "--predict-for", "h10")
    assert "no ceilings are known for 'h10', did you mean 'h100'?" in said


# -- a browser --------------------------------------------------------------------------------------------------------

BROWSER = os.environ.get("EFFPASS_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)


def browse(file: Path, width: int, *more: str) -> tuple[str, str]:
    """The DOM after rendering, and what the browser logged; the network is out of reach."""
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND",
        "--enable-logging=stderr", f"--user-data-dir={file.parent / 'profile'}", f"--window-size={width},900",
        "--dump-dom", *more, file.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, done.stderr


# The page has no script of its own; the copy that is measured has this one.
_MEASURE = """<script>
const inside = [...document.querySelectorAll("h1, h2, h3, p, .scroll, .plot, .kernel, .card")];
document.title = JSON.stringify({
  overflow: document.documentElement.scrollWidth - innerWidth,
  wide: inside.filter(e => e.getBoundingClientRect().right > innerWidth + 1).length,
  hidden: inside.filter(e => e.matches(".plot") && e.getBoundingClientRect().height < 100).length,
  dots: [...document.querySelectorAll(".plot circle")].filter(c => {
    const box = c.ownerSVGElement.getBoundingClientRect(), at = c.getBoundingClientRect();
    return at.left < box.left || at.right > box.right || at.top < box.top || at.bottom > box.bottom;
  }).length,
  pale: getComputedStyle(document.body).backgroundColor,
});
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH and EFFPASS_CHROMIUM is not set")
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (390, False), (390, True)])
def test_the_page_in_a_browser(report, tmp_path, width, dark):
    file = tmp_path / "report.html"
    file.write_text(page(report), encoding="utf-8")
    theme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    dom, log = browse(file, width, *theme)
    assert "CONSOLE" not in log
    outline = parsed(dom)
    assert "Where the time goes" in outline.texts
    assert [name for name, _ in outline.tags].count("circle") > 10
    file.write_text(page(report).replace("</body>", f"{_MEASURE}</body>"), encoding="utf-8")
    dom, log = browse(file, width, *theme)
    assert "CONSOLE" not in log
    (title,) = re.findall("<title>({.*?})</title>", dom)
    measured = json.loads(title)
    assert measured["overflow"] <= 0
    assert (measured["wide"], measured["hidden"], measured["dots"]) == (0, 0, 0)
    shades = [int(x) for x in re.findall(r"\d+", measured["pale"])[:3]]
    assert all((x < 60) is dark for x in shades)


def test_a_pass_that_takes_heads_from_the_cache_is_shown_in_the_prefill(run, recipe_file, tiny_model, tmp_path):
    """A decode step is traced with the cache of the model as it is, and says why it can't be shown."""
    from transformers import AutoModelForCausalLM

    from effpass.passes.weights.structured_pruning import make_keep_artifact

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    make_keep_artifact(model, tmp_path / "keep", ffn_channels=32, kv_groups=1)
    recipe = recipe_file("- structured_pruning: {artifact: ./keep}")
    result = run("inspect", tiny_model, "-r", recipe, "--predict-for", "h100", "--json")
    assert result.exit_code == 0, result.output
    prefill, decode = json.loads(result.stdout)["workloads"]
    assert [stage["name"] for stage in prefill["stages"]] == ["as loaded", "structured_pruning"]
    assert prefill["missing"] == []
    assert decode["stages"] == []
    assert "structured_pruning can't narrow this graph" in decode["missing"][0]
    refused = run("inspect", tiny_model, "-r", recipe, "--predict-for", "h100", "--tokens", 0)
    assert refused.exit_code == 1
    assert "structured_pruning can't narrow this graph" in refused.stderr
