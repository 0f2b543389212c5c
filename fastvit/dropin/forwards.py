"""Which forward passes are known: a module may only be stood in for where its class's `forward` is one of these, to the
letter, whatever the class is called and wherever it is defined.

A forward pass is known by a digest of its syntax tree, without comments, docstrings and annotations. What it calls by
name has to be torch's, its own library's, or known as well.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import sys
import textwrap
import types

import torch
import torch.nn.functional as F
from torch import nn

_AS_ITS_BASE = "what its base class's does"
# What a function does, by the first 16 digits of its digest; the names are what layouts.py goes by. Comments say which
# versions of a library a text is of, where others have another: of timm from 0.9 on, of transformers from 4.57 on.
KNOWN = {
    "336932f7ba6725f6": "timm block",
    "f696452cf2da1413": "timm block",  # up to 1.0.25, without is_causal
    "2511bd2db37a3c71": "timm block",  # up to 1.0.15, without masks
    "a7ba3574a4d7f15f": "timm attention",
    "e1a62dc598780871": "timm attention",  # up to 1.0.27, without a gate
    "f3ffd8d27128f75b": "timm attention",  # up to 1.0.25, without is_causal
    "7b64c28034f8a425": "timm attention",  # up to 1.0.22
    "a81666dd2687caf5": "timm attention",  # up to 1.0.15, without masks
    "04f65198a5a633e7": "timm mlp",
    "533c2fb3f3fa9201": "timm packed glu",
    "5d7203a790a9a1fb": "timm swiglu",
    "15e724f5200478db": "layer scale by gamma",
    "bafe392ead95312d": "drop path",  # calls the next
    "d0b421ec780289ba": "drop path, as a function",
    "225654455a32964d": "timm layer norm",
    "0e7305bcec8f4898": "timm eva block",
    "1f01403c66c5b192": "timm eva block",  # up to 1.0.29
    "e22e547b8a217c49": "timm eva block",  # up to 1.0.25, without is_causal
    "43750b6153fe3938": "timm eva attention",
    "dd71b13a30b0a6fd": "timm eva attention",  # up to 1.0.27, without a gate
    "ab32d53ef47b1e39": "timm eva attention",  # up to 1.0.25, without is_causal
    "0f52a81eb6b818f7": "timm eva attention",  # up to 1.0.19, pairs are neighbours
    "70457dac5375d4a8": "timm eva attention",  # up to 1.0.15, q and k are not normalised
    "c0a23f7425bd9bb2": "timm eva attention",  # 1.0.3 to 1.0.7
    "801fdeea18acd5b5": "timm rope attention",
    "b57677531ec982e1": "timm rope attention",  # up to 1.0.29, no heads in groups
    "dc6eece56567d55f": "timm rope attention",  # up to 1.0.27, without a gate
    "7584afbdefcd63d9": "timm rope attention",  # up to 1.0.25, without is_causal
    "2b6f1b3998b2bcc9": "timm rope attention",  # up to 1.0.22
    "bc93e2da04f7189c": "timm rope attention",  # up to 1.0.19, pairs are neighbours
    "d38cfa9d692acfd5": "gelu",
    "20b39c0e43529b23": "gelu_tanh",
    "3cc7af57b55ea063": "quick_gelu",  # calls the next
    "f6192b3609a0b3cb": "quick_gelu, as a function",
    "755052d218f929e5": "torchvision block",
    "f84ed9e2ab70aaa8": "transformers block",
    "108cb2c206d9d451": "transformers block in parts",  # up to 5.8
    "e394a45da0d65046": "transformers block in parts",  # up to 5.3
    "1fbef59be3ee3a82": "transformers block in parts",  # 4.57
    "6fb145772b77a124": "transformers attention in parts",  # up to 5.8
    "612c7ef634b041ff": "transformers attention in parts",  # up to 5.3
    "a12fcf59aa7dd2e0": "transformers attention in parts",  # 4.57
    "52462a4467a6650e": "transformers inner attention",  # up to 5.8
    "f8757374d3854a8e": "transformers inner attention",  # up to 5.3
    "3e3d0ba99b53efc2": "transformers inner attention",  # 5.0
    "9b8cb9733d0baae9": "transformers inner attention",  # 4.57
    "32407ffee9d5412d": "dense and dropout",
    "85c2030d6a81c599": "dense and activation",
    "05874578678e67c4": "dense, dropout and residual",
    "9e5cff99f0757b1b": "transformers scaled block",  # Dinov2's
    "77828acf11747177": "transformers scaled block in parts",  # up to 5.17
    "10bf9ccd9c0729e0": "transformers scaled block in parts",  # 4.57
    "77ef972e919e460a": "transformers tower block",  # CLIP's and SigLIP's
    "78863341f451b7ea": "transformers tower block in a tuple",  # CLIP's of 4.57
    "d2858c8c58a357c8": "transformers attention",
    "763ef8b311c01113": "transformers tower attention",  # CLIP's
    "31193b2bac18ca17": "transformers tower attention",  # up to 5.4
    "7d67095b04ad4929": "transformers tower attention",  # 5.0
    "f41010a9c726e2c6": "transformers tower attention, two masks",  # 4.57
    "b42db7c923dfc367": "transformers tower attention",  # SigLIP's
    "3ffffa4b2b3f134c": "transformers tower attention",  # up to 5.4
    "c164ac321b2e4730": "transformers tower attention",  # up to 5.0
    "65e86ebc299abbe8": "softmax attention, as a function",  # ViT's
    "f229b0b921e52b5e": "softmax attention, as a function",  # Dinov2's
    "31b5f66fbf2916c9": "softmax attention, as a function",  # CLIP's and SigLIP's
    "7ce9b8e29d9d8372": "softmax attention, as a function",  # up to 5.1
    "e3f007ed77a65c3b": "softmax attention, as a function",  # CLIP's of 4.57
    "068ce75bb6c567e3": "softmax attention, as a function",  # 4.57, where a mask is a factor, of whole heads
    "f697bab5c14ac5fe": "softmax attention, as a function",  # AltCLIP's
    "7e157d7c92171ef6": "transformers mlp",
    "d5c645e893dbfea3": "transformers mlp by activation",  # Dinov2's, up to 5.17
    "fb7ef47a30942624": "transformers packed glu",
    "92ca2ab7c6137d24": "transformers rotary block",  # DINOv3's
    "9baa9f6c3bc58f17": "transformers rotary block",  # up to 5.3
    "e978a02421adbc0f": "transformers rotary attention",
    "c8a9d6aba89c09b8": "transformers rotary attention",  # up to 5.0
    "e5d6cc96bfe13007": "transformers mlp, up and down",
    "c0ca1abe0922ae1a": "transformers swiglu",
    "527930fdc52c5fec": "layer scale by lambda1",
    "518eed25f0ba5a57": "drop path by rounding",
    "2ecf44452f92eae4": "drop path by rounding",  # by a function, up to 5.8
    "2354a1f2c726f8bb": "function in act",
    "ea8ee0549d0042b7": "quick_gelu",
    "c98cced60da98b72": "silu",
    # github.com/facebookresearch/dinov2, dinov2/layers, at 05c66df0cf
    "51828c1e356e5c4d": "dinov2 block",  # calls the next
    "2da82a2bcb54455f": "stochastic depth, as a function",
    "4c712eeef45f5abc": _AS_ITS_BASE,  # NestedTensorBlock, for a tensor
    "742df1441a0ba0fd": "attention without masks",
    "b1e4e950655dbd98": _AS_ITS_BASE,  # MemEffAttention
    "1503988054e02684": "mlp with one dropout",
    "629bf9b2febfa720": "silu glu",
    "aea624f99c7fae9e": "drop path",  # calls the next
    "b81147193381da11": "drop path, as a function",
    # github.com/facebookresearch/deit, models_v2.py, at 279faa0607
    "c8cfc29ccbe6e679": "attention without masks",
    "24f3357fa3606bff": "deit block",
    "397060f6c78bb4dd": "deit scaled block",
}

_LIBRARIES = frozenset(("torch", "timm", "torchvision", "transformers", "xformers"))
_WORDS = {"torch": torch, "nn": nn, "F": F}
_LEFT_OUT = frozenset(("annotation", "returns", "decorator_list", "type_comment", "type_params", "ctx", "kind", "name"))


def known_forward(cls: type) -> str | None:
    """The name in KNOWN of a module class's forward pass, or "sequence"; None where it is not known, or calls what is
    not."""
    if cls.__call__ is not nn.Module.__call__ and not _of_transformers_layers(cls.__call__):
        return None
    if cls.forward is nn.Sequential.forward:  # torchvision's MLP is one
        return "sequence"
    name = known(cls.forward)
    if name == _AS_ITS_BASE:
        return known_forward([base for base in cls.__mro__ if "forward" in base.__dict__][1])
    return name


def known(function) -> str | None:
    """The name in KNOWN of a function; None as `known_forward` has it."""
    function = _inner(function)
    if not isinstance(function, types.FunctionType) or hasattr(function, "__wrapped__"):
        return None
    if function.__code__.co_freevars not in ((), ("__class__",)):  # the latter of super()
        return None
    name, words = _read(function)
    return name if name is not None and all(_trusted(function, word) for word in words) else None


@functools.cache
def _read(function) -> tuple[str | None, frozenset[str]]:
    """The name in KNOWN for a function's text, and the global names that the text reads."""
    try:
        tree = tree_of(function)
    except (OSError, TypeError, SyntaxError):
        return None, frozenset()
    return KNOWN.get(digest(tree)), frozenset(_words(tree))


def tree_of(function) -> ast.AST:
    """A function's syntax tree."""
    return ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]


def digest(tree: ast.AST) -> str:
    """16 digits for a function's syntax tree, the same under every version of Python: a key of KNOWN."""
    return hashlib.sha256(repr(_plain(tree)).encode()).hexdigest()[:16]


def _of_transformers_layers(function) -> bool:
    """Whether it is what checkpoints gradients around the forward pass of transformers' layers."""
    return getattr(function, "__globals__", {}).get("__name__") == "transformers.modeling_layers"


def _inner(function):
    """The function that transformers' layers wrap for gradient checkpointing; up to 5.22 they wrap the call."""
    while _of_transformers_layers(function):
        function = function.__wrapped__
    return function


def _plain(node):
    if isinstance(node, list):
        return [_plain(child) for child in node]
    if isinstance(node, ast.AnnAssign) and node.value is not None:
        node = ast.Assign(targets=[node.target], value=node.value)
    if not isinstance(node, ast.AST):
        return node
    fields = [(name, value) for name, value in ast.iter_fields(node) if name not in _LEFT_OUT]
    fields = [(name, value) for name, value in fields if value is not None and value != []]
    if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
        fields = [(name, value[1:] if name == "body" else value) for name, value in fields]
    return (type(node).__name__, *((name, _plain(value)) for name, value in fields))


def _words(tree: ast.AST) -> set[str]:
    """The global names that a function reads, but for annotations."""
    names: set[str] = set()
    nodes = [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            names.add(node.id)
        for field, value in ast.iter_fields(node):
            if field not in _LEFT_OUT:
                children = value if isinstance(value, list) else [value]
                nodes += [child for child in children if isinstance(child, ast.AST)]
    local = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    local |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    local |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return names - local


def _trusted(function, word: str) -> bool:
    """Whether a global name of a function means what it meant in the function that is known."""
    if word not in function.__globals__:
        return True  # a builtin, or what raises a NameError
    value = function.__globals__[word]
    if word == "eager_attention_forward":  # of which each of transformers' models has its own
        return known(value) == "softmax attention, as a function"
    if word == "ALL_ATTENTION_FUNCTIONS":
        return value is sys.modules["transformers.modeling_utils"].ALL_ATTENTION_FUNCTIONS
    if isinstance(value, bool):  # whether xformers is there
        return True
    if word in _WORDS:
        return value is _WORDS[word]
    home = value.__module__ if isinstance(value, (type, types.FunctionType)) else type(value).__module__
    return str(home).partition(".")[0] in _LIBRARIES or (
        isinstance(value, types.FunctionType) and known(value) is not None
    )
