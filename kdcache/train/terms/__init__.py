"""Terms of a loss: one file per term; `base.py` says what a term is, `engine.py` adds them up."""

from kdcache.train.terms.base import HeadKind as HeadKind
from kdcache.train.terms.base import Needs as Needs
from kdcache.train.terms.base import Setting as Setting
from kdcache.train.terms.base import StudentStates as StudentStates
from kdcache.train.terms.base import Term as Term
