"""Checks that every method must pass: for the methods of this package and for plug-ins.

    from winnow.testing import check_method, check_on_models, run_step
    check_method(MyMethod)                      # raises AssertionError with what was expected and what came
    run_step(MyMethod(keep=8), tokens=x, signals=attention).kept      # one step on plain arrays
    check_on_models(MyMethod, by_hand, settings={"keep": 8}, builds={"llava": build})

`check_method` and `run_step` need no model: views with random signals are made from what the method's steps ask for,
and a signal of your own says with `sample` what its values look like. `check_on_models` runs a method on builds of real
model classes and compares it with what you worked out by hand.
"""

from winnow.testing.cache_checks import CACHE_CHECKS
from winnow.testing.checks import CHECKS, check_form, check_method, checks_of
from winnow.testing.input_checks import INPUT_CHECKS
from winnow.testing.models import Build, Worked, check_on_models
from winnow.testing.pictures import PICTURES, WITH_CLS, WITHOUT_CLS, Picture
from winnow.testing.plain import StepResult, run_step
from winnow.testing.subject import Act, Subject, run

__all__ = [
    "CACHE_CHECKS",
    "CHECKS",
    "INPUT_CHECKS",
    "PICTURES",
    "WITHOUT_CLS",
    "WITH_CLS",
    "Act",
    "Build",
    "Picture",
    "StepResult",
    "Subject",
    "Worked",
    "check_form",
    "check_method",
    "check_on_models",
    "checks_of",
    "run",
    "run_step",
]
