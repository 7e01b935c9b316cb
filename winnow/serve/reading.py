"""From the bytes of a request to a job: everything that is done before the model, in a thread of its own."""

from __future__ import annotations

from typing import Any

import torch

from winnow.serve.body import parse_json
from winnow.serve.errors import ApiError, invalid
from winnow.serve.job import Job
from winnow.serve.messages import open_shown, read_turns
from winnow.serve.plans import check_budgets, requested_plan
from winnow.serve.prompting import Prompter
from winnow.serve.schema import ChatRequest, chat_request, room
from winnow.serve.settings import Settings


class Reader:
    """Reads requests for one model.

    Args:
        tokens: the ids of placeholders of pictures and videos.
        videos: whether the model takes them.
    """

    def __init__(self, settings: Settings, prompter: Prompter, tokens: frozenset[int], videos: bool = False) -> None:
        self.settings, self.prompter, self.videos = settings, prompter, videos
        self.tokens = torch.tensor(sorted(tokens))

    def read(self, body: bytearray, tell: Any, number: str) -> tuple[ChatRequest, Job]:
        """The request, and the job that answers it.

        Raises:
            ApiError: it is not one that this server answers.
        """
        settings = self.settings
        request = chat_request(parse_json(body, settings.values), settings)
        plan = None if request.plan is None else requested_plan(request.plan, settings)
        turns = read_turns(request.messages, settings)
        request.messages.clear()  # what is in base64 lives on in the turns alone
        if not self.videos and any(own.modality == "video" for turn in turns for own in turn.shown):
            raise invalid("The model of this server takes no videos.", "messages", "unsupported_value")
        shown = open_shown(turns, settings)
        inputs = self.prompter.inputs(turns, shown)
        sizes = self._sizes(inputs["input_ids"], len(shown))
        if plan is not None:
            check_budgets(plan, sizes, settings)
        length = room(request, inputs["input_ids"].shape[1], settings.context)
        return request, Job(inputs, sizes, plan, request.within(length), tell, number)

    def _sizes(self, ids: torch.Tensor, pictures: int) -> tuple[int, ...]:
        """Placeholders of each picture, or of the video; where a processor writes marks between, an equal share."""
        held = torch.isin(ids[0], self.tokens)
        if not pictures:
            if bool(held.any()):
                raise _odd(0)
            return ()
        starts = held & ~torch.cat([held.new_zeros(1), held[:-1]])
        runs = starts.cumsum(0)[held].bincount()[1:].tolist()
        total = int(held.sum())
        if total == 0:
            raise _odd(pictures)
        return tuple(runs) if len(runs) == pictures else (-(-total // pictures),) * pictures


def _odd(pictures: int) -> ApiError:
    text = f"The prompt of this model has no placeholders that fit the {pictures} pictures that were sent."
    return invalid(text, "messages", "invalid_image")
