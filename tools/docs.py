"""Write the pages of the methods from the registry, or check that the committed ones agree with it.

    python tools/docs.py write            docs/methods/*.md, and the measured table of README.md
    python tools/docs.py check            exit 1 if they differ from what `write` would write
    python tools/docs.py measure STORE [TWIN]
                                          docs/measured.json and docs/images/methods/ from a store of `winnow bench`,
                                          and from one of the same questions to the model's twin; exit 1 if by these
                                          figures the default method should be another

A page says what the method's own module says; what was measured comes from docs/measured.json, where there is one.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import default_method

from winnow.core.budget import Budget
from winnow.core.errors import WinnowError
from winnow.core.info import ModelInfo
from winnow.core.listing import plain as plain_value
from winnow.core.method import Method
from winnow.core.plan import Plan
from winnow.core.registry import Entry, entries, method_class
from winnow.core.settings import described, types_of
from winnow.learn.markdown import table
from winnow.systems import System, families, systems

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs" / "methods"
MEASURED = ROOT / "docs" / "measured.json"
PICTURES = ROOT / "docs" / "images" / "methods"
README = ROOT / "README.md"
ON_PICTURES = ROOT / "docs" / "pictures.md"
TABLE = re.compile("(?<=<!-- measured:begin -->\n).*?(?=<!-- measured:end -->)", re.DOTALL)
FIGURES = (
    "label", "budget", "accuracy", "accuracy_low", "accuracy_high", "retained", "retained_low", "retained_high",
    "evidence_recall", "tokens_kept", "layer_tokens", "flops_share",
)  # fmt: skip
SHOWN = "32"  # the budget of the table in the README: an eighth of the reference model's tokens
MARK = "<!-- Written by tools/docs.py from the registry; do not edit. -->\n"
FACTS = ("Looks at", "Cost", "Departs from the paper", "Departs from the released code")
EXAMPLE = ModelInfo(
    model="LLaVA-1.5-7B", family="llava", depth=32, width=4096, vision_depth=24, feature_layer=-2, vision_width=1024,
    points=("blocks", "blocks.mlp", "features", "projected", "layers", "kv"),
    sound_depth=32,  # it hears nothing; a page says of a method that does where it acts
)  # fmt: skip


def told(cls: type[Method]) -> dict[str, str]:
    """The parts of a method's module docstring: its first line as `idea`, each of `FACTS`, and the rest as `how`."""
    text = inspect.cleandoc(importlib.import_module(cls.__module__).__doc__ or "")
    first, _, rest = text.partition("\n")
    found: dict[str, str] = {"idea": first.partition(": ")[2] or first, "how": ""}
    for paragraph in re.split(r"\n\s*\n", rest.strip()):
        lead, *parts = re.split(rf"({'|'.join(FACTS)}): ", " ".join(paragraph.split()))
        found["how"] = f"{found['how']}\n\n{lead.strip()}".strip()
        for name, said in zip(parts[::2], parts[1::2], strict=True):
            found[name] = f"{found.get(name, '')} {said.strip()}".strip()
    return found


def arguments(cls: type[Method]) -> dict[str, str]:
    """What the class docstring says of each setting."""
    _, _, listed = inspect.cleandoc(cls.__doc__ or "").partition("Args:\n")
    found: dict[str, str] = {}
    for name, said in re.findall(r"^    (\w[\w, ]*): (.*(?:\n(?:      .*)?)*)", listed, re.MULTILINE):
        for one in name.split(", "):
            found[one] = " ".join(said.split())
    return found


def shown(value: Any) -> str:
    """A setting as a plan string writes it."""
    if isinstance(value, Budget):
        return str(value)
    if isinstance(value, tuple):
        return f"[{','.join(map(shown, value))}]"
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if dataclasses.is_dataclass(value):  # a signal
        return str(plain_value(value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def wrapped(text: str) -> str:
    """A paragraph, or an entry of a list, in short lines."""
    indent = "  " if text.startswith("- ") else ""
    return textwrap.fill(text, 118, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def settings(cls: type[Method]) -> str:
    """A table of the settings, what they may be, and their defaults."""
    said, defaults = arguments(cls), cls.defaults()
    rows = []
    for name, hint in types_of(cls).items():
        default = f"`{shown(defaults[name])}`" if name in defaults else "required"
        rows.append((f"`{name}`", described(hint), default, said.get(name, "")))
    return table(("setting", "allowed", "default", "meaning"), rows)


def released(cls: type[Method]) -> str:
    """The settings of the authors' code, as a plan."""
    if cls.released is None:
        return "none: no settings repeat code of its authors"
    plan = f"{cls.slug}:released"
    return f"`{plan}`, which is `{Plan.of(plan)}`"


def points(cls: type[Method]) -> str:
    """Where it acts with its defaults, on a model of the size of LLaVA-1.5-7B; ahead of the processor, on any."""
    if cls.at in ("prompt", "frames", "pixels"):
        return f"`{cls.at}`"
    at = list(dict.fromkeys(f"`{step.at}`" for step in cls().checked_steps(EXAMPLE)))
    return ", ".join(at if len(at) <= 6 else (*at[:2], "…", at[-1]))


def identity(cls: type[Method]) -> str:
    """The setting that changes nothing, as a plan."""
    if cls.identity is None:
        return "none: it changes the tokens at every setting"
    return f"`{cls.slug}:{','.join(f'{name}={shown(value)}' for name, value in cls.identity.items())}`"


def page(entry: Entry, system: System | None, measured: dict[str, Any]) -> str:
    """The page of one method."""
    cls = method_class(entry.slug)
    parts, name = told(cls), system.name if system else entry.slug
    paper = f"[arXiv {entry.arxiv}](https://arxiv.org/abs/{entry.arxiv})" if entry.arxiv else "no paper"
    lines = [MARK, f"# {name}", ""]
    if system:
        lines += [f"*{system.title}*, {paper}.", ""]
    lines += [parts["idea"][0].upper() + parts["idea"][1:], ""]
    code = f'winnow.compress(model, "{entry.slug}")'
    if entry.of_input:
        code = f'handle = winnow.compress(model, "{entry.slug}", processor=processor)\nchosen = handle.prompt(messages)'
    lines += [f"```python\n{code}\n```", ""]
    where = "ahead of the processor" if entry.of_input else f"layers as in a {EXAMPLE.model}"
    facts = {
        "Looks at": parts.get("Looks at", ""),
        "Acts at": f"{points(cls)} ({', '.join(entry.stages)}; {where})",
        "Cost": parts.get("Cost", ""),
        "Memory": "one table of V × V numbers for each item" if cls.pairwise else "",
        "Changes nothing at": identity(cls),
        "As its authors released it": released(cls),
        "Kind": f"{entry.kind}, family {entry.family} ({families().get(entry.family, 'your own')})",
    }
    lines += [wrapped(f"- **{what}:** {said}") for what, said in facts.items() if said]
    lines += ["", "## Settings", "", settings(cls), ""]
    if parts["how"]:
        lines += ["## How", "", "\n\n".join(map(wrapped, parts["how"].split("\n\n"))), ""]
    lines += ["## Where it departs", ""]
    for what in FACTS[2:]:
        lines += [wrapped(f"**From {what.removeprefix('Departs from ')}:** {parts.get(what, 'not said.')}"), ""]
    lines += ["## Where it has run", "", *proved(system), *figures(entry.slug, measured)]
    return "\n".join(lines).rstrip() + "\n"


def proved(system: System | None) -> list[str]:
    """What the recorded tests prove."""
    if system is None or system.state == "none":
        return ["No recorded test run has proved anything of it yet.", ""]
    where = ", ".join(f"`{build}`" for build in system.builds) or "no build"
    return [
        f"By the recorded tests it {'**works**' if system.state == 'works' else 'works **partly**'}; on {where}.",
        "",
    ]


def figures(slug: str, measured: dict[str, Any]) -> list[str]:
    """Its measured rows and its picture."""
    rows = [row for row in measured.get("rows", ()) if row["label"] == slug]
    picture = PICTURES / f"{slug}.webp"
    lines: list[str] = []
    if rows:
        lines += ["## Measured", "", measured_table([*plain(measured), *rows]), "", about(measured), ""]
    if picture.is_file():
        seen = "clear: kept; half clear: merged; grey: dropped; outlined: the evidence of the question"
        lines += [f"![What it keeps ({seen})](../images/methods/{picture.name})", "", seen.capitalize() + ".", ""]
    return lines


def plain(measured: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in measured["rows"] if row["label"] == "full"]


def about(measured: dict[str, Any]) -> str:
    """How the figures were made."""
    said = wrapped(f"{measured['about']} Brackets are 95 % intervals. One run does not rank methods. Made by")
    return f"{said}\n\n```sh\n{measured['command']}\n```"


Cells = dict[tuple[str, str], dict[str, Any]]


def measured_table(rows: list[dict[str, Any]], twin: Cells | None = None) -> str:
    """Rows of `winnow report`'s JSON as a table, with those of the twin by (label, budget) beside them."""
    head = ["method", "tokens kept", "tokens per layer", "right, %", "retained, %", "evidence recall, %", "FLOPs, %"]
    beside = ["right, twin, %", "retained, twin, %"] if twin else []
    return table([*head, *beside], [_measured(row) + (_beside(row, twin) if twin else []) for row in rows])


def _measured(row: dict[str, Any]) -> list[str]:
    return [
        f"{row['label']} {row['budget']}".strip(), _number(row, "tokens_kept"), _number(row, "layer_tokens"),
        _spread(row, "accuracy"), _spread(row, "retained"), _share(row, "evidence_recall"), _share(row, "flops_share"),
    ]  # fmt: skip


def _beside(row: dict[str, Any], twin: Cells) -> list[str]:
    own = twin.get((row["label"], row["budget"]), {})
    return [_spread(own, "accuracy"), _spread(own, "retained")]


def _number(row: dict[str, Any], name: str, form: str = ".4g", scale: float = 1.0) -> str:
    return "–" if row.get(name) is None else format(scale * row[name], form)


def _share(row: dict[str, Any], name: str) -> str:
    return _number(row, name, ".1f", 100.0)


def _spread(row: dict[str, Any], name: str) -> str:
    if row.get(name) is None:
        return "–"
    return f"{_share(row, name)} [{_share(row, name + '_low')}, {_share(row, name + '_high')}]"


def readme(measured: dict[str, Any]) -> str:
    """The README with the measured rows of one budget, in the order of their names: one run does not rank methods."""
    text = README.read_text(encoding="utf-8")
    rows = [*plain(measured), *(row for row in measured["rows"] if row["budget"] == SHOWN)] if measured else []
    lines = [measured_table(rows), "", about(measured)] if rows else ["Nothing has been measured yet."]
    return TABLE.sub(lambda _: "\n".join([*lines, ""]), text)


def on_pictures(measured: dict[str, Any]) -> str:
    """Every measured row, by budget and then by name, and which methods lie plainly below evenly spaced tokens."""
    rows = measured.get("rows", [])
    budgets = sorted({row["budget"] for row in rows if row["budget"]}, key=lambda budget: -int(budget))
    held = measured.get("twin", {})
    twin: Cells = {(row["label"], row["budget"]): row for row in held.get("rows", ())}
    parts = [
        f"{MARK}\n# Methods on pictures",
        "Every method of pictures on the bundled reference model, at four budgets of its 256 tokens. Methods that cut "
        "inside the language model must be compared by *tokens per layer*, not by their setting; those made for videos "
        "see a clip of one frame. Intervals are in brackets; that of *retained* is paired with the full model. What "
        "papers claim of each method, and whether it holds here, is in "
        "[the findings](findings.md), with the methods that lie below choices that look at nothing.",
        about(measured) if rows else "Nothing has been measured yet.",
    ]
    if twin:
        parts.append(
            "The columns *twin* are the same questions to the model's [twin](reference-model.md), which has the same "
            "tower and whose language model never missed a token in training; its weights are not shipped. Learned "
            "methods have weights for the shipped model alone, and so no figures there. Made by"
            f"\n\n```sh\nmake twin\n{held['command']}\n```"
        )
    free = [row for row in rows if not row["budget"]]
    if free:
        parts += ["## Without a budget", measured_table(free, twin)]
    for budget in budgets:
        own = [row for row in rows if row["budget"] == budget]
        parts += [f"## {budget} tokens", measured_table(own, twin)]
        parts += [said for said in (differing(own, twin),) if said]
        below = plainly_below(own)
        if below:
            parts.append(f"Below evenly spaced tokens, at no fewer tokens per layer, their intervals apart: {below}.")
    return "\n\n".join(parts) + "\n"


def differing(rows: list[dict[str, Any]], twin: Cells) -> str:
    """The methods that retain more on one of the two models, their intervals apart."""
    names: dict[str, list[str]] = {"shipped model": [], "twin": []}
    for row in rows:
        own = twin.get((row["label"], row["budget"]), {})
        if row["retained"] is None or own.get("retained") is None:
            continue
        if row["retained_low"] > own["retained_high"]:
            names["shipped model"].append(f"`{row['label']}`")
        elif own["retained_low"] > row["retained_high"]:
            names["twin"].append(f"`{row['label']}`")
    said = (f"on the {where} {', '.join(found)}" for where, found in names.items() if found)
    listed = "; ".join(said)
    return f"Retains more, the intervals apart: {listed}." if listed else ""


def plainly_below(rows: list[dict[str, Any]], blind: str = "uniform-M") -> str:
    """The methods that read at least as much as a blind choice and answer less."""
    uniform = next((row for row in rows if row["label"] == blind), None)
    if uniform is None:
        return ""
    names = [
        f"`{row['label']}`"
        for row in rows
        if row["accuracy"] is not None
        and row["accuracy_high"] < uniform["accuracy_low"]
        and row["layer_tokens"] >= uniform["layer_tokens"] - 1
        and row["label"] not in ("random-M", "downsample-M")
    ]
    return ", ".join(names)


def index(found: list[Entry], known: dict[str, System]) -> str:
    """The list of methods, and which have run on which builds."""
    builds = sorted({build for entry in found if entry.slug in known for build in known[entry.slug].builds})
    rows, marks = [], []
    for entry in found:
        system = known.get(entry.slug)
        paper = f"[{entry.arxiv}](https://arxiv.org/abs/{entry.arxiv})" if entry.arxiv else ""
        name = f"[{system.name if system else entry.slug}]({entry.slug}.md)"
        rows.append((name, ", ".join(entry.stages), entry.summary, paper))
        ran = ("✔" if system and build in system.builds else "" for build in builds)
        marks.append((f"`{entry.slug}`", system.state if system else "none", *ran))
    parts = [
        f"{MARK}\n# Methods\n\nWhat a plan may name. Each is one file in `winnow/methods`.",
        table(("method", "stage", "what it does", "paper"), rows),
        "## What has run on what",
    ]
    if builds:
        parts.append("✔ where a recorded test of the method passed on a tiny build of the real model class.")
        parts.append(table(("method", "state", *(f"`{build}`" for build in builds)), marks))
    else:
        parts.append("No method has run on a model in the recorded tests.")
    return "\n\n".join(parts) + "\n"


def outputs() -> dict[Path, str]:
    """What each generated page should hold."""
    found = [entry for entry in entries() if entry.module.startswith("winnow.methods.")]
    known = {system.slug: system for system in systems()}
    measured = json.loads(MEASURED.read_text(encoding="utf-8")) if MEASURED.is_file() else {}
    pages = {PAGES / f"{entry.slug}.md": page(entry, known.get(entry.slug), measured) for entry in found}
    return {
        README: readme(measured),
        ON_PICTURES: on_pictures(measured),
        PAGES / "index.md": index(found, known),
        **pages,
    }


def write() -> int:
    wanted = outputs()
    PAGES.mkdir(parents=True, exist_ok=True)
    for stray in set(PAGES.glob("*.md")) - set(wanted):
        stray.unlink()
    for path, text in wanted.items():
        path.write_text(text, encoding="utf-8")
    return 0


def check() -> int:
    wanted = outputs()
    stale = {p for p, text in wanted.items() if not p.is_file() or p.read_text(encoding="utf-8") != text}
    for path in sorted(stale | (set(PAGES.glob("*.md")) - set(wanted))):
        print(f"{path.relative_to(ROOT)} differs from what the registry says; run `make docs`.", file=sys.stderr)
        stale.add(path)
    return 1 if stale else 0


def measure(store_path: str, twin_path: str | None = None) -> int:
    """Take the figures of the newest run of answers into the documentation, and a picture of each method.

    Args:
        twin_path: a store with answers of the model's twin to the same questions.
    """
    from winnow.bench.report_data import reports
    from winnow.bench.store import Store

    with Store(store_path) as store:
        report = reports(store)[-1]
        content = figures_of(report)
        if twin_path is not None:
            content["twin"] = _twin(twin_path, report)
        MEASURED.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        _draw(store, report, Path(store_path).parent)
    return write() or check_default()


def figures_of(report: Any) -> dict[str, Any]:
    """What the pages say of a run of answers."""
    from winnow.bench.report import answered
    from winnow.bench.report_page import command

    said = f"{len(report.questions)} questions to {report.run.settings.get('model', 'a model')}."
    return {"command": command(report), "about": said, "rows": answered(report, FIGURES)}


def _twin(path: str, shipped: Any) -> dict[str, Any]:
    from winnow.bench.report_data import reports
    from winnow.bench.store import Store

    with Store(path) as store:
        report = reports(store)[-1]
    if sorted(report.questions) != sorted(shipped.questions):
        raise WinnowError(f"{path} holds answers to other questions; run `winnow bench` alike for both models")
    return figures_of(report)


def _draw(store: Any, report: Any, folder: Path) -> None:
    """A picture of what each method keeps, at the budget that shows most."""
    from PIL import Image

    from winnow.bench.report_pictures import Album, chosen_budget, draw, shots

    PICTURES.mkdir(parents=True, exist_ok=True)
    album, budget = Album(folder, set()), chosen_budget(report)
    for row in report.methods:
        drawn = [draw(shot, album.picture(shot.question)) for shot in shots(store, row, report)[:3]]
        if drawn and row.cell.budget == budget:
            strip = Image.new("RGB", (sum(d.width + 8 for d in drawn) - 8, max(d.height for d in drawn)), "white")
            left = 0
            for one in drawn:
                strip.paste(one, (left, 0))
                left += one.width + 8
            strip.save(PICTURES / f"{row.cell.label}.webp", quality=80, method=6)


def check_default() -> int:
    """Fail where the default method is not the one that the rule names by the new figures."""
    from winnow.engine.compress import DEFAULT

    try:
        said = default_method.complaint(default_method.load(MEASURED), DEFAULT)
    except WinnowError as error:
        said = str(error)
    if said:
        print(said, file=sys.stderr)
    return 1 if said else 0


def main(given: list[str]) -> int:
    if given == ["write"]:
        return write()
    if given == ["check"]:
        return check()
    if len(given) in (2, 3) and given[0] == "measure":
        return measure(*given[1:])
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
