"""The suites that this process has cut into tokens, kept while their base stays in memory."""

from collections import OrderedDict
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from trans_peft.data import read_examples
from trans_peft.domain.evaluation import Suite
from trans_peft.ports import Platform
from trans_peft.text.chat import template_of

if TYPE_CHECKING:
    from trans_peft.models import LoadedBase
    from trans_peft.validation.tokenized_suite import TokenizedSuite

    _OfBase = OrderedDict[tuple[Suite, str | None], TokenizedSuite]

__all__ = ["tokenized_suite_for"]

_MOST = 16
"""So many suites of one base are kept, those that were asked last: a fleet may have one for each
adapter, and memory is to stay flat over it."""

_kept: "WeakKeyDictionary[LoadedBase, _OfBase]" = WeakKeyDictionary()


def tokenized_suite_for(
    suite: Suite, base: "LoadedBase", platform: Platform, template: str | None = None
) -> "TokenizedSuite":
    """Return a pinned suite as the base's tokenizer cuts it: read, checked and cut once.

    `template` is the chat template of the adapter that is asked; None: the base's.
    Errors as `trans_peft.data.read_examples` and `trans_peft.validation.tokenized_suite.prepare`.
    """
    from trans_peft.validation.evaluate import context_of
    from trans_peft.validation.tokenized_suite import prepare

    kept = _kept.setdefault(base, OrderedDict())
    template = template_of(base.tokenizer) if template is None else template
    key = (suite, template)
    if key not in kept:
        examples = read_examples(suite.data, platform.store, limit=suite.limit)
        kept[key] = prepare(
            base.tokenizer,
            suite,
            examples,
            context=context_of(base.model),
            template=template,
            may_lack=platform.may_lack,
        )
        while len(kept) > _MOST:
            kept.popitem(last=False)
    kept.move_to_end(key)
    return kept[key]
