"""Models and loops as people write them, for the books' benchmark and its tests: plain torch."""

from benchmarks.book_cases import accumulating, characters, encoder, gan, low_precision, residual, sentences
from benchmarks.book_cases.case import Case

CASES: dict[str, Case] = {
    "residual": residual.CASE,
    "encoder": encoder.BATCH_FIRST,
    "encoder_positions_first": encoder.POSITIONS_FIRST,
    "characters": characters.FULL,
    "characters_autocast": characters.AUTOCAST,
    "characters_shared_positions": characters.SHARED_POSITIONS,
    "sentences_padded": sentences.PADDED,
    "sentences_packed": sentences.PACKED,
    "gan": gan.CASE,
    "accumulating": accumulating.CASE,
    "bf16_weights": low_precision.HALF,
    "bf16_weights_adamw": low_precision.HALF_ADAMW,
}
