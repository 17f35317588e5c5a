"""``patch(model)`` swaps the layers of an existing model for fastattn's, in place; ``unpatch``
swaps them back.

A swap changes the class of a module object and nothing else. Parameters, buffers, hooks, device,
dtype, mode and state_dict keys are the same objects as before, so that optimizers already built
keep working. A swapped module means what it meant before, to every caller: what is fused is decided
at each call, and an unusual call runs torch's own code.
"""

from __future__ import annotations

from torch import nn

from fastattn import nn as fnn
from fastattn.integrations import blocks, pretrained
from fastattn.integrations.plan import ATTENTION, Plan, check, plan
from fastattn.integrations.report import Entry, PatchReport
from fastattn.integrations.sequential import FusedSequential
from fastattn.integrations.unpad import is_unpadded
from fastattn.nn._plain import FORMER_CLASS, to_torch

__all__ = ["Entry", "PatchReport", "Plan", "patch", "plan", "unpatch"]

_SWAPPED = (*ATTENTION.values(), FusedSequential, fnn.Linear, fnn.Dropout)


def patch(
    model: nn.Module, *, dry_run: bool = False, dropout: bool = True, unpad: bool = False
) -> PatchReport:
    """Swaps the layers that fastattn has a kernel for, in place.

    An exception leaves the model as it was.

    Swapped are:

    - ``nn.MultiheadAttention``, ``nn.TransformerEncoderLayer``, ``nn.TransformerEncoder``: exact
      types only.
    - Linear, ReLU inside an ``nn.Sequential``, which then fuses them as it runs.
    - ``nn.Linear``, exact type, whose product the kernels may win at some call, in its dtype or,
      for a float32 one, in a dtype of autocast that torch has no product in for this processor:
      ``fastattn.backends.explain("linear", input, weight)``. Notes of the report count the other
      Linears.
    - ``nn.Dropout``, exact type and not in place, unless ``dropout=False``.
    - Blocks known by the code of their forward (``fastattn.integrations.blocks``), which most
      encoders and decoders of Hugging Face have, and much other code: a Linear and its activation,
      with a second Linear and dropouts or not; a Linear, dropout and the norm of the sum with a
      residual; a gated MLP; GPT-2's Conv1D; RMSNorm as Llama, Gemma, T5 and OLMo write it.
    - The attention of Hugging Face models that is set to sdpa, see
      ``fastattn.integrations.pretrained``.

    The kernels' dropout drops other elements than torch's for the same state of torch's generator,
    by as good random numbers: the same state gives the same result at every call, under activation
    checkpoints too. With ``dropout=False`` every layer that is swapped drops the elements that
    torch's would: dropouts are torch's own then, and attention that drops weights runs torch's
    code. A layer that was built as fastattn's draws as it always does.

    A Linear and a ReLU that a forward of the model's own joins are left apart: only that code knows
    what else reads their results. Left alone is everything else, and a module whose device or dtype
    no kernel serves.

    Args:
        model: any module.
        dry_run: change nothing; the report says what would be swapped.
        dropout: let the kernels draw dropout's random numbers.
        unpad: skip the padding, in training and at inference: ``nn.TransformerEncoder``, and the
            encoders of BERT and its relatives in Hugging Face (``fastattn.integrations.unpad``),
            run on the tokens alone. Their outputs at padded places are then 0, where they are
            values without a meaning otherwise; losses that ignore padding, and outputs pooled over
            tokens, stay. Where an encoder cannot, at a call, the padded batch runs, and a
            FastAttnWarning says why. Under ``torch.compile`` the padded batch runs. Fewer elements
            draw fewer random numbers, so that ``dropout=False`` cannot be kept beside it.

    Returns:
        What was swapped, what was not, and why.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``, or ``dropout`` or ``unpad`` is no bool.
        ValueError: ``unpad`` beside ``dropout=False``.

    >>> import fastattn
    >>> from torch import nn
    >>> model = nn.TransformerEncoderLayer(64, 4, 128)
    >>> report = fastattn.patch(model)
    >>> type(model)
    <class 'fastattn.nn.transformer.TransformerEncoderLayer'>
    """
    made = plan(model, dropout=dropout, unpad=unpad)
    return made.report if dry_run else made.apply()


def unpatch(model: nn.Module) -> PatchReport:
    """Undoes ``patch``: every module gets its class back, a Hugging Face model its attention
    implementation.

    Args:
        model: a module that was patched, or not.

    Returns:
        What was restored.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.

    >>> import fastattn
    >>> from torch import nn
    >>> model = nn.TransformerEncoderLayer(64, 4, 128)
    >>> _ = fastattn.patch(model)
    >>> _ = fastattn.unpatch(model)
    >>> type(model)
    <class 'torch.nn.modules.transformer.TransformerEncoderLayer'>
    """
    check(model)
    report = PatchReport(nothing="nothing to undo: the model is not patched")
    for name, module in model.named_modules():
        attention = pretrained.undo(module)
        if attention is not None:
            report.add(name, *attention)
    for name, module in model.named_modules():
        if FORMER_CLASS not in vars(module):
            continue
        before = type(module)
        if before in _SWAPPED or blocks.is_block(before) or is_unpadded(before):
            report.add(name, before, to_torch(module), "restored")
        else:
            report.add(name, module, None, "its class was changed after patch; undo that first")
    return report
