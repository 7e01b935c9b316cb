"""Write, or check, the table of model classes: where each can be compressed, or why it cannot.

Every image-text-to-text class of transformers is built small with random weights (`tests/builds`), and the checks of
`winnow doctor` run on it. The table is `winnow/data/families.json`, which `winnow families` shows, and the page
`docs/model-classes.md`; the README has the numbers.

Usage: python tools/families.py write | check
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "winnow" / "data" / "families.json"
PAGE, README = ROOT / "docs" / "model-classes.md", ROOT / "README.md"
ROWS = ("3 A 6", "3 B 9")
sys.path.insert(0, str(ROOT / "tests"))


def table(workers: int = 2) -> dict[str, Any]:
    """model_type → class, adapter, points and reason, for each class that transformers lists."""
    import builds
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as CLASSES

    by_type: dict[str, str] = {}
    for name, build in builds.every().items():
        plain = build.model_type.replace("-", "_").replace(".", "_")
        if build.model_type not in by_type or name == plain:
            by_type[build.model_type] = name
    with ProcessPoolExecutor(workers) as pool:
        rows = list(pool.map(row, [by_type.get(kind) for kind in CLASSES]))
    found = {}
    for (kind, cls), own in zip(CLASSES.items(), rows, strict=True):
        found[kind] = {"class": cls, **own}
    return found


def row(name: str | None) -> dict[str, Any]:
    """What the checks find on one build."""
    if name is None:
        return {"adapter": "", "points": [], "reason": "no build of this class yet"}
    import builds
    import torch
    import transformers

    from winnow.core.errors import UnsupportedError
    from winnow.engine.doctor import GENERIC, run_checks
    from winnow.models.families import family_of
    from winnow.models.supported_versions import trying

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    build = builds.every()[name]
    model = build.model()
    try:
        with trying():
            family = family_of(model)
        samples = build.samples(ROWS)
        batch = build.collate(samples, side="left", extra=1) if build.padding else {}
        checks = run_checks(model, samples, batch)
    except UnsupportedError as error:
        reason = (build.cannot or _reason(str(error))).rstrip(".")
        return {"adapter": "", "points": [], "reason": reason[:1].lower() + reason[1:]}
    red = [check for check in checks if not check.ok]
    if red:
        return {"adapter": "", "points": [], "reason": _found(f"{red[0].name}: {red[0].detail}")}
    if not family.generic:
        return {"adapter": family.name, "points": list(family.info(model).points), "reason": ""}
    said = next(check.detail for check in checks if check.name == GENERIC)
    inside = "inside the LM" in said and "not inside" not in said
    return {
        "adapter": family.name,
        "points": ["projected", "layers"] if inside else ["projected"],
        "reason": "" if inside else _found(said.partition("not inside the LM: ")[2]),
    }


def _found(detail: str) -> str:
    """What a check has found, without what it suspects."""
    return detail.partition(". Suspect:")[0]


def _reason(message: str) -> str:
    """The reason in a refusal, without what is said around it."""
    return message.partition("is not supported: ")[2].partition(". `winnow")[0] or message


def page(found: dict[str, Any]) -> str:
    """The table as the documentation shows it."""
    lines = ["| model type | adapter | points | why not, or not everywhere |", "|---|---|---|---|"]
    for kind, own in sorted(found.items()):
        points = ", ".join(f"`{point}`" for point in own["points"])
        reason = own["reason"].replace("|", "\\|")
        lines.append(f"| `{kind}` | {own['adapter'] or '–'} | {points or '–'} | {reason} |")
    return "\n".join(lines)


def between(text: str, name: str, new: str, gap: str) -> str:
    """A text with what stands between the marks of this name exchanged."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, _, rest = text.partition(begin)
    return f"{before}{begin}{gap}{new}{gap}{end}{rest.partition(end)[2]}"


def main(action: str) -> int:
    with tempfile.TemporaryDirectory() as cache:
        os.environ["WINNOW_CACHE"] = cache  # what was accepted before must not answer for this run
        found = table()
    works = {point: sum(point in own["points"] for own in found.values()) for point in ("projected", "layers")}
    print(f"{len(found)} classes: {works['projected']} at projected, {works['layers']} at layers[k]")
    said = f"{works['projected']} can be compressed before the language model and {works['layers']} inside it"
    made = {
        TABLE: json.dumps(found, indent=1, ensure_ascii=False) + "\n",
        PAGE: between(PAGE.read_text(encoding="utf-8"), "families", page(found), "\n"),
        README: between(README.read_text(encoding="utf-8"), "classes", said, ""),
    }
    stale = [path for path, text in made.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if action == "write":
        for path in stale:
            path.write_text(made[path], encoding="utf-8")
        return 0
    if TABLE in stale:
        was = json.loads(TABLE.read_text(encoding="utf-8"))
        for kind in sorted(was.keys() | found.keys()):
            if was.get(kind) != found.get(kind):
                print(f"{kind}: committed {was.get(kind)}, found {found.get(kind)}")
    for path in stale:
        print(f"{path.relative_to(ROOT)} differs from this run: say make families", file=sys.stderr)
    return int(bool(stale))


if __name__ == "__main__":
    if sys.argv[1:] not in (["write"], ["check"]):
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1]))
