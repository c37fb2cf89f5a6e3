"""The attention cache: a teacher's attention on disk, by (example, view). It never sees a model."""

from attention_transfer.transfer.cache_layout import Layout
from attention_transfer.transfer.cache_plan import Plan, plan
from attention_transfer.transfer.cache_reader import CacheReader, VerifyReport, verify
from attention_transfer.transfer.cache_writer import CacheWriter
from attention_transfer.transfer.shards import SHARD_BYTES

__all__ = ["SHARD_BYTES", "CacheReader", "CacheWriter", "Layout", "Plan", "VerifyReport", "plan", "verify"]
