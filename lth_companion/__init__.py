"""Lottery tickets, reproduced. The names below are those that others may rely on; each loads its module when it is
first used.
"""

from importlib import import_module as _import_module

__version__ = "0.1.0"

_FACE = {
    "tickets": ("Ticket", "prunable"),
    "selection": ("keep_top", "erk", "uniform"),
    "methods.scorers": ("random", "magnitude", "snip", "grasp", "synflow", "SCORERS", "register"),
    "methods.stacking": ("scorer", "stack", "once"),
    "methods.saw": ("saw",),
    "methods.pruning": ("prune",),
    "training.recipe": ("Recipe",),
    "training.loop": ("train", "evaluate"),
    "methods.imp": ("imp",),
    "methods.dynamic": ("sparse_train", "settings"),
    "methods.supermasks": ("Supermask", "search"),
    "measures.correlation": ("overlap", "jaccard"),
}
_WHERE = {name: module for module, names in _FACE.items() for name in names}
__all__ = list(_WHERE)


def __getattr__(name):
    if name not in _WHERE:
        raise AttributeError(
            f"lth_companion has no {name!r}; its names are {', '.join(__all__)}, and the rest is in its modules"
        )
    globals()[name] = found = getattr(_import_module(f"{__name__}.{_WHERE[name]}"), name)
    return found


def __dir__():
    return [*globals(), *(n for n in __all__ if n not in globals())]
