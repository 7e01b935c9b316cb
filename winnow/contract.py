"""All names that the author of a method or of a signal needs, from one import.

from winnow.contract import Budget, Method, View, VisionAttention, register
"""

from winnow.core.budget import Budget, split_evenly
from winnow.core.cross_read import CrossRead, Rows
from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.frames_view import FramesView
from winnow.core.info import ModelInfo
from winnow.core.kv import Codec, KVStep, KVView
from winnow.core.kv_budget import KVBudget
from winnow.core.kv_method import CacheMethod
from winnow.core.kv_select import best_slots, keep_slots
from winnow.core.layout import CLS, CONTENT, PAD, REGISTER, SEPARATOR, Layout
from winnow.core.method import Method
from winnow.core.picture_view import PictureView
from winnow.core.plan import method_of
from winnow.core.point import Point
from winnow.core.prompt_view import PromptView
from winnow.core.reduction import Reduction
from winnow.core.registry import register
from winnow.core.select import comparable, count_broken, rank_of, ranked, top_k
from winnow.core.settings import Between, Block, Count, Layer, Share
from winnow.core.signal import Signal, Site, block_index
from winnow.core.step import (
    Action,
    Attend,
    Emit,
    Follow,
    KVReduce,
    Observe,
    Parted,
    Recut,
    Reduce,
    Repose,
    Route,
    State,
    Step,
)
from winnow.core.stretch import Stretch
from winnow.core.tiles import in_thumbnail, n_tiles, quotas, rank_in_tile, tile_of, top_k_per_tile
from winnow.core.view import View
from winnow.signals.clip import ClipPatches, ClipText
from winnow.signals.entering import QuestionRows, TextSummary
from winnow.signals.features import ClsLogits, OneHeadAttention, VisionFeatures, WideKeys
from winnow.signals.language import (
    LayerModules,
    LMAttention,
    LMAttentionInputs,
    LMAttentionMass,
    LMEntry,
    LMKeys,
    LMSignal,
)
from winnow.signals.layers import KeyNorm, LayerChange, LayerStates, PageRank, RowStates, TokenTransition
from winnow.signals.peaks import TextPeak
from winnow.signals.question import Question, QuestionCosine, QuestionSignal, QuestionTokens
from winnow.signals.sound import SoundAttention
from winnow.signals.vision import HiddenStates, Pixels, TowerAttention, VisionAttention, VisionKeys, VisionSignal
from winnow.signals.words import TextAttention, TextKeyNorm, TextRaters, WordAttention

__all__ = [
    "CLS",
    "CONTENT",
    "PAD",
    "REGISTER",
    "SEPARATOR",
    "Action",
    "Attend",
    "Between",
    "Block",
    "Budget",
    "CacheMethod",
    "ClipPatches",
    "ClipText",
    "ClsLogits",
    "Codec",
    "Count",
    "CrossRead",
    "Emit",
    "Follow",
    "FramesView",
    "HiddenStates",
    "KVBudget",
    "KVReduce",
    "KVStep",
    "KVView",
    "KeyNorm",
    "LMAttention",
    "LMAttentionInputs",
    "LMAttentionMass",
    "LMEntry",
    "LMKeys",
    "LMSignal",
    "Layer",
    "LayerChange",
    "LayerModules",
    "LayerStates",
    "Layout",
    "Method",
    "ModelInfo",
    "Observe",
    "OneHeadAttention",
    "PageRank",
    "Parted",
    "PictureView",
    "Pixels",
    "Point",
    "PromptView",
    "Question",
    "QuestionCosine",
    "QuestionRows",
    "QuestionSignal",
    "QuestionTokens",
    "Recut",
    "Reduce",
    "Reduction",
    "Repose",
    "Route",
    "RowStates",
    "Rows",
    "Share",
    "Signal",
    "Site",
    "SoundAttention",
    "State",
    "Step",
    "Stretch",
    "TextAttention",
    "TextKeyNorm",
    "TextPeak",
    "TextRaters",
    "TextSummary",
    "TokenTransition",
    "TowerAttention",
    "UnsupportedError",
    "View",
    "VisionAttention",
    "VisionFeatures",
    "VisionKeys",
    "VisionSignal",
    "WideKeys",
    "WinnowError",
    "WordAttention",
    "best_slots",
    "block_index",
    "comparable",
    "count_broken",
    "in_thumbnail",
    "keep_slots",
    "method_of",
    "n_tiles",
    "quotas",
    "rank_in_tile",
    "rank_of",
    "ranked",
    "register",
    "split_evenly",
    "tile_of",
    "top_k",
    "top_k_per_tile",
]
