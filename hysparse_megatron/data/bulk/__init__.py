"""Prepare a large corpus: many processes, bounded memory, resumable, the same bytes every time.

sources (files) -> units (pieces of them) -> worker (shards of tokens) -> journal (what is done) ->
duplicates -> assemble (Megatron's files and the card); run.py holds it together.
"""

from hysparse_megatron.data.bulk.run import BulkRequest, prepare_bulk
from hysparse_megatron.data.bulk.verify import verify_prepared

__all__ = ["BulkRequest", "prepare_bulk", "verify_prepared"]
