"""Page retrieval (arXiv 2411.04952): of many pictures, those that are nearest to the question enter the prompt.

Looks at: features of pictures and of the question, which the caller hands over. Cost: O(K · D).

A document of many pages is asked about by the pages that matter, ranked by a model made for it (M3DocRAG takes ColPali)
and shown in their own order. The features are one row for each picture and one for the question, in one space: those of
CLIP, of SigLIP, or of a retriever. Pictures are ranked by their cosine with the question; of equal ones the earlier are
kept.
Departs from the paper: it compares every word of a question with every patch of a page and adds up the best (late
interaction), where this takes one row of each; hand over the means, or rank by yourself. It searches an index of many
documents; this chooses among the pictures of one request.
Departs from the released code: its retriever is a program of its own beside the model, so there are no released
settings.
"""

import torch
from torch.nn.functional import normalize

import winnow.contract as wn


@wn.register("retrieve")
class Retrieve(wn.Method):
    """Keep the pictures of a prompt whose features are nearest to the question's.

    Args:
        keep: pictures that enter, or their share.
    """

    keep: wn.Budget = wn.Budget(4)

    at = "prompt"
    modalities = ("image",)

    def score(self, view: wn.PromptView):
        if view.features is None or view.question_features is None:
            raise wn.WinnowError(
                "retrieve ranks pictures by features that are handed over: "
                "handle.prompt(messages, features=…, question_features=…)."
            )
        pictures, question = (normalize(x.double(), dim=-1) for x in (view.features, view.question_features))
        return torch.einsum("bkd,bd->bk", pictures, question)
