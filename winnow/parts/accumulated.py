"""Attention that slots of the cache got from all queries so far, summed while tokens are decoded."""

from winnow.core.kv import KVView
from winnow.core.step import State


def observed(view: KVView, state: State) -> State:
    """The state with the attention of the newest tokens added.

    `summed["mass"]`, `[b, G, N, g]`, is what each slot got from each query head of its KV head; `token["rows"]`,
    `[b, G, N]`, how many queries have read it.
    """
    mass = view.mass(view.fresh).unflatten(1, (view.heads, view.group)).transpose(2, 3)
    rows = view.readers(view.fresh)[:, None].expand(*mass.shape[:3]).float()
    if "mass" in state.summed:
        mass, rows = mass + state.summed["mass"], rows + state.token["rows"]
    return State({**state.token, "rows": rows}, state.item, state.request, {**state.summed, "mass": mass})
