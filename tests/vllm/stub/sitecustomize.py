"""For tests on machines without CUDA libraries, where torchvision's compiled operators do not load.

vLLM's processors import torchvision, which describes two of these operators when it is imported. Their schemas are
enough for that; nothing here calls them. Python runs this file at the start of every process that has the folder in
PYTHONPATH; it does nothing until somebody imports torchvision.
"""

import importlib.abc
import sys


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    library = None

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and self.library is None:
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            self.library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            self.library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, _BeforeTorchvision())
