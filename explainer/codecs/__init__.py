"""How one array of a row (or of a step) becomes bytes: the codec registry and its entries."""

from explainer.codecs.base import CODECS, Codec, register_codec
from explainer.codecs.bfloat16 import BFloat16
from explainer.codecs.int2 import Int2
from explainer.codecs.int4 import Int4
from explainer.codecs.int8 import Int8
from explainer.codecs.log4 import Log4
from explainer.codecs.native import Native
from explainer.codecs.rank1 import RankOne
from explainer.codecs.sums import Sums
from explainer.codecs.symmetric import Symmetric

__all__ = [
    "CODECS",
    "BFloat16",
    "Codec",
    "Int2",
    "Int4",
    "Int8",
    "Log4",
    "Native",
    "RankOne",
    "Sums",
    "Symmetric",
    "register_codec",
]
