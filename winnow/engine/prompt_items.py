"""What the ledger of a request says of its pictures: how a plan's steps ahead of the processor let each of them in."""

from collections.abc import Iterable, Sequence
from typing import Any

from winnow.core.entered import Entered
from winnow.core.errors import UnsupportedError, WinnowError
from winnow.engine.bound_model import BoundModel
from winnow.engine.bound_plan import BoundPlan
from winnow.engine.prompt import Prompt
from winnow.engine.request import Request

HOW = (
    "prepare the messages with chosen = handle.prompt(messages), and call the model in `with handle.using(handle.plan, "
    "prompt=chosen)`"
)


def checked_prompts(plan: BoundPlan, bound: BoundModel, given: Any) -> tuple[Prompt, ...] | None:
    """The requests that a caller names, one for each row.

    Args:
        given: a `Prompt`, one for each row of a batch, or None.

    Raises:
        WinnowError: it is none, or was prepared by another plan.
        UnsupportedError: it cannot be told of this model's requests whether they are those.
    """
    if given is None:
        return None
    prompts = [given] if isinstance(given, Prompt) else list(given) if isinstance(given, list | tuple) else [given]
    wrong = [type(prompt).__name__ for prompt in prompts if not isinstance(prompt, Prompt)]
    if wrong or not prompts:
        got = f"a {wrong[0]}" if wrong else "an empty list"
        raise WinnowError(f"prompt= is {got}; give what handle.prompt(messages) returned, or a list: one for each row.")
    for prompt in prompts:
        if prompt.plan != plan.plan.key:
            raise WinnowError(f"prompt= was prepared by {prompt.plan}, and this is {plan.plan.key}; prepare it anew.")
    if bound.family.cross:
        raise UnsupportedError(
            f"{bound.info.model} reads pictures by cross-attention, where it cannot be told which entered: leave out "
            "prompt=."
        )
    return tuple(prompts)


def refuse_unprepared(plan: BoundPlan, what: str) -> None:
    """Refuse pictures or videos under a plan that chooses or cuts some, if nobody says that it was asked."""
    if plan.changes_pictures:
        does = " and ".join(["chooses pictures"] * bool(plan.prompt) + ["cuts or scales pictures"] * bool(plan.pixels))
        raise WinnowError(f"{plan.plan} {does}, which it cannot do {what}: {HOW}.")


def on_made_inputs(plan: BoundPlan) -> BoundPlan:
    """The plan, if it has nothing to do before inputs are made: for callers that make them once for all plans."""
    if plan.changes_pictures:
        raise UnsupportedError(
            f"{plan.plan} chooses, cuts or scales pictures ahead of the processor, and here inputs are made before a "
            "plan is known; `winnow run` asks one question under it, and handle.prompt(messages) is for programs."
        )
    return plan


def tell_pictures(request: Request, rows: int, items: Sequence[Any]) -> None:
    """Say in the ledgers of a request's pictures how they entered.

    Where the tiles of a picture are items of their own, those of several pictures are not told apart.

    Args:
        rows: of the batch.
        items: of the request, whose `record` is the ledger.

    Raises:
        WinnowError: the plan chooses or cuts pictures and nobody says that it did, or the pictures are not those of the
            request.
    """
    seen = [item for item in items if item.record.modality in ("image", "video")]
    record, prompts = request.encodings.get("image"), request.prompts
    if prompts is None:
        known = None if record is None else record.entered
        if seen and known is None:
            refuse_unprepared(request.plan, "inside the model")
        for item in seen if known else ():
            if item.record.modality == "image":
                item.record.picture = known.get(item.number)  # type: ignore[union-attr]
        return
    if rows % len(prompts):
        raise WinnowError(f"prompt= names {len(prompts)} requests, and the batch has {rows} rows.")
    copies = rows // len(prompts)  # beams repeat each row
    said: dict[int, Entered] = {}
    for row in range(rows):
        own = [item for item in seen if item.row == row and item.record.modality == "image"]
        for item, entered in _matched(own, prompts[row // copies], row, request.bound.family.tiles_apart):
            _check_grid(entered, item)
            item.record.picture = said[item.number] = entered
    if record is not None:
        record.entered = said


def _matched(
    items: Sequence[Any], wanted: Sequence[Entered], row: int, tiles_apart: bool
) -> Iterable[tuple[Any, Entered]]:
    """The items of a row with their pictures, as far as they can be told."""
    if len(items) == len(wanted):
        return zip(items, wanted, strict=True)
    if tiles_apart and len(items) > len(wanted) > 0:
        return [(item, wanted[0]) for item in items] if len(wanted) == 1 else ()
    raise WinnowError(
        f"prompt= lets {len(wanted)} pictures into row {row}, and the request has {len(items)} there; make its "
        "inputs from chosen.messages, and name the prompts in the order of the rows."
    )


def _check_grid(entered: Entered, item: Any) -> None:
    """Refuse a picture that the processor has scaled once more, or that is another one."""
    if entered.grid is None:
        return
    rows, columns = (int(item.layout.place[:, axis].max()) + 1 for axis in (2, 3))
    if (rows, columns) != entered.grid:
        wide, high = entered.scaled[1], entered.scaled[0]
        raise WinnowError(
            f"the model was given {rows} × {columns} tokens of a picture that entered with {wide} × {high} pixels, "
            f"which are {entered.grid[0]} × {entered.grid[1]}; make the inputs from chosen.messages, by the processor "
            "that winnow.compress was given, and set no other sizes."
        )
