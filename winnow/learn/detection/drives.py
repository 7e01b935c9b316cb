"""Drives as tensors: what the cameras saw, what each token is to say, and how good what was found is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, smooth_l1_loss

from winnow.learn.detection.blocks import PATCH, SIDE, TOKENS
from winnow.learn.detection.detector import Found, centers
from winnow.world.streets import CAMERAS, KINDS, PIXELS, Frame, project

CLOSE = 2.0  # metres between centres at which an object counts as found
MOST = 8  # objects of a drive

Record = dict[str, Tensor]


def as_record(frames: Sequence[Frame]) -> Record:
    """What is kept of a drive, frame by frame, and the pose between neighbours."""
    told = [_targets(frame) for frame in frames]
    record = {name: torch.stack([own[name] for own in told]) for name in told[0]}
    record["images"] = torch.from_numpy(np.stack([frame.images for frame in frames]))
    record["pose"] = torch.stack([_pose(a, b) for a, b in itertools.pairwise(frames)])
    record["elapsed"] = torch.tensor([b.time - a.time for a, b in itertools.pairwise(frames)])
    return record


def _pose(then: Frame, now: Frame) -> Tensor:
    """`[3, 4]` from the frame of the vehicle at one moment to that at another."""
    turn, c, s = then.yaw - now.yaw, math.cos(now.yaw), math.sin(now.yaw)
    dx, dy = then.position[0] - now.position[0], then.position[1] - now.position[1]
    shift = c * dx + s * dy, c * dy - s * dx
    rows = [[math.cos(turn), -math.sin(turn), 0, shift[0]], [math.sin(turn), math.cos(turn), 0, shift[1]], [0, 0, 1, 0]]
    return torch.tensor(rows)


def _targets(frame: Frame) -> Record:
    kind = torch.full((TOKENS,), -1)
    values, inside = torch.zeros(TOKENS, 4), torch.zeros(CAMERAS, SIDE, SIDE, dtype=torch.bool)
    things = torch.full((MOST, 4), torch.nan)
    for number, thing in enumerate(sorted(frame.things, key=lambda thing: -math.hypot(*thing.center[:2]))):
        things[number] = torch.tensor([*thing.center, thing.kind])
        for camera, box in thing.boxes.items():
            inside[camera, box.y0 // PATCH : -(-box.y1 // PATCH), box.x0 // PATCH : -(-box.x1 // PATCH)] = True
            column, row, depth = project(thing.center, camera)
            if not (0 <= column < PIXELS and 0 <= row < PIXELS):
                continue
            at = int(row // PATCH), int(column // PATCH)
            token = (camera * SIDE + at[0]) * SIDE + at[1]
            kind[token] = thing.kind
            place = column / PATCH - at[1], row / PATCH - at[0]
            values[token] = torch.tensor([*place, math.log(depth), math.log(thing.size)])
    return {"kind": kind, "values": values, "inside": inside.flatten(), "things": things}


def loss_of(found: Found, told: Record) -> Tensor:
    """Focal loss of kinds; distances of what the tokens with an object say of it; and focal losses of all scores."""
    mine = told["kind"] >= 0
    count = mine.sum().clamp_min(1)
    wanted = torch.zeros_like(found.kinds)
    wanted[mine] = torch.nn.functional.one_hot(told["kind"][mine], len(KINDS)).to(wanted)
    plain = binary_cross_entropy_with_logits(found.kinds, wanted, reduction="none")
    wrong = (wanted - found.kinds.sigmoid()).abs()
    loss = 2 * (wrong**2 * plain).sum() / count
    loss = loss + smooth_l1_loss(found.values[mine], told["values"][mine], beta=0.1, reduction="sum") / count
    for score in found.scores:
        chance = score[..., 0].exp()
        focal = torch.where(told["inside"], (1 - chance) ** 2 * -score[..., 0], chance**2 * -score[..., 1])
        loss = loss + 5 * focal.sum() / told["inside"].sum().clamp_min(1)
    return loss


@torch.no_grad()
def precision(found: Found, things: Tensor) -> np.ndarray:
    """The average precision in each frame: finds by falling sureness, each object found once, within `CLOSE`."""
    sure, kind = found.kinds.sigmoid().max(-1)
    where = centers(found.values)
    result = []
    for b in range(len(things)):
        own = things[b][things[b][:, 0].isfinite()]
        left, right, area = list(range(len(own))), 0, 0.0
        for rank, token in enumerate(sure[b].topk(32).indices.tolist(), 1):
            near = [(float((own[i, :2] - where[b, token, :2]).norm()), i) for i in left if own[i, 3] == kind[b, token]]
            if near and min(near)[0] < CLOSE:
                left.remove(min(near)[1])
                right += 1
                area += right / rank
        result.append(area / max(1, len(own)))
    return np.array(result)


@torch.no_grad()
def recall(score: Tensor, inside: Tensor, share: float) -> np.ndarray:
    """The share of the tokens that show objects among the best of each frame."""
    best = score.topk(round(share * score.shape[1]), 1).indices
    kept = torch.zeros_like(inside).scatter_(1, best, True)
    return ((kept & inside).sum(1) / inside.sum(1).clamp_min(1)).double().numpy()
