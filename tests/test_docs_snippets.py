"""The pages whose code belongs together: each section runs behind the first block of its page, and gives what it says.

Blocks marked `python` stand alone and run in test_repo.py; those marked `py` continue their page.
"""

from __future__ import annotations

import ast
import functools
import pkgutil
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
Names = dict[str, Any]


def sections(page: str) -> dict[str, str]:
    """The code of each section of a page, by its heading; "" is what stands before the first heading."""
    found = {}
    for part in re.split(r"^(?=## )", (DOCS / page).read_text(encoding="utf-8"), flags=re.MULTILINE):
        heading = part.partition("\n")[0].removeprefix("## ") if part.startswith("## ") else ""
        code = "\n".join(re.findall(r"^```py\n(.*?)^```", part, re.DOTALL | re.MULTILINE))
        if code:
            found[heading] = code
    return found


CODE = sections("with-transformers.md")


def run(heading: str) -> Names:
    names: Names = {"__name__": "documentation"}
    for code in (CODE[""], CODE[heading]):
        exec(compile(code, f"with-transformers.md, {heading}", "exec"), names)  # noqa: S102
    return names


def alone(names: Names, question: str) -> str:
    """The compressed model's answer to one question, without any of what the section shows."""
    import winnow
    from winnow.models.inputs import model_inputs

    model, processor = names["model"], names["processor"]
    inputs = model_inputs(model, processor, names["scene"].image, question)
    with winnow.compress(model, "hiprune:keep=64", processor=processor):
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def kept(names: Names) -> list[tuple[int, int]]:
    """Kept and entered tokens of each item of the last request, after checking the ledger and that all is detached."""
    handle = names["handle"]
    assert not handle.attached
    assert "get_image_features" not in vars(names["model"].base_model)
    assert handle.last.flops < handle.last.flops_full
    return [(len(item.kept), item.n_visual) for item in handle.last.items]


def chat(names: Names) -> None:
    assert kept(names) == [(64, 256)]
    assert names["answer"].strip() == alone(names, "is there a motorcycle?") == "yes"
    assert names["ids"].shape[1] > names["inputs"]["input_ids"].shape[1] > 256


def pipelines(names: Names) -> None:
    assert kept(names) == [(64, 256)]
    assert names["found"][0]["generated_text"].strip() == "yes"
    with names["winnow"].compress(names["ask"].model, "hiprune:keep=16") as handle:  # a pipeline that exists already
        names["ask"](text=names["messages"], max_new_tokens=1)
    assert len(handle.last.items[0].kept) == 16


def batches(names: Names) -> None:
    assert kept(names) == [(64, 256)] * 3
    assert [item.row for item in names["handle"].last.items] == [0, 1, 2]
    mask = names["batch"]["attention_mask"]
    assert (mask[:, 0] == 0).any(), "no row is padded, so nothing is shown"
    assert bool((mask[:, -1] == 1).all()), "not padded on the left"
    assert [a.strip() for a in names["answers"]] == [alone(names, q) for q in names["questions"]]


def streaming(names: Names) -> None:
    assert kept(names) == [(64, 256)]
    assert "".join(names["pieces"]).strip() == "yes"
    assert not names["thread"].is_alive()


def turns(names: Names) -> None:
    assert kept(names) == [(32, 256)]
    ledger = names["handle"].last
    assert ledger.selection is not None
    assert "again" in ledger.selection
    assert ledger.notes["read_again"] > 256
    assert ledger.logical[0] == names["ids"].shape[1]


def adapters(names: Names) -> None:
    assert kept(names) == [(64, 256)]
    assert names["answer"].strip() == "yes", "a fresh adapter changes nothing"
    assert torch.equal(names["ids"], names["without"])
    tuned, inputs = names["tuned"], names["inputs"]
    generator = torch.Generator().manual_seed(0)
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    with torch.no_grad():
        plain = tuned(**inputs).logits
        with tuned.disable_adapter():
            assert not torch.equal(tuned(**inputs).logits, plain), "the adapter takes no part"
        with names["winnow"].compress(tuned, "hiprune:keep=100%"):
            assert torch.equal(tuned(**inputs).logits, plain)


CHECKS: dict[str, Callable[[Names], None]] = {
    "Chat templates": chat,
    "Pipelines": pipelines,
    "Batches": batches,
    "Streaming": streaming,
    "Several questions about one picture": turns,
    "PEFT": adapters,
}


def test_every_section_with_code_has_a_check() -> None:
    assert list(CODE) == ["", *CHECKS]


@pytest.mark.parametrize("heading", CHECKS)
def test_with_transformers(heading: str) -> None:
    CHECKS[heading](run(heading))


@functools.cache  # the package is parsed once for all that is quoted
def messages() -> list[str]:
    """Every string of the package, with … where it puts a value in."""
    found = []
    for path in sorted((ROOT / "winnow").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


TROUBLE = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"^```text\n(.*?)\n```", TROUBLE, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("quoted", QUOTED)
def test_every_refusal_on_the_troubleshooting_page_is_one_of_the_package(quoted: str) -> None:
    pieces = [re.escape(piece.strip()) for piece in quoted.split("…") if piece.strip()]
    assert max(map(len, pieces)) >= 6
    pattern = re.compile(".*".join(pieces), re.DOTALL)
    assert any(pattern.search(text) for text in messages()), "no message of the package says this any more"


API = {
    name: page.name
    for page in sorted((DOCS / "api").glob("*.md"))
    for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
}


@pytest.mark.parametrize("name", API)
def test_every_name_of_the_api_pages_exists_and_has_a_docstring(name: str) -> None:
    found = pkgutil.resolve_name(name)
    assert (found.__doc__ or "").strip(), f"{API[name]} shows {name}, which says nothing"


def test_the_api_pages_show_all_that_winnow_exports() -> None:
    import winnow

    shown = {name.removeprefix("winnow.") for name in API}
    assert set(winnow.__all__) - shown == {"__version__", "plan"}  # `plan` is Plan.of, which Plan shows
