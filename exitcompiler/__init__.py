"""exitcompiler: a compiler for pretrained networks that adds early exits which really skip the work.

Names are loaded when first used, so that ``exitcompiler.load`` never imports torch.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exitcompiler.budgets.checking import check as check
    from exitcompiler.cascades import cascade as cascade
    from exitcompiler.compiler import compile as compile
    from exitcompiler.errors import ArtifactError as ArtifactError
    from exitcompiler.errors import BackendUnavailableError as BackendUnavailableError
    from exitcompiler.errors import BudgetError as BudgetError
    from exitcompiler.errors import CalibrationError as CalibrationError
    from exitcompiler.errors import DeviceError as DeviceError
    from exitcompiler.errors import ExitCompilerError as ExitCompilerError
    from exitcompiler.errors import InputError as InputError
    from exitcompiler.errors import LoweringError as LoweringError
    from exitcompiler.errors import MeasurementError as MeasurementError
    from exitcompiler.errors import PassError as PassError
    from exitcompiler.errors import TrainingError as TrainingError
    from exitcompiler.errors import UnsupportedModelError as UnsupportedModelError
    from exitcompiler.errors import VerifyError as VerifyError
    from exitcompiler.finetuning.options import FineTune as FineTune
    from exitcompiler.runtime.compiled import CompiledModel as CompiledModel
    from exitcompiler.runtime.loading import load as load
    from exitcompiler.splitting import split as split

__version__ = "0.1.0"

_HOME = {
    "cascade": "exitcompiler.cascades",
    "check": "exitcompiler.budgets.checking",
    "compile": "exitcompiler.compiler",
    "load": "exitcompiler.runtime.loading",
    "split": "exitcompiler.splitting",
    "CompiledModel": "exitcompiler.runtime.compiled",
    "FineTune": "exitcompiler.finetuning.options",
    **dict.fromkeys(
        (
            "ArtifactError",
            "BackendUnavailableError",
            "BudgetError",
            "CalibrationError",
            "DeviceError",
            "ExitCompilerError",
            "InputError",
            "LoweringError",
            "MeasurementError",
            "PassError",
            "TrainingError",
            "UnsupportedModelError",
            "VerifyError",
        ),
        "exitcompiler.errors",
    ),
}

__all__ = ["__version__", *sorted(_HOME)]

# In a checkout, `passes/` and `runtime/` stand beside this folder; whoever runs python there imports
# this folder itself and not the installed package, and has to find them all the same.
_here = Path(__file__).resolve().parent
if not (_here / "passes").is_dir():
    __path__.append(str(_here.parent))


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
