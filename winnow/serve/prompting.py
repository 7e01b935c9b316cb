"""A conversation as a model takes it: the chat template's text, and what the processor makes of it."""

from __future__ import annotations

from collections import Counter
from typing import Any

from PIL import Image

from winnow.core.errors import WinnowError
from winnow.models.inputs import check_text, placeholder, processed, without_start
from winnow.serve.errors import ApiError, invalid, told
from winnow.serve.messages import Turn
from winnow.video import Video

PLAIN = {"user": "USER: ", "assistant": "ASSISTANT: "}  # LLaVA's prompt, for checkpoints without a template


class Prompter:
    """Prompts for one processor. What its chat template can say is found out once.

    Attributes:
        marks: what stands for a picture and for a video in a prompt.
        says_system: whether messages of the system have a form of their own.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.marks = {modality: placeholder(processor, modality) for modality in ("image", "video")}
        self.says_system = self._says_system()

    def inputs(self, turns: list[Turn], shown: list[Image.Image] | list[Video]) -> dict[str, Any]:
        """The inputs of the model, on the CPU.

        Raises:
            ApiError: a text holds control tokens, or the template or the processor does not take the conversation.
        """
        for i, turn in enumerate(turns):
            for text in turn.texts:
                try:
                    check_text(self.processor, text, f"messages[{i}]")
                except WinnowError as error:
                    problem = told(error)
                else:
                    continue
                raise invalid(problem, f"messages[{i}].content", "control_token")
            if turn.role in ("system", "developer") and not self.says_system:
                text = f"messages[{i}].role: the chat template of this model has no messages of the system."
                raise invalid(text, f"messages[{i}].role", "unsupported_value")
        text = self.text(turns)
        try:
            return processed(self.processor, text, shown)
        except WinnowError as error:
            problem = told(error)
        raise invalid(problem, "messages", "invalid_image" if shown else "invalid_value")

    def text(self, turns: list[Turn]) -> str:
        """The prompt, with one placeholder for each picture, or for the video."""
        if getattr(self.processor, "chat_template", None):
            whole = self._rendered(turns, in_parts=True) or self._rendered(turns, in_parts=False)
        else:
            whole = self._plain(turns)
        if whole is None:
            raise _refused()
        return without_start(self.processor.tokenizer, whole)

    def _rendered(self, turns: list[Turn], in_parts: bool) -> str | None:
        """What the template makes of a conversation; None if it fails, or if not all of it comes out.

        Args:
            in_parts: contents are lists of parts; some templates take texts with placeholders in them instead.
        """
        messages = [
            {"role": _role(turn.role), "content": _parts(turn) if in_parts else self._flat(turn)} for turn in turns
        ]
        try:
            text = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except MemoryError:
            raise
        except Exception:  # a template is a program that comes with the checkpoint: it can fail in any way
            return None
        wanted = Counter(own.modality for turn in turns for own in turn.shown)
        whole = isinstance(text, str) and all(text.count(self.marks[own]) == wanted[own] for own in {"image", *wanted})
        return text if whole and _in_order(text, [part.strip() for turn in turns for part in turn.texts]) else None

    def _plain(self, turns: list[Turn]) -> str | None:
        if not all(turn.role in PLAIN for turn in turns):
            return None
        end = self.processor.tokenizer.eos_token or ""
        said = [PLAIN[t.role] + self._flat(t) + (end if t.role == "assistant" else " ") for t in turns]
        return "".join(said) + PLAIN["assistant"].strip()

    def _flat(self, turn: Turn) -> str:
        return "".join(part if isinstance(part, str) else f"{self.marks[part.modality]}\n" for part in turn.parts)

    def _says_system(self) -> bool:
        """A template can drop messages of the system, or pass them off as somebody else's."""
        if not getattr(self.processor, "chat_template", None):
            return False
        asked = Turn("user", ("winnowquestion",))
        for in_parts in (True, False):
            own, other = (
                self._rendered([Turn(role, ("winnowsystem",)), asked], in_parts) for role in ("system", "assistant")
            )
            if own is not None:
                return own != other
        return False


def _role(role: str) -> str:
    return "system" if role == "developer" else role


def _parts(turn: Turn) -> list[dict[str, str]]:
    return [{"type": "text", "text": part} if isinstance(part, str) else {"type": part.modality} for part in turn.parts]


def _in_order(whole: str, texts: list[str]) -> bool:
    """Whether all texts stand in a prompt, in order, each behind the one before."""
    at = 0
    for text in texts:
        at = whole.find(text, at)
        if at < 0:
            return False
        at += len(text)
    return True


def _refused() -> ApiError:
    text = (
        "The chat template of this model does not take this conversation: begin with the user's message, and let user "
        "and assistant take turns."
    )
    return invalid(text, "messages", "invalid_conversation")
